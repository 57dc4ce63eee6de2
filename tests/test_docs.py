"""The documentation builds without a warning, its code runs, and nothing public is missing from it."""

import importlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import callbacks
from tests import pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TAUGHT = sorted(
    path
    for path in [*DOCS.glob("*.md"), *DOCS.glob("how-to/*.md"), *DOCS.glob("explanation/*.md")]
    if pages.blocks(path.read_text())
)
PUBLIC = ("callbacks", "sparsity", "sparsity.federated", "sparsity.ops", "sparsity.data", "sparsity.models")
NOUNS = ("scores", "distributions", "patterns", "schedules", "penalties", "targets", "convert", "redistribution")


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_code_runs_and_prints_what_the_page_says(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = pages.names()
    for code, printed in pages.blocks(path.read_text()):
        exec(compile(code, path.name, "exec"), names)
        out = capsys.readouterr().out
        assert printed is None or out.endswith(printed)  # Lightning may have had its say before


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_commands_name_files_that_exist(path: Path) -> None:
    for name in re.findall(r"recipes/[\w/]+\.yaml", path.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: what is not logged is not counted, and a build with warnings would pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_pages_take_nothing_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//", page.read_text()), page
        assert not re.findall(r"<link(?![^>]+rel=\"?canonical)[^>]+href=\"?(?:https?:)?//", page.read_text()), page


def test_reference_has_everything_public(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, type) or callable(thing):
                assert f"{thing.__module__}.{thing.__qualname__}" in documented
    for noun in NOUNS:
        module = importlib.import_module(f"sparsity.{noun}")
        for name, thing in vars(module).items():
            if not name.startswith("_") and isinstance(thing, type) and thing.__module__ == module.__name__:
                assert f"{thing.__module__}.{name}" in documented


def test_every_method_is_explained() -> None:
    texts = "\n".join(path.read_text() for path in (DOCS / "explanation").glob("*.md"))
    headings = set(re.findall(r"^#+ (.+)$", texts, re.MULTILINE))
    explained = {name.strip() for heading in headings for name in heading.split(",")}
    others = {"DryRun", "ModelPruning", "SaveOnInterrupt", "Sparsify", "SparsityReport"}
    assert set(callbacks.__all__) - others <= explained


def test_every_paper_of_the_readme_can_be_cited() -> None:
    cited = (DOCS / "citing.md").read_text()
    table = (ROOT / "README.md").read_text().partition("| method | what stays | paper |")[2].partition("\n\n")[0]
    numbers = set(re.findall(r"arXiv (\d{4}\.\d{5})", table))
    assert len(numbers) > 20
    assert {number for number in numbers if f"eprint = {{{number}}}" not in cited} == set()
