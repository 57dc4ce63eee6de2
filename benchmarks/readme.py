"""The README's tables that benchmarks write."""

from pathlib import Path

PATH = Path(__file__).parents[1] / "README.md"


def between(name: str) -> tuple[str, str, str]:
    """The README before, inside and after its place of this name; ends the program where it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begins, rest = PATH.read_text().partition(begin)
    inside, ends, after = rest.partition(end)
    if not begins or not ends:
        raise SystemExit(f"README.md has no place for the table: expected the lines '{begin}' and '{end}' in it")
    return before + begin, inside.strip(), end + after


def write(name: str, table: str) -> None:
    """Puts a table into its place."""
    before, _, after = between(name)
    PATH.write_text(f"{before}\n\n{table}\n\n{after}")
