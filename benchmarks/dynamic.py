"""Dynamic sparse training against static masks and the dense network, in the literature's protocols.

    python -m benchmarks.dynamic lenet300 --data data/mnist
    python -m benchmarks.dynamic lenet5 --data data/mnist --epochs 6
    python -m benchmarks.dynamic wrn10 --data data/cifar10

`lenet300` and `lenet5` are the MNIST runs of Dettmers & Zettlemoyer (arXiv 1907.04840): 100 epochs, batches of 100,
SGD with Nesterov momentum at 0.1, a tenth after every 25,000 steps. `wrn22` is RigL's CIFAR-10 protocol (Evci et al.,
arXiv 1911.11134: 250 epochs, batches of 128), `wrn28` that of sparse momentum; both want a GPU. `wrn10` is RigL's at a
size for two CPU cores. A tenth of the training images is held out (`val_acc`); the test set is read once per network,
after its training, and nothing is chosen by it. Results are kept as they come; a call that is repeated runs what is
missing.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import track
from torch import Tensor, nn

from callbacks import SET, GraNet, RigL, SparseMomentum, Sparsify, StaticMask
from sparsity import data, models
from sparsity.data.images import Images
from sparsity.distributions import ERK, Uniform
from sparsity.schedules import CosineDrop

RESULTS = Path(__file__).parent / "results"


class Setting:
    """A network, its data, its protocol, and what is trained with it.

    `milestones` are where the learning rate falls by `gamma`, as parts of training; `densities` are of kept weights.
    """

    def __init__(
        self, network: Callable[[], nn.Module], images: Callable[[str | None], Images], epochs: int,
        milestones: tuple[float, ...], gamma: float, methods: tuple[str, ...], densities: tuple[float, ...],
        rate: float = 0.1,
    ) -> None:  # fmt: skip
        self.rate = rate
        self.network, self.images, self.epochs = network, images, epochs
        self.milestones, self.gamma, self.methods, self.densities = milestones, gamma, methods, densities


def mnist(folder: str | None) -> Images:
    return data.MNIST(folder, batch_size=100)


def cifar10(folder: str | None) -> Images:
    return data.CIFAR10(folder, batch_size=128)


def wide(depth: int, width: int, dropout: float = 0.0) -> Callable[[], nn.Module]:
    return lambda: models.WideResNet(depth, width, dropout=dropout).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a layout


def lenet5() -> nn.Module:
    return models.LeNet5(rectify=True).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # a layout


STEPS = (25 / 54, 50 / 54)  # 25,000 and 50,000 of 54,000 steps
THIRDS = (30_000 / 97_656, 60_000 / 97_656, 90_000 / 97_656)
SETTINGS = {
    "lenet300": Setting(models.LeNet300100, mnist, 100, STEPS, 0.1, ("static", "SET", "RigL", "momentum"),
                        (0.1, 0.05, 0.02, 0.01)),
    "lenet5": Setting(lenet5, mnist, 100, STEPS, 0.1, ("momentum, ERK",), (0.05, 0.01), rate=0.03),
    "wrn10": Setting(wide(10, 1), cifar10, 10, THIRDS, 0.2, ("static", "SET", "RigL", "GraNet", "momentum"), (0.1,)),
    "wrn22": Setting(wide(22, 2), cifar10, 250, THIRDS, 0.2, ("static", "SET", "RigL", "GraNet"),
                     (0.5, 0.2, 0.1, 0.05)),
    "wrn28": Setting(wide(28, 2, 0.3), cifar10, 250, (1 / 3, 2 / 3), 0.1, ("static", "SET", "momentum"),
                     (0.1, 0.2, 0.5)),
}  # fmt: skip
METHODS: dict[str, Callable[[float], Sparsify]] = {
    "static": StaticMask,
    "SET": SET,
    "RigL": RigL,
    "GraNet": GraNet,
    "momentum": SparseMomentum,
    "static, uniform": lambda sparsity: StaticMask(sparsity, Uniform()),
    "momentum, ERK": lambda sparsity: SparseMomentum(sparsity, distribution=ERK()),
    "momentum, 0.2": lambda sparsity: SparseMomentum(sparsity, CosineDrop(0.2, "1ep", 1.0, 0.005)),
}


class Trained(pl.LightningModule):
    """Cross entropy, SGD with Nesterov momentum, and a learning rate that falls in steps."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.net, self.setting = setting.network(), setting

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._measure("val_acc", batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._measure("test_acc", batch)

    def _measure(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log(name, right, on_epoch=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.setting.rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        steps = int(self.trainer.estimated_stepping_batches)
        milestones = [round(part * steps) for part in self.setting.milestones]
        falling = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, self.setting.gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


Case = tuple[str, float, int]


def run(name: str, case: Case, epochs: int, rate: float, folder: str | None, accelerator: str) -> dict[str, Any]:
    """One network, trained and tested."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if accelerator == "cpu":
        torch.set_num_threads(1)
    setting, (method, density, seed) = SETTINGS[name], case
    setting.rate = rate
    pl.seed_everything(seed, verbose=False)
    model, images = Trained(setting), setting.images(folder)
    sparse = None if method == "dense" else METHODS[method](round(1 - density, 6))
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    runner = pl.Trainer(
        max_epochs=epochs, limit_val_batches=0, accelerator=accelerator, devices=1,
        callbacks=[sparse] if sparse else [], **quiet,
    )  # fmt: skip
    start = time.perf_counter()
    runner.fit(model, images)
    seconds = time.perf_counter() - start
    steps = runner.global_step
    runner.limit_val_batches = 1.0
    [held_out], [tested] = (look(model, images, verbose=False) for look in (runner.validate, runner.test))
    row = {"method": method, "density": density, "seed": seed, "steps": steps, "seconds": round(seconds, 1)}
    row |= {name: round(value, 6) for name, value in {**held_out, **tested}.items()}
    if sparse:
        found = sparse.sparsifier
        row |= {
            "kept": found.density(), "explored": found.explored(), "dead": found.history.last()["dead"],
            "layers": {layer: round(float(mask.float().mean()), 6) for layer, mask in found.masks.items()},
        }  # fmt: skip
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method at each density."""
    result = []
    for method, density in dict.fromkeys((row["method"], row["density"]) for row in rows):
        accuracies = [row["test_acc"] for row in rows if (row["method"], row["density"]) == (method, density)]
        result.append({
            "method": method, "density": density, "seeds": len(accuracies),
            "test_acc_mean": statistics.mean(accuracies),
            "test_acc_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        })  # fmt: skip
    return result


def table(result: dict[str, Any]) -> str:
    """Test accuracy in percent, methods by densities, in Markdown; dense stands in all columns."""
    densities = sorted({row["density"] for row in result["summary"] if row["method"] != "dense"}, reverse=True)
    lines = ["| weights kept | " + " | ".join(f"{100 * density:g} %" for density in densities) + " |"]
    lines.append("|---" * (len(densities) + 1) + "|")
    for method in dict.fromkeys(row["method"] for row in result["summary"]):
        found = {row["density"]: row for row in result["summary"] if row["method"] == method}
        cells = [found.get(1.0 if method == "dense" else density) for density in densities]
        lines.append(f"| {method} | " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = "one seed" if row["test_acc_std"] is None else f"± {100 * row['test_acc_std']:.2f}"
    return f"{100 * row['test_acc_mean']:.2f} {spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", help="a folder of parquet files; downloaded if not given")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="those of the setting if not given")
    parser.add_argument("--densities", nargs="+", type=float, help="those of the setting if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="those of the setting if not given; a file of its own")
    parser.add_argument("--rate", type=float, help="the learning rate, that of the setting if not given")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each on a CPU")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    cases = [("dense", 1.0)] + [
        (method, density)
        for density in options.densities or setting.densities
        for method in options.methods or setting.methods
    ]
    options.epochs = options.epochs or setting.epochs
    options.rate = options.rate or setting.rate
    suffix = "" if options.epochs == setting.epochs else f"_{options.epochs}_epochs"
    suffix += "" if options.rate == setting.rate else f"_rate_{options.rate:g}"
    path = RESULTS / f"dynamic_{options.setting}{suffix}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    known = {(row["method"], row["density"], row["seed"]) for row in rows}
    missing = [(*case, seed) for seed in options.seeds for case in cases if (*case, seed) not in known]
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = [
            pool.submit(run, options.setting, each, options.epochs, options.rate, options.data, options.accelerator)
            for each in missing
        ]
        for done in track(as_completed(runs), total=len(runs), description=options.setting):
            rows.append(done.result())
            save(path, options, rows)
    print(table(json.loads(path.read_text())))


def save(path: Path, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    order = ["dense", *METHODS]
    rows.sort(key=lambda row: (order.index(row["method"]), -row["density"], row["seed"]))
    about = {"setting": options.setting, "epochs": options.epochs, "rate": options.rate, "torch": torch.__version__}
    path.write_text(json.dumps({**about, "summary": summary(rows), "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
