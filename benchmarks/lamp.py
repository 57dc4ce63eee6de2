"""LAMP against global, uniform, uniform+ and ERK: accuracy after each round of iterative pruning, and the figure.

    python -m benchmarks.lamp mnist --data data/mnist
    python -m benchmarks.lamp cifar10 --data data/cifar10

The protocol of Lee et al. (arXiv 2010.07611) at a size for two CPU cores: train a dense network, then in each round
prune 20 % of the remaining weights and train on with a new optimizer. One dense network per seed is the start of all
methods, and rounds have the same batches in all of them. `dense` is the same network trained on for as long, unpruned.
The test set is read once per network, after its training; nothing is selected by it.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from callbacks import OneShot
from sparsity import data, masks, models
from sparsity.data.images import Images
from sparsity.distributions import ERK, Distribution, Global, LayerAdaptive, Uniform, UniformPlus
from sparsity.scores import Magnitude, Score

RESULTS = Path(__file__).parent / "results"
ROUNDS = 18  # 0.8^18 = 1.8 % of the weights
METHODS: dict[str, tuple[Score, Distribution]] = {
    "LAMP": (Magnitude(), LayerAdaptive()),
    "global": (Magnitude(), Global()),
    "uniform": (Magnitude(), Uniform()),
    "uniform+": (Magnitude(), UniformPlus()),
    "ERK": (Magnitude(), ERK()),
}


class Setting:
    """A network, its data, and how many steps it trains before pruning and after each round."""

    def __init__(
        self, network: Callable[[], torch.nn.Module], images: Callable[[str | None], Images], first: int, each: int
    ) -> None:
        self.network, self.images, self.first, self.each = network, images, first, each


def wide_resnet() -> torch.nn.Module:
    return models.WideResNet(10, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # a layout


SETTINGS = {
    "mnist": Setting(models.LeNet300100, lambda folder: data.MNIST(batch_size=128, data_dir=folder), 4220, 1266),
    "cifar10": Setting(wide_resnet, lambda folder: data.CIFAR10(batch_size=128, data_dir=folder), 1408, 120),
}
TITLES = {"mnist": "LeNet-300-100 on MNIST", "cifar10": "WRN-10-1 on CIFAR-10"}
CLOSE_UPS = {"mnist": 0.97, "cifar10": 0.55}  # from where the second panel of the figure shows the accuracy


class Trained(models.Classifier):
    """The classifier with the paper's optimizer, AdamW without a schedule, at a rate for short training."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(model: pl.LightningModule, images: Images, steps: int, *callbacks: pl.Callback) -> float:
    """Trains for some steps with a new optimizer; the test accuracy afterwards."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    runner = pl.Trainer(max_steps=steps, limit_val_batches=0, accelerator="cpu", callbacks=list(callbacks), **quiet)
    runner.fit(model, images)
    [result] = runner.test(model, images, verbose=False)
    return result["test/acc"]


def run(name: str, method: str, seed: int, folder: str | None) -> list[dict[str, Any]]:
    """One curve: the network after dense training (round 0) and after each round."""
    torch.set_num_threads(1)
    setting = SETTINGS[name]
    images = setting.images(folder)
    pl.seed_everything(seed, verbose=False)
    model = Trained(setting.network())
    curve = [row(model, method, seed, 0, train(model, images, setting.first), {})]
    for number in range(1, ROUNDS + 1):
        pl.seed_everything(1000 * seed + number, verbose=False)
        pruning, found = [], {}
        if method != "dense":
            score, distribution = copy.deepcopy(METHODS[method])
            pruning = [OneShot(1 - 0.8**number, score=score, distribution=distribution)]
        accuracy = train(model, images, setting.each, *pruning)
        if pruning:
            found = pruning[0].sparsifier.masks
        curve.append(row(model, method, seed, number, accuracy, found))
    return curve


def row(
    model: pl.LightningModule, method: str, seed: int, number: int, accuracy: float, found: dict[str, Tensor]
) -> dict[str, Any]:
    layers = {layer: round(float(mask.float().mean()), 6) for layer, mask in found.items()}
    return {"method": method, "seed": seed, "round": number, "density": masks.density(found), "test_acc": accuracy,
            "layers": layers}  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method at each round."""
    result = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for number in range(ROUNDS + 1):
            mine = [row for row in rows if (row["method"], row["round"]) == (method, number)]
            accuracies = [row["test_acc"] for row in mine]
            result.append({
                "method": method, "round": number, "density": mine[0]["density"], "seeds": len(mine),
                "test_acc_mean": statistics.mean(accuracies),
                "test_acc_std": statistics.stdev(accuracies) if len(mine) > 1 else None,
            })  # fmt: skip
    return result


def figure(result: dict[str, Any], low: float) -> Figure:
    """Accuracy over density, one line per method, all of it and close to the top; bands are a standard deviation."""
    picture = Figure(figsize=(11, 4.5), layout="constrained")
    whole, close = picture.subplots(1, 2)
    for axes in (whole, close):
        for method in dict.fromkeys(point["method"] for point in result["summary"]):
            points = [point for point in result["summary"] if point["method"] == method]
            densities = [0.8 ** point["round"] for point in points]
            means = torch.tensor([point["test_acc_mean"] for point in points])
            spread = torch.tensor([point["test_acc_std"] or 0.0 for point in points])
            style: dict[str, Any] = {"color": "black", "linestyle": "--"} if method == "dense" else {}
            [line] = axes.plot(densities, means, label=method, **style)
            color = line.get_color()
            axes.fill_between(densities, means - spread, means + spread, alpha=0.15, color=color, linewidth=0)
        axes.set(xscale="log", xlabel="density (fraction of weights kept)", ylabel="test accuracy")
        axes.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02], labels=["1", "0.5", "0.2", "0.1", "0.05", "0.02"])
        axes.invert_xaxis()
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    best = max(point["test_acc_mean"] for point in result["summary"])
    close.set(ylim=(low, best + (best - low) / 10))
    whole.legend()
    picture.suptitle(result["title"])
    return picture


def table(result: dict[str, Any]) -> str:
    """Test accuracy in percent at some densities, in Markdown."""
    rounds = [0, 5, 8, 10, 12, 14, 16, 18]
    lines = ["| density | " + " | ".join(f"{0.8**number:.3f}" for number in rounds) + " |", "|---" * 9 + "|"]
    for method in dict.fromkeys(point["method"] for point in result["summary"]):
        points = {point["round"]: point for point in result["summary"] if point["method"] == method}
        cells = [f"{100 * points[n]['test_acc_mean']:.2f} ± {100 * points[n]['test_acc_std']:.2f}" for n in rounds]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", help="a folder of parquet files; downloaded if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--figure", action="store_true", help="train nothing, draw the figure from the JSON")
    options = parser.parse_args()
    path = RESULTS / f"lamp_{options.setting}.json"
    if not options.figure:
        path.write_text(
            json.dumps(measure(options.setting, options.seeds, options.data, options.jobs), indent=1) + "\n"
        )
    result = json.loads(path.read_text())
    figure(result, CLOSE_UPS[options.setting]).savefig(path.with_suffix(".png"), dpi=120)
    print(table(result))


def measure(name: str, seeds: list[int], folder: str | None, jobs: int) -> dict[str, Any]:
    """All methods and seeds, and their summary."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs) as pool:
        runs = [pool.submit(run, name, method, seed, folder) for seed in seeds for method in ("dense", *METHODS)]
        for done in track(as_completed(runs), total=len(runs), description=name):
            rows += done.result()
    order = ["dense", *METHODS]
    rows.sort(key=lambda row: (order.index(row["method"]), row["seed"], row["round"]))
    setting = SETTINGS[name]
    return {
        "title": f"{TITLES[name]}: rounds of 20 %, {len(seeds)} seeds",
        "steps": {"dense": setting.first, "each round": setting.each, "batch": 128}, "torch": torch.__version__,
        "summary": summary(rows), "runs": rows,
    }  # fmt: skip


if __name__ == "__main__":
    main()
