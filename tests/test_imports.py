"""The arrows of the architecture: which part may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"errors", "ops", "version"}
ALLOWED = {
    "errors": set(), "files": {"errors"}, "version": set(), "ops": set(),
    "convert": {"errors", "masks", "ops", "targets"},
    "export": {"errors", "export", "files", "patterns", "shards", "shrink", "targets"},
    "sparseml": {"errors"},
    "advice": {"convert", "errors", "masks"}, "coupled": {"errors"}, "shrink": {"coupled", "errors"},
    "shards": {"errors"}, "compact": {"errors"}, "upkeep": {"compact", "ops", "shards"},
    "masks": {"errors", "shards"}, "targets": {"errors"}, "schedules": {"errors"},
    "scores": {"compact", "errors", "ops", "shards"},
    "checkpoints": {"errors", "masks"},
    "distributions": {"errors", "ops", "targets"}, "patterns": {"errors", "ops", "masks"},
    "history": {"masks"}, "redistribution": {"scores"},
    "sparsifier": {"compact", "errors", "history", "masks", "ops", "targets", "scores", "distributions", "patterns",
                   "scaling", "schedules", "shards", "upkeep"},
    "dynamic": {"errors", "history", "masks", "ops", "targets", "scores", "distributions", "redistribution",
                "schedules", "sparsifier"},
    "penalties": {"errors", "ops", "shards"}, "relaxation": {"errors", "patterns", "schedules"},
    "permutation": {"patterns"},
    "calibration": {"errors", "targets"}, "moments": {"errors", "shards", "targets"},
    "initial": {"calibration", "errors", "scores"}, "stages": {"errors", "schedules", "sparsifier"},
    "lottery": {"distributions", "errors", "moments", "schedules", "scores", "stages", "targets"},
    "adaptive": {"distributions", "errors", "masks", "moments", "ops", "penalties", "schedules", "scores", "shards",
                 "stages", "targets"},
    "learned": {"errors", "masks", "shards", "targets", "scores", "distributions", "patterns", "relaxation",
                "schedules", "sparsifier"},
    "congruent": {"distributions", "dynamic", "errors", "masks", "ops", "redistribution", "schedules", "scores",
                  "targets"},
    "importance": {"distributions", "dynamic", "errors", "masks", "ops", "schedules", "scores", "targets"},
    "sensitivity": {"distributions", "dynamic", "errors", "redistribution", "schedules", "scores", "targets"},
    "federated": {"congruent", "constant", "distributions", "dynamic", "errors", "federated", "importance",
                  "files", "masks", "ops", "report", "schedules", "scores", "sensitivity", "sparsifier", "targets"},
    "companion": {"errors"},
    "supermask": {"companion", "distributions", "errors", "learned", "masks", "ops", "schedules", "scores", "shards",
                  "targets"},
    "gumbel": {"checkpoints", "companion", "distributions", "errors", "learned", "masks", "ops", "patterns",
               "schedules", "shards", "targets"},
    "oneshot": {"calibration", "errors", "initial", "masks", "ops", "targets", "scores", "distributions", "patterns",
                "permutation", "schedules", "shards", "sparsifier"},
    "constant": {"errors", "masks", "sparsifier", "targets"}, "report": {"files", "masks", "shards"},
    "memory": set(), "traces": {"shards"}, "drawing": set(),
    "page": {"drawing", "files", "history", "report", "traces"},
    "difference": {"checkpoints", "errors", "masks", "report", "targets"},
    "models": {"errors", "models"}, "data": {"errors", "data"},
    "scaling": {"compact", "errors", "masks", "ops", "shards"}, "callbacks": set(), "__main__": set(),
    "__init__": {"errors", "schedules", "sparsifier", "targets", "version"},
}  # fmt: skip


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "sparsity").rglob("*.py")), ids=lambda path: path.stem)
def test_arrows_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT / "sparsity").parts[0].removesuffix(".py")
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("sparsity.")}
    assert parts - {part} <= ALLOWED[part] | ({"InputError"} & parts)
    if part not in ("models", "data"):
        assert not any("lightning" in name for name in imported(path)), "only callbacks, models and data know Lightning"
    assert not any(name.split(".")[0] == "callbacks" for name in imported(path))


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").rglob("*.py")), ids=lambda path: path.stem)
def test_callbacks_import_their_own_package_relatively(path: Path) -> None:
    assert not any(name.split(".")[0] == "callbacks" for name in imported(path))


def python(code: str, folder: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, env=ENVIRONMENT
    ).stdout.strip()


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}


def test_importing_sparsity_brings_neither_lightning_nor_anything_optional(tmp_path: Path) -> None:
    optional = (
        "['pytorch_lightning', 'matplotlib', 'sklearn', 'pyarrow', 'datasets', 'torchvision', 'triton', 'callbacks']"
    )
    code = f"import sys, sparsity; print([name for name in {optional} if name in sys.modules])"
    assert python(code, tmp_path) == "[]"


@pytest.mark.parametrize("first", ["callbacks", "sparsity.callbacks"])
def test_both_names_give_the_same_objects(first: str, tmp_path: Path) -> None:
    code = (
        f"import {first}; import callbacks, sparsity.callbacks, sparsity.callbacks.gradual, callbacks.gradual;"
        "from sparsity.callbacks import LAMP;"
        "print(callbacks is sparsity.callbacks, LAMP is callbacks.LAMP,"
        "callbacks.gradual is sparsity.callbacks.gradual)"
    )
    assert python(code, tmp_path) == "True True True"


def test_a_project_with_callbacks_of_its_own_reaches_ours_by_the_other_name(tmp_path: Path) -> None:
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").write_text("class Theirs: ...\n")
    code = (
        "import callbacks; from sparsity.callbacks import LAMP, Sparsify; import sparsity.callbacks.gradual as g;"
        "print(hasattr(callbacks, 'Theirs'), hasattr(callbacks, 'LAMP'), LAMP is g.LAMP, issubclass(LAMP, Sparsify),"
        "LAMP(sparsity=0.5).sparsifier.sparsity)"
    )
    assert python(code, tmp_path) == "True False True True 0.5"
