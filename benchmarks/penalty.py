"""What regularisation by HyperSparse costs: a training step with it over the same step without.

    python -m benchmarks.penalty

The steps take turns in one process, so that all see the same machine: plain; ours between two renewals of the scale, to
which a fiftieth of a measured renewal is added, as it is renewed every 50 steps; and the published loss by autograd,
which sorts all weights at every step, as its authors write it. SGD with momentum, one thread.
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
SPARSITY, EVERY, STEPS = 0.98, 50, 4
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
        self.penalty = HyperSparsity(every=10**9)
        if kind == "ours":
            self.sparsifier = Adaptive(SPARSITY, self.penalty, Phases(0.0, 0.1, 0))
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

    def seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        return (time.perf_counter() - start) / STEPS

    def renewal(self) -> float:
        """Seconds that the scale and the sums take."""
        assert self.sparsifier is not None
        self.penalty.begin()
        start = time.perf_counter()
        self.penalty.prepare(self.sparsifier.weights(), SPARSITY)
        return time.perf_counter() - start


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], turns: int) -> dict[str, float]:
    """The plain step and the renewal in milliseconds, and the other steps over the plain one."""
    kinds = ("plain", "ours", "published")
    runs = {kind: Run(make, shape, kind) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    renewals = []
    for turn in range(turns + 1):
        found = {kind: each.seconds() for kind, each in runs.items()}
        renewals.append(runs["ours"].renewal())
        for kind, seconds in found.items() if turn else ():  # the first one warms up
            times[kind].append(seconds)
    plain, renewal = statistics.median(times["plain"]), statistics.median(renewals)
    # Ratios of neighbours, so that a machine that slows down slows both.
    ratios = {
        kind: statistics.median(one / other for one, other in zip(times[kind], times["plain"], strict=True))
        for kind in kinds
    }
    return {
        "plain_ms": 1000 * plain, "renewal_ms": 1000 * renewal, "published": ratios["published"],
        "ours": ratios["ours"] + renewal / EVERY / plain, "ours, every step": ratios["ours"] + renewal / plain,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
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
