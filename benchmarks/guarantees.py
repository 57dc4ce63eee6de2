"""Runs every situation with every method of this project and every peer, and writes the table in the README.

    python -m benchmarks.guarantees             # all of it: some ten minutes on two cores
    python -m benchmarks.guarantees --table     # the table again, from the results that are there

A cell is "yes" where the run kept the guarantee, "no" where it ended without an error and broke it, "refused" where the
method said beforehand that it would not work, "error" where it failed otherwise. The reasons are in the JSON.
"""

import argparse
import json
import logging
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks import readme
from tests.guarantees.columns import OURS, PEERS
from tests.guarantees.situations import SITUATIONS, verdict

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "guarantees.json"
SIGNS = {"yes": "✓", "no": "✗", "refused": "refused", "error": "error", "not run": "not run"}


def cell(situation: str, name: str) -> dict[str, str]:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found, why = verdict(situation, name, Path(folder))
    return {"situation": situation, "column": name, "verdict": found, "why": why.replace(folder, "")}


def table(cells: list[dict[str, str]]) -> str:
    """The matrix in Markdown, a row per situation."""
    names = [*OURS, *PEERS]
    found = {(s, name): "not run" for s in SITUATIONS for name in names}
    found |= {(each["situation"], each["column"]): SIGNS[each["verdict"]] for each in cells}
    lines = ["| " + " | ".join(["", *names]) + " |", "|---" * (len(names) + 1) + "|"]
    for situation in SITUATIONS:
        lines.append("| " + " | ".join([situation, *(found[situation, name] for name in names)]) + " |")
    held = [sum(found[situation, name] == "✓" for situation in SITUATIONS) for name in names]
    run = [sum(found[situation, name] != "not run" for situation in SITUATIONS) for name in names]
    totals = [f"{yes} of {of}" for yes, of in zip(held, run, strict=True)]
    return "\n".join([*lines, "| " + " | ".join(["**held, of those run**", *totals]) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--columns", nargs="+", default=[*OURS, *PEERS], help="run only these, keep the others' results"
    )
    parser.add_argument("--situations", nargs="+", default=list(SITUATIONS), help="run only these")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table from the JSON")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    known = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else []
    cells: list[dict[str, str]] = known
    if not options.table:
        with ProcessPoolExecutor(options.jobs) as pool:
            runs = [pool.submit(cell, situation, name) for name in options.columns for situation in options.situations]
            fresh = [done.result() for done in track(runs, description="cells")]
        again = {(each["situation"], each["column"]) for each in fresh}
        cells = [each for each in known if (each["situation"], each["column"]) not in again] + fresh
        versions: dict[str, Any] = {name: version(name) for name in ("torch", "pytorch-lightning")}
        RESULT.write_text(json.dumps({**versions, "cells": cells}, indent=1) + "\n")
    readme.write("guarantees", table(cells))


if __name__ == "__main__":
    main()
