"""Tables that benchmarks write into Markdown files."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def between(name: str, file: str = "README.md") -> tuple[str, str, str]:
    """The file before, inside and after its place of this name; ends the program where it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begins, rest = (ROOT / file).read_text().partition(begin)
    inside, ends, after = rest.partition(end)
    if not begins or not ends:
        raise SystemExit(f"{file} has no place for the table: expected the lines '{begin}' and '{end}' in it")
    return before + begin, inside.strip(), end + after


def write(name: str, text: str, file: str = "README.md") -> None:
    """Puts a text into its place."""
    before, _, after = between(name, file)
    (ROOT / file).write_text(f"{before}\n\n{text.strip()}\n\n{after}")
