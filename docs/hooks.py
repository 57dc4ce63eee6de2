"""Pages that are not written here: the repository's own texts, with what they link to, and its notebooks."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TEXTS = (
    "README.md",
    "benchmarks/README.md",
    "recipes/README.md",
    "recipes/federated/README.md",
    "recipes/federated/FLOWER.md",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them below `repository/` and `notebooks/`, so that links between them are checked like all others."""
    texts = [ROOT / name for name in TEXTS]
    for path in {target for text in texts for target in linked(text)} - set(texts):
        files.append(File.generated(config, f"repository/{path.relative_to(ROOT)}", abs_src_path=str(path)))
    for text in texts:
        content = text.read_text().replace("](docs/", "](../")  # pages of the site, which are there already
        files.append(File.generated(config, f"repository/{text.relative_to(ROOT)}", content=content))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page(json.loads(path.read_text()))))
    return files


def linked(text: Path) -> set[Path]:
    """The files that a Markdown file links to or shows."""
    links = re.findall(r"\]\((?!\w+:|docs/)([^)#]+)(?:#[^)]*)?\)", text.read_text())
    return {path for link in links if (path := (text.parent / link).resolve()).is_file()}


def page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its cells, and what they printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        parts += [shown(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts)


def shown(output: dict[str, Any]) -> str:
    """What a cell printed, or the picture that it drew."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![figure](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```"
