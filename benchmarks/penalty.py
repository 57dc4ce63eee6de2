"""What regularisation by HyperSparse costs: a training step with it over the same step without.

    python -m benchmarks.penalty

The steps take turns in one process, so that all see the same machine: plain; ours, whose scale is renewed every 50
steps (the mean over 50, so that a renewal is in it); ours with the scale renewed at every step; and the published
loss by autograd, which sorts all weights at every step, as its authors write it. SGD with momentum, one thread.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparsity import Horizon, models
from sparsity.adaptive import Adaptive, Phases
from sparsity.penalties import HyperSparsity

RESULTS = Path(__file__).parent / "results"
SPARSITY, EVERY = 0.98, 50
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet-300-100, batch 128": (models.LeNet300100, (128, 1, 28, 28)),
    "WRN-10-1, batch 128": (lambda: models.WideResNet(10, 1), (128, 3, 32, 32)),
    "ResNet-20, batch 64": (models.ResNet20, (64, 3, 32, 32)),
    "VGG-16, batch 32": (models.VGG16, (32, 3, 32, 32)),
}


def published(weights: list[Tensor], sparsity: float, strength: float) -> Tensor:
    """The loss as its authors write it: one vector, a sort, s and A held constant."""
    magnitudes = torch.cat([weight.flatten() for weight in weights]).abs()
    ordered, _ = magnitudes.detach().sort()
    scale = 0.6585 / ordered[math.floor(sparsity * len(ordered))]
    bounded = torch.tanh(scale * magnitudes).sum()
    return strength * (magnitudes.sum() * bounded / bounded.detach() - magnitudes.sum())


class Run:
    """A network in training, with or without a penalty."""

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...], kind: str) -> None:
        torch.manual_seed(0)
        self.model, self.kind = make(), kind
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        self.images, self.labels = torch.randn(shape), torch.randint(0, 10, shape[:1])
        self.sparsifier: Adaptive | None = None
        if kind.startswith("ours"):
            penalty = HyperSparsity(every=1 if "every" in kind else EVERY)
            self.sparsifier = Adaptive(SPARSITY, penalty, Phases(0.0, 0.1, 0))
            self.sparsifier.attach(self.model, self.optimizer, horizon=Horizon(10_000, 1_000))
        self.targets: list[Tensor] = [each for each in self.model.parameters() if each.ndim > 1]

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(self.model(self.images), self.labels)
        if self.kind == "published":
            loss = loss + published(self.targets, SPARSITY, 5e-6)
        loss.backward()
        if self.sparsifier:
            self.sparsifier.update(0)
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - start) / steps


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], turns: int) -> dict[str, float]:
    """The plain step in milliseconds, and the others over it."""
    kinds = ("plain", "ours", "ours, every step", "published")
    runs = {kind: Run(make, shape, kind) for kind in kinds}
    for each in runs.values():
        each.seconds(2)
    steps = {kind: 5 if kind == "published" else EVERY for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(turns):
        for kind, each in runs.items():
            times[kind].append(each.seconds(steps[kind]))
    plain = statistics.median(times["plain"])
    result = {"plain_ms": 1000 * plain}
    # Ratios of neighbours, so that a machine that slows down slows both.
    for kind in kinds[1:]:
        result[kind] = statistics.median(a / b for a, b in zip(times[kind], times["plain"], strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(make, shape, options.turns) for name, (make, shape) in NETWORKS.items()}
    (RESULTS / "penalty.json").write_text(json.dumps({"torch": torch.__version__, "ratios": rows}, indent=1) + "\n")
    table = Table("network", "plain step", "ours", "ours, scale renewed every step", "published, by autograd")
    for name, row in rows.items():
        ratios = [f"{row[kind]:.2f}" for kind in ("ours", "ours, every step", "published")]
        table.add_row(name, f"{row['plain_ms']:.1f} ms", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
