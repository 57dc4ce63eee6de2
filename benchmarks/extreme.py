"""From dense to extremely sparse: accuracy against sparsity, every method in the same number of epochs.

    python -m benchmarks.extreme lenet300 --data data/mnist
    python -m benchmarks.extreme strided --data data/cifar10

All runs have the same number of epochs in all, at most: those in rounds (IMP, SWAMP) divide them among their rounds,
HyperSparse among its phases, and it may end early. SGD with Nesterov momentum and a cosine, of each stage where there
are stages. A tenth of the training images is held out (`val_acc`); the test set is read once per network, after its
training, and nothing is chosen by it. Results are kept as they come; a call that is repeated runs what is missing.
"""

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from rich.progress import track
from torch import Tensor, nn

from callbacks import GMP, LAMP, SWAMP, HyperSparse, IterativeMagnitude, OneShot, RigL, Sparsify, StaticMask
from sparsity import data, masks, models
from sparsity.adaptive import Phases
from sparsity.calibration import Calibration
from sparsity.data.images import Images
from sparsity.distributions import Global
from sparsity.initial import SynFlow
from sparsity.lottery import Particles
from sparsity.penalties import HyperSparsity, Lasso, Penalty
from sparsity.schedules import CosineDrop, Cubic, Iterative

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998)


class Setting(NamedTuple):
    """A network, its data, its protocol, and what methods were given by its validation images."""

    network: Callable[[], nn.Module]
    images: Callable[[str | None], Images]
    epochs: int
    penalty: tuple[float, float]  # strength and growth of HyperSparse's
    fine_tune: float  # the part of its epochs that are left to fine-tuning
    prunings: tuple[int, int]  # of iterative magnitude pruning, and of SWAMP


def mnist(folder: str | None) -> Images:
    return data.MNIST(folder, batch_size=256)


def cifar10(folder: str | None) -> Images:
    return data.CIFAR10(folder, batch_size=128)


def strided() -> nn.Module:
    return models.StridedConvNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # a layout


SETTINGS = {
    "lenet300": Setting(models.LeNet300100, mnist, 21, (1e-4, 2.0), 0.6, (4, 4)),
    "strided": Setting(strided, cifar10, 13, (3e-4, 2.0), 0.4, (3, 2)),
}
RATE = 0.1


def each_round(sparsity: float, prunings: int) -> float:
    """What each pruning takes of what remains, so that as many reach the sparsity."""
    return 1 - math.exp(math.log(1 - sparsity) / prunings)


def regularised(sparsity: float, penalty: Penalty, setting: Setting) -> HyperSparse:
    return HyperSparse(sparsity, penalty, Phases(0.1, setting.fine_tune))


METHODS: dict[str, Callable[[float, Setting], Sparsify]] = {
    "random, ERK": lambda sparsity, _: StaticMask(sparsity),
    "SynFlow": lambda sparsity, _: OneShot(sparsity, score=SynFlow(), calibration=Calibration(1)),
    "GMP": lambda sparsity, _: GMP(sparsity, Cubic(0.1, 0.7)),
    "GMP, global": lambda sparsity, _: GMP(sparsity, Cubic(0.1, 0.7), Global(1e-6)),
    "LAMP, iterative": lambda sparsity, _: LAMP(sparsity, Iterative(0.2, 0.1, 0.7)),
    "RigL": lambda sparsity, _: RigL(sparsity, CosineDrop(0.3, 0.02)),
    "IMP, rewinding": lambda sparsity, setting: IterativeMagnitude(
        sparsity, each_round(sparsity, setting.prunings[0]), "1ep"
    ),
    "SWAMP": lambda sparsity, setting: SWAMP(
        sparsity, each_round(sparsity, setting.prunings[1]), "1ep", Particles(2, 0.25)
    ),
    "HyperSparse": lambda sparsity, setting: regularised(sparsity, HyperSparsity(*setting.penalty), setting),
    "HyperSparse, untuned": lambda sparsity, _: regularised(
        sparsity, HyperSparsity(*SETTINGS["lenet300"].penalty), SETTINGS["lenet300"]
    ),
    "L1 in its place": lambda sparsity, setting: regularised(sparsity, Lasso(*setting.penalty), setting),
}  # fmt: skip


class Trained(pl.LightningModule):
    """Cross entropy, SGD with Nesterov momentum, and a cosine."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.net = setting.network()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._measure("val_acc", batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._measure("test_acc", batch)

    def _measure(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log(name, right, on_epoch=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=1e-4)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


Case = tuple[str, float, int]


def run(name: str, case: Case, epochs: int, folder: str | None, accelerator: str, test: bool = True) -> dict[str, Any]:
    """One network, trained and tested."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if accelerator == "cpu":
        torch.set_num_threads(1)
    setting, (method, sparsity, seed) = SETTINGS[name], case
    pl.seed_everything(seed, verbose=False)
    model, images = Trained(setting), setting.images(folder)
    sparse = None if method == "dense" else METHODS[method](sparsity, setting)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    runner = pl.Trainer(
        max_epochs=epochs, limit_val_batches=0, accelerator=accelerator, devices=1, gradient_clip_val=1.0,
        callbacks=[sparse] if sparse else [], **quiet,
    )  # fmt: skip
    start = time.perf_counter()
    runner.fit(model, images)
    row = {"method": method, "sparsity": sparsity, "seed": seed, "epochs": runner.current_epoch,
           "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip
    runner.limit_val_batches = 1.0
    looks = (runner.validate, runner.test) if test else (runner.validate,)
    for look in looks:
        [found] = look(model, images, verbose=False)
        row |= {key: round(value, 6) for key, value in found.items()}
    if sparse:
        kept = masks.counts(sparse.sparsifier.masks)
        row |= {
            "achieved": 1 - sparse.sparsifier.density(), "empty": [layer for layer, count in kept.items() if not count],
            "layers": {n: round(float(mask.float().mean()), 6) for n, mask in sparse.sparsifier.masks.items()},
            **sparse.story(),
        }  # fmt: skip
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method at each sparsity."""
    result = []
    for method, sparsity in dict.fromkeys((row["method"], row["sparsity"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["sparsity"]) == (method, sparsity)]
        accuracies = [row["test_acc"] for row in mine]
        result.append({
            "method": method, "sparsity": sparsity, "seeds": len(mine),
            "test_acc_mean": statistics.mean(accuracies),
            "test_acc_std": statistics.stdev(accuracies) if len(mine) > 1 else None,
            "with_empty_layers": sum(bool(row.get("empty")) for row in mine),
        })  # fmt: skip
    return result


def table(result: dict[str, Any]) -> str:
    """Test accuracy in percent, methods by sparsities, in Markdown; dense stands in all columns."""
    sparsities = sorted({row["sparsity"] for row in result["summary"] if row["method"] != "dense"})
    lines = ["| zeros | " + " | ".join(f"{100 * sparsity:g} %" for sparsity in sparsities) + " |"]
    lines.append("|---" * (len(sparsities) + 1) + "|")
    for method in dict.fromkeys(row["method"] for row in result["summary"]):
        found = {row["sparsity"]: row for row in result["summary"] if row["method"] == method}
        cells = [found.get(0.0 if method == "dense" else sparsity) for sparsity in sparsities]
        lines.append(f"| {method} | " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = "" if row["test_acc_std"] is None else f" ± {100 * row['test_acc_std']:.2f}"
    return f"{100 * row['test_acc_mean']:.2f}{spread}" + (" (*)" if row["with_empty_layers"] else "")


def figure(result: dict[str, Any], path: Path) -> None:
    """Test error against sparsity, both on logarithmic scales, with the dense line."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 6), layout="constrained")
    axes = picture.add_subplot()
    for method in dict.fromkeys(row["method"] for row in result["summary"]):
        rows = sorted((row for row in result["summary"] if row["method"] == method), key=lambda row: row["sparsity"])
        errors = [100 * (1 - row["test_acc_mean"]) for row in rows]
        if method == "dense":
            axes.axhline(errors[0], color="black", linestyle="--", label=f"dense: {errors[0]:.2f} %")
            continue
        spreads = [100 * (row["test_acc_std"] or 0) for row in rows]
        places, wide = [1 / (1 - row["sparsity"]) for row in rows], 3 if method == "HyperSparse" else 1.5
        axes.errorbar(places, errors, spreads, marker="o", markersize=4, capsize=3, label=method, linewidth=wide)
    sparsities = sorted({row["sparsity"] for row in result["summary"] if row["method"] != "dense"})
    axes.set(xscale="log", yscale="log", xlabel="zeros", ylabel="test error, %")
    axes.set_xticks([1 / (1 - sparsity) for sparsity in sparsities], [f"{100 * each:g} %" for each in sparsities])
    low, high = axes.get_ylim()
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 30, 50, 80) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", help="a folder of parquet files; downloaded if not given")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each on a CPU")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    options = parser.parse_args()
    cases = [("dense", 0.0), *((method, s) for s in options.sparsities for method in options.methods)]
    path = RESULTS / f"extreme_{options.setting}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    known = {(row["method"], row["sparsity"], row["seed"]) for row in rows}
    missing = [(*case, seed) for seed in options.seeds for case in cases if (*case, seed) not in known]
    epochs = SETTINGS[options.setting].epochs
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(run, options.setting, each, epochs, options.data, options.accelerator) for each in missing]
        for done in track(as_completed(runs), total=len(runs), description=options.setting):
            rows.append(done.result())
            save(path, options.setting, rows)
    result = save(path, options.setting, rows)
    figure(result, path.with_suffix(".png"))
    print(table(result))


def save(path: Path, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    order = ["dense", *METHODS]
    rows.sort(key=lambda row: (order.index(row["method"]), row["sparsity"], row["seed"]))
    setting = SETTINGS[name]
    about = {"setting": name, "epochs": setting.epochs, "rate": RATE, "penalty": setting.penalty,
             "fine_tune": setting.fine_tune, "prunings": setting.prunings, "torch": torch.__version__}  # fmt: skip
    result = {**about, "summary": summary(rows), "runs": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
