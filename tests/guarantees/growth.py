"""Growth: where newly grown weights start, and which gradients they are grown by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsity.dynamic import Dynamic
from sparsity.scores import Gradient
from tests.guarantees.columns import Column, Ours
from tests.guarantees.runs import NotHere, Task, fit
from tests.nets import Batch, MakeOptimizer


def grows(column: Column) -> Dynamic:
    """The column's sparsifier, if it grows weights."""
    if isinstance(column, Ours) and isinstance(column.method.sparsifier, Dynamic):
        return column.method.sparsifier
    raise NotHere("grows no weights")


class Grown(Task):
    """Sees, between an update and the optimizer's step, that newly grown weights and their state are zero."""

    def __init__(self, make_optimizer: MakeOptimizer, sparsifier: Dynamic) -> None:
        super().__init__(make_optimizer)
        self.sparsifier, self.count = sparsifier, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self.sparsifier.masks

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        for name, weight in self.sparsifier.weights().items():
            grown = self.sparsifier.masks[name] & ~self.before[name]
            self.count += int(grown.count_nonzero())
            assert not weight[grown].any(), f"newly grown weights of {name} are not zero"
            for key, state in optimizer.state.get(weight, {}).items():
                if isinstance(state, Tensor) and state.shape == weight.shape:
                    assert not state[grown].any(), f"{key} of newly grown weights of {name} is not zero"


def grown_start_at_zero(make: MakeOptimizer) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        pl.seed_everything(0, verbose=False)
        model = Grown(make, grows(column))
        fit(column, model)
        assert model.count > 100, f"only {model.count} weights were grown"

    return check


class Window(Task):
    """Adds up the gradients of an accumulation window by itself, micro-batch by micro-batch."""

    def __init__(self, column: Column) -> None:
        super().__init__()
        self.column, self.total, self.looked = column, {}, 0  # type: ignore[var-annotated]  # a dictionary of tensors

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        found = torch.autograd.grad(self.loss(batch) / 3, [*self.column.parameters(self).values()])
        for name, gradient in zip(self.column.masks(self), found, strict=True):
            self.total[name] = self.total.get(name, 0) + gradient
        self.before = self.column.masks(self)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        for name, mask in self.column.masks(self).items():
            grown, free = mask & ~self.before[name], ~mask
            if grown.any() and type(grows(self.column).regrowth.grow) is Gradient:
                self.looked += 1
                size = self.total[name].abs()
                assert size[grown].min() >= size[free].max() - 1e-7, (
                    f"{name} grew by another gradient than the window's"
                )
        self.total = {}


def window(column: Column, folder: Path) -> None:
    rule = grows(column).regrowth.grow
    pl.seed_everything(0, verbose=False)
    model = Window(column)
    fit(column, model, accumulate_grad_batches=3)
    assert model.looked > 3 or type(rule) is not Gradient
