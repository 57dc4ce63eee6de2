"""What the distributions hold: every package, every recipe, and the version in one place."""

import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import sparsity
from callbacks import commands

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


def test_recipes_can_be_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    commands.recipes([])
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {
        "digits_lamp",
        "federated/digits_fedsgc",
    }
    commands.recipes(["digits_lamp"])
    assert capsys.readouterr().out == (ROOT / "recipes/digits_lamp.yaml").read_text()
    with pytest.raises(SystemExit) as ended:
        commands.recipes(["digits_lmp"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "try: digits_lamp"


def test_the_command_line_is_a_module(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text((ROOT / "recipes/digits_lamp.yaml").read_text())
    wrong = sparsity_command(tmp_path, "fit", "--config", "mine.yaml", "--trainer.max_epoch=1")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == "try: python -m sparsity [options] fit --help"
    ran = sparsity_command(tmp_path, "fit", "--config", "mine.yaml", "--trainer.max_epochs=1", "--sparsity=StaticMask")
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.splitlines()[-1].removeprefix("report: ")).name == "report.json"
