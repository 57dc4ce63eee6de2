"""A page of a report as a reader gets it: parsed by the standard library, and refused if it is not well-formed."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br"}
LOADS = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}


class Page(HTMLParser):
    """Headings, sections, tables, charts and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}  # by what their region is called
        self.summaries: list[str] = []
        self._region = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID and not (self.open and self.text_of_tag().endswith("/>")):
            self.open.append(tag)
        if tag == "section" and found.get("id"):
            self.sections.append(str(found["id"]))
        if found.get("role") == "region":
            self._region = str(found["aria-label"])
        if found.get("role") == "img":
            self.summaries.append(str(found["aria-label"]))
        if tag == "table":
            self.tables[self._region] = []
        if tag == "tr":
            self.tables[self._region].append([])
        if tag in ("th", "td"):
            self.tables[self._region][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if any(tag in ("th", "td") for tag in self.open):
            self.tables[self._region][-1][-1] += data

    def text_of_tag(self) -> str:
        return self.get_starttag_text() or ""

    def outside(self) -> list[str]:
        """What a browser would fetch, or run."""
        found = [f"<{tag}>" for tag in self.tags if tag in ("script", "iframe", "object", "embed", "base", "form")]
        for tag, name, value in self.attributes:
            if name.startswith("on") or (name in LOADS and not (value or "").startswith("data:")):
                found.append(f"{tag} {name}={value}")
        return found + [word for word in ("http:", "https:", "url(", "@import") if word in self.text]
