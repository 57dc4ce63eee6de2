"""What the distributions hold: every package, every recipe, and the version in one place."""

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
