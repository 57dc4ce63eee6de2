"""Which learning rate a sparse network wants: its own, or the dense one's, scaled.

    python -m benchmarks.rates

LeNet-300-100 on scikit-learn's digits, offline: the dense network, and three methods that are sparse from the first
step on, at 95 % zeros, each as it is, with larger first weights (`scaled("weights")`), and with these and scaled
rates (`scaled()`). SGD with Nesterov momentum and a cosine, 60 epochs, three seeds. Accuracies are
of the validation images, as such a choice would be made; the test images are not read.

Results are kept as they come; a call that is repeated runs what is missing, and writes the table of the README.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import track

from benchmarks import readme
from callbacks import SET, RigL, Sparsify, StaticMask
from sparsity import data, models
from sparsity.schedules import CosineDrop

PATH = Path(__file__).parent / "results" / "rates.json"
RATES = (0.005, 0.01, 0.02, 0.05)
SPARSITY, EPOCHS = 0.95, 60
METHODS: dict[str, Callable[[], Sparsify]] = {
    "StaticMask": lambda: StaticMask(SPARSITY),
    "SET": lambda: SET(SPARSITY, CosineDrop(0.3, 0.02)),
    "RigL": lambda: RigL(SPARSITY, CosineDrop(0.3, 0.02)),
}
HOW: dict[str, Callable[[Sparsify], Sparsify]] = {
    "": lambda method: method,
    ", scaled weights": lambda method: method.scaled("weights"),
    ", scaled": lambda method: method.scaled(),
}
LINES = ["dense", *(name + how for name in METHODS for how in HOW)]


def method_of(line: str) -> list[pl.Callback]:
    name, comma, how = line.partition(", ")
    return [HOW[comma + how](METHODS[name]())] if name in METHODS else []


class Digit(models.Classifier):
    """SGD with Nesterov momentum and a cosine."""

    def __init__(self, rate: float) -> None:
        super().__init__(models.LeNet300100(inputs=64))
        self.rate = rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def run(line: str, rate: float, seed: int) -> dict[str, Any]:
    """One network, trained and validated."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    module = Digit(rate)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", check_val_every_n_epoch=EPOCHS, num_sanity_val_steps=0,
        callbacks=method_of(line), **quiet,
    )  # fmt: skip
    trainer.fit(module, data.Digits())
    return {"line": line, "rate": rate, "seed": seed, "val_acc": round(float(trainer.callback_metrics["val/acc"]), 6)}


def table(runs: list[dict[str, Any]]) -> str:
    """Means and standard deviations over seeds, by rate, in Markdown."""
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---" * (1 + len(RATES)) + "|"]
    for line in LINES:
        cells = [
            spread([row["val_acc"] for row in runs if (row["line"], row["rate"]) == (line, rate)]) for rate in RATES
        ]
        lines.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(found: list[float]) -> str:
    return f"{100 * statistics.mean(found):.1f} ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(PATH.read_text())["runs"] if PATH.exists() else []
    known = {(row["line"], row["rate"], row["seed"]) for row in runs}
    cases = [(line, rate, seed) for seed in options.seeds for line in LINES for rate in RATES]
    with ProcessPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(run, *case) for case in cases if case not in known]
        for done in track(as_completed(jobs), total=len(jobs), description="rates"):
            runs.append(done.result())
            runs.sort(key=lambda row: (LINES.index(row["line"]), row["rate"], row["seed"]))
            PATH.write_text(json.dumps({"torch": torch.__version__, "runs": runs}) + "\n")
    print(table(runs))
    readme.write("rates", table(runs), "benchmarks/README.md")


if __name__ == "__main__":
    main()
