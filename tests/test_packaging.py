"""What the distributions hold: every package, every recipe, and the version in one place."""

import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import sparsity

ROOT = Path(__file__).parents[1]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_every_package_is_listed() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("callbacks", "sparsity")
        for path in (ROOT / package).rglob("__init__.py")
    }
    recipes = {".".join(("sparsity", *path.relative_to(ROOT).parts)) for path in (ROOT / "recipes").rglob("")}
    assert set(SETUP["options"]["packages"].split()) == found | recipes


def test_every_file_that_is_no_module_is_package_data() -> None:
    named = {package: globs.split(", ") for package, globs in SETUP["options.package_data"].items()}
    folders = {"callbacks": "callbacks", "sparsity": "sparsity", "sparsity.recipes": "recipes",
               "sparsity.recipes.federated": "recipes/federated"}  # fmt: skip
    assert set(named) == set(folders)
    packed = {
        path for package, globs in named.items() for glob in globs for path in (ROOT / folders[package]).glob(glob)
    }
    every = {path for top in ("callbacks", "sparsity", "recipes") for path in (ROOT / top).rglob("*")}
    plain = {path for path in every if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packed == plain


def test_the_version_is_in_one_place() -> None:
    assert SETUP["metadata"]["version"] == "attr: sparsity.version.__version__"
    for path in (ROOT / "pyproject.toml", ROOT / "mkdocs.yml", ROOT / "setup.cfg"):
        assert sparsity.__version__ not in path.read_text()


def sparsity_command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m sparsity` in another folder."""
    command = [sys.executable, "-W", "ignore", "-m", "sparsity", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_the_command_line_is_a_module(tmp_path: Path) -> None:
    listed = sparsity_command(tmp_path, "recipes").stdout
    assert {line.split()[0] for line in listed.splitlines()} >= {"digits_lamp", "federated/digits_fedsgc"}
    recipe = sparsity_command(tmp_path, "recipes", "digits_lamp").stdout
    assert recipe == (ROOT / "recipes/digits_lamp.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(recipe)
    unknown = sparsity_command(tmp_path, "recipes", "digits_lmp")
    assert (unknown.returncode, unknown.stderr.splitlines()[-1]) == (2, "try: digits_lamp")
    wrong = sparsity_command(tmp_path, "fit", "--config", "mine.yaml", "--trainer.max_epoch=1")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == "try: python -m sparsity [options] fit --help"
    ran = sparsity_command(tmp_path, "fit", "--config", "mine.yaml", "--trainer.max_epochs=1", "--sparsity=StaticMask")
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.splitlines()[-1].removeprefix("report: ")).name == "report.json"
