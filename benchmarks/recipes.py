"""Trains a recipe with several methods and seeds, tests each network once, and writes the results as JSON.

    python benchmarks/recipes.py mnist_lenet300_lamp --methods LAMP GMP StaticMask null --data data/mnist

Each run is the command line's own: `fit`, then `test` on the last checkpoint. Methods share the recipe's sparsity and,
where they take one, its schedule; `null` is the dense baseline. Nothing is selected: validation is only watched.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def train_py(*arguments: str) -> None:
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    subprocess.run([sys.executable, "train.py", *arguments, *quiet], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def report(folder: Path) -> dict[str, Any]:
    newest = max(folder.rglob("report.json"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(newest.read_text())
    return found


def run(recipe: str, method: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """One network: its accuracies, its sparsity, its theoretical FLOPs, and how long training took."""
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"--config=recipes/{recipe}.yaml", f"--sparsity={method}", f"--trainer.default_root_dir={folder}",
            f"--seed_everything={seed}", *settings,
        ]  # fmt: skip
        start = time.perf_counter()
        train_py("fit", *common)
        seconds = time.perf_counter() - start
        fitted = report(Path(folder))
        train_py("test", *common, "--ckpt_path=last")
        tested = report(Path(folder))
    return {
        "method": method, "seed": seed, "test_acc": tested["metrics"]["test/acc"],
        "val_acc": fitted["metrics"]["val/acc"], "sparsity": fitted["sparsity"]["achieved"],
        "flops": fitted["flops"], "seconds": round(seconds, 1), "versions": fitted["versions"],
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (standard deviation over seeds) of each method's test accuracy."""
    result = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        accuracies = [row["test_acc"] for row in mine]
        result.append({
            "method": "dense" if method == "null" else method, "seeds": len(mine),
            "sparsity": statistics.mean(row["sparsity"] for row in mine),
            "test_acc_mean": statistics.mean(accuracies),
            "test_acc_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        })  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--methods", nargs="+", default=["null", "LAMP", "GlobalMP", "GMP", "StaticMask"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--data", help="a folder of parquet files, for the recipes that read one")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides, for example trainer.max_epochs=2")
    parser.add_argument("--name", help="of the result file, if not the recipe's")
    options = parser.parse_args()
    settings = [f"--{each}" for each in options.set]
    data = [f"--data.data_dir={Path(options.data).resolve()}"] if options.data else []
    rows = []
    for method in options.methods:
        for seed in options.seeds:
            rows.append(run(options.recipe, method, seed, [*settings, *data]))
            print(rows[-1])
    result = {"recipe": options.recipe, "overrides": options.set, "summary": summary(rows), "runs": rows}
    path = ROOT / "benchmarks" / "results" / f"{options.name or options.recipe}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["summary"]:
        spread = "" if row["test_acc_std"] is None else f" ± {row['test_acc_std']:.4f}"
        print(f"| {row['method']} | {row['sparsity']:.4f} | {row['test_acc_mean']:.4f}{spread} | {row['seeds']} |")


if __name__ == "__main__":
    main()
