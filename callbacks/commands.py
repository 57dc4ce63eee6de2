"""Commands that need no recipe: two runs compared, recipes, benchmarks."""

import difflib
import inspect
import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sparsity import InputError, difference, sparseml
from sparsity.files import written
from sparsity.report import finite

from .plain import PlainParser

ROOT = Path(__file__).parents[1]  # the repository, or where packages are installed
RECIPES = ROOT / "sparsity" / "recipes" if (ROOT / "sparsity" / "recipes").is_dir() else ROOT / "recipes"
TIMED = ("kernels", "overhead", "oneshot", "regrow", "penalty", "gumbel", "calibrate", "federation", "soak")


def diff(words: Sequence[str]) -> None:
    """Compares two runs, checkpoints or mask files, and prints what they share.

    Mask overlap of each layer beside what chance would give, densities, metrics, bytes.
    """
    parser = PlainParser(prog=f"{Path(sys.argv[0]).name} diff", description=inspect.getdoc(diff))
    about = "the log folder of a run, a checkpoint, or a file of masks"
    parser.add_argument("a", type=str, help=about)
    parser.add_argument("b", type=str, help=about)
    parser.add_argument("--json", type=str | None, default=None, metavar="FILE", help="where to write all of it")
    given = parser.parse_args(list(words))
    found = finite(difference.compare(given.a, given.b))
    if given.json is not None:
        try:
            Path(given.json).write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write '{given.json}' (--json): {error.strerror}") from error
    Console().print(difference.summary(found))


def bench(names: Sequence[str]) -> None:
    """Runs these benchmarks of the repository, or all that measure time; each writes its results and prints them.

    Those that train networks in the literature's protocols want data and hours: `python -m benchmarks.<name> --help`.
    The status is how many failed.
    """
    if "--help" in names:
        print(f"usage: train.py bench [name ...]\n\n{bench.__doc__}\n\nnames: {', '.join(TIMED)}")
        return
    unknown = [name for name in names if name not in TIMED]
    if unknown:
        print(
            f"error: no benchmark that measures time is called {unknown[0]!r}\ntry: {', '.join(TIMED)}", file=sys.stderr
        )
        sys.exit(2)
    if not (ROOT / "benchmarks").is_dir():
        print(
            "error: benchmarks are not installed\ntry: train.py bench, in a checkout of the repository", file=sys.stderr
        )
        sys.exit(2)
    failed = 0
    for name in names or TIMED:
        print(f"benchmarks.{name}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT).returncode != 0
    sys.exit(failed)


def recipes(names: Sequence[str]) -> None:
    """Prints these recipes, or, without a name, what there is: `recipes digits_lamp > mine.yaml`."""
    found = {str(path.relative_to(RECIPES).with_suffix("")): path for path in sorted(RECIPES.rglob("*.yaml"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        near = difflib.get_close_matches(unknown[0], found, n=1)
        print(f"error: no recipe is called {unknown[0]!r}\ntry: {', '.join(near or found)}", file=sys.stderr)
        sys.exit(2)
    table = [f"{name:40} {recipe.read_text().splitlines()[0].removeprefix('# ')}" for name, recipe in found.items()]
    print("\n".join([found[name].read_text().rstrip() for name in names] or table))


def import_sparseml(words: Sequence[str]) -> None:
    """Writes what SparseML's recipe FILE asks for as an overlay for a recipe of yours, and says what could not be."""
    parser = ArgumentParser(prog=f"{Path(sys.argv[0]).name} import-sparseml", description=import_sparseml.__doc__)
    parser.add_argument("file", type=Path, help="a recipe in YAML, or Markdown with one at its head")
    parser.add_argument("--output", type=Path, help="the file to write; <FILE>.imported.yaml if not given")
    parser.add_argument("--prefix", default="net.", help="what the LightningModule calls the network (%(default)s)")
    asked = parser.parse_args(words)
    if not asked.file.is_file():
        raise InputError(f"no recipe at '{asked.file}'")
    try:
        text = asked.file.read_text()
    except UnicodeDecodeError as error:
        raise InputError(f"'{asked.file}' is no text: {error}") from error
    found = sparseml.translate(text, asked.prefix)
    output = asked.output or asked.file.with_suffix(".imported.yaml")
    if output.exists():
        raise InputError(f"'{output}' is there already: give another --output, or remove it")
    with written(output) as partial:
        partial.write_text(found.text(asked.file.name))
    for remark in found.remarks:
        print(f"- {remark}")
    print(f"recipe: {output}")
