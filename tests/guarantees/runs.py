"""What all situations share: a small task, its batches, a watch that checks every step, and how a run is started."""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.guarantees.columns import SPARSITY, Column, Named, column, kept
from tests.nets import Batch, MakeOptimizer, trainer

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "tests.guarantees.distributed", "tests.guarantees.killed"])
STEPS = 18  # three epochs of six batches


class NotHere(Exception):
    """The situation cannot be made on this machine, or means nothing for this column; the message says why."""


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)


class Task(pl.LightningModule):
    """Three linear layers, 1,216 weights, of which 304 are to stay."""

    def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
        super().__init__()
        self.one, self.norm, self.two, self.head = (
            nn.Linear(32, 24),
            nn.LayerNorm(24),
            nn.Linear(24, 16),
            nn.Linear(16, 4),
        )
        self.make_optimizer, self.lr = make_optimizer, 0.05

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.two(torch.relu(self.norm(self.one(x))))))
        return result

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Batches:
    """Six batches, always the same."""

    def __init__(self, count: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(8, 32, generator=generator), torch.randint(0, 4, (8,), generator=generator))
            for _ in range(count)
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Watch(pl.Callback):
    """Checks after every real step: the count to the weight, pruned weights and, if asked, their optimizer state."""

    def __init__(self, column: Column, seen: int = 0, states: bool = False, asked: float | None = None) -> None:
        self.column, self.steps, self.states, self.asked = column, seen, states, asked

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps += 1
        assert trainer.global_step == self.steps
        right(self.column, pl_module, self.column.asked() if self.asked is None else self.asked)
        for name, weight in self.column.parameters(pl_module).items() if self.states_are_zero() else ():
            for optimizer in trainer.optimizers:
                for key, state in optimizer.state.get(weight, {}).items():
                    if isinstance(state, Tensor) and state.shape == weight.shape:
                        pruned = state[~self.column.masks(pl_module)[name]]
                        assert not pruned.any(), f"{key} of pruned weights is not zero (step {self.steps})"

    def states_are_zero(self) -> bool:
        return self.states and not self.column.keeps_state


def right(column: Column, model: nn.Module, sparsity: float) -> None:
    """The sparsity is exact, by the masks and by the weights, and what is pruned is zero."""
    masks, weights = column.masks(model), column.weights(model)
    if sparsity == 0:
        return
    total = sum(mask.numel() for mask in masks.values())
    assert masks, "there are no masks"
    assert kept(masks) == round((1 - sparsity) * total), f"{kept(masks)} of {total} kept, {1 - sparsity:.3f} asked for"
    for name, mask in masks.items():
        assert not weights[name][~mask].any(), f"pruned weights of {name} are not zero"


def task(make: MakeOptimizer = sgd, kind: type[Task] = Task, seed: int = 0) -> Task:
    pl.seed_everything(seed, verbose=False)
    return kind(make)


def fit(column: Column, model: Task | None = None, *more: pl.Callback, watch: bool = True, **settings: Any) -> Task:
    """Trains three epochs (or what the settings say), watched, and checks the end."""
    model = model or task()
    runner, seen = start(column, model, *more, watch=watch, **settings)
    runner.fit(model, Batches())
    assert seen is None or seen.steps == runner.global_step > 0
    right(column, model, SPARSITY)
    return model


def start(
    column: Column, model: Task, *more: pl.Callback, watch: bool = True, seen: int = 0, **settings: Any
) -> tuple[pl.Trainer, Watch | None]:
    watching = Watch(column, seen) if watch else None
    extra = [watching] if watching else []
    return trainer(*column.callbacks(model), *more, *extra, **settings), watching


def same(one: Named, other: Named) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Forked:
    """A process of its own for a function of a module, forked from one that has already imported everything."""

    def __init__(self, log: Path, function: Callable[..., object], *arguments: object, **environment: str) -> None:
        self.log = log
        self.process = FORKS.Process(target=_child, args=(log, environment, function, *arguments))
        self.process.start()

    def status(self) -> int:
        """The exit status, that of a killed process negative."""
        self.process.join(300)
        if self.process.exitcode is None:
            self.process.kill()
            raise RuntimeError(f"still running after 300 s: {self.last_line()}")
        return self.process.exitcode

    def last_line(self) -> str:
        """The last line that it wrote."""
        lines = self.log.read_text().strip().splitlines() if self.log.exists() else []
        return lines[-1] if lines else f"status {self.process.exitcode}"


def _child(log: Path, environment: dict[str, str], function: Callable[..., object], *arguments: object) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in ("PL_GLOBAL_SEED", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    function(*arguments)


def afresh(column_: Column) -> Column:
    return column(column_.name)
