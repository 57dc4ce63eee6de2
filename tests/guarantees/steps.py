"""The training step: optimizers, accumulation, clipping, mixed precision, NaN."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from tests.guarantees.columns import SPARSITY, Column
from tests.guarantees.runs import STEPS, Batches, NotHere, Task, Watch, fit, right, same, task
from tests.nets import Batch, MakeOptimizer, trainer


def optimizer(make: MakeOptimizer) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        model = task(make)
        watch = Watch(column, states=True)
        trainer(*column.callbacks(model), watch).fit(model, Batches())
        assert column.took(watch.steps, STEPS)
        right(column, model, SPARSITY)

    return check


def capturable(column: Column, folder: Path) -> None:
    if not torch.cuda.is_available():
        raise NotHere("capturable optimizers need a GPU")
    fit(column, task(lambda p: torch.optim.AdamW(p, lr=1e-2, capturable=True)), accelerator="gpu", devices=1)


def setting(**settings: Any) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        fit(column, None, **settings)

    return check


class Overflow(Task):
    """A loss that overflows in one step, so that a scaler skips it."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.loss(batch) * (math.inf if self.trainer.fit_loop.total_batch_idx == self.at else 1.0)


class Skips(pl.Callback):
    """Sees that the skipped step left weights and masks as they were."""

    def __init__(self, column: Column, at: int) -> None:
        self.column, self.at, self.seen = column, at, False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before = copy.deepcopy((pl_module.state_dict(), self.column.masks(pl_module)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.at:
            self.seen = True
            assert same(self.before[0], pl_module.state_dict()), "the skipped step changed the model"
            assert same(self.before[1], self.column.masks(pl_module)), "the skipped step changed the masks"


def fp16(at: int) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        pl.seed_everything(0, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        skips = Skips(column, at)
        # The steps that the optimizer really takes are one fewer than Lightning counts, so the watch stays away.
        fit(
            column, Overflow(at), skips, watch=False,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        )  # fmt: skip
        assert skips.seen

    return check


class Poisoned(Task):
    """A NaN in the gradients of the third step, which the user skips, as a scaler would."""

    def __init__(self, column: Column) -> None:
        super().__init__()
        self.column, self.poisoned, self.skipped = column, False, False

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = {name: mask.clone() for name, mask in self.column.masks(self).items()}

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 2 and self.head.bias.grad is not None:
            self.head.bias.grad[0] = math.nan
            self.poisoned = True

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.poisoned and not self.skipped:
            self.skipped = True
            assert same(self.before, self.column.masks(self)), "the masks were renewed"
            optimizer.zero_grad()


def nan_skipped(column: Column, folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    model = Poisoned(column)
    fit(column, model, watch=False)
    assert model.skipped


def nan_gradient(column: Column, folder: Path) -> None:
    class Poisoned(Task):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 16:
                for name, weight in column.parameters(self).items():
                    assert weight.grad is not None
                    weight.grad[~column.masks(self)[name]] = math.nan

    fit(column, task(kind=Poisoned))


def clipped_nan(column: Column, folder: Path) -> None:
    class Poisoned(Task):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 17 and self.head.bias.grad is not None:
                self.head.bias.grad[0] = math.nan

    fit(column, task(kind=Poisoned), gradient_clip_val=0.5)
