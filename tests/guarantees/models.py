"""Models: averaged, with several optimizers, with tied, frozen and compiled parts."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn

from tests.guarantees.columns import SPARSITY, Column, Ours
from tests.guarantees.runs import Batches, Task, Watch, fit, right, sgd, start, task
from tests.nets import Batch, MakeOptimizer


def ema(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, EMAWeightAveraging(decay=0.9), watch=False)
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


def swa(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, StochasticWeightAveraging(0.01, 0.4, device=None), watch=False, epochs=5)
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


class Manual(Task):
    """Manual optimization with two optimizers, one of which steps every other time."""

    def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        body = [*self.one.parameters(), *self.norm.parameters(), *self.two.parameters()]
        return [sgd(body), torch.optim.Adam(self.head.parameters(), weight_decay=0.1)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        body, head = self.optimizers()  # type: ignore[attr-defined]  # a list of two
        for each in (body, head):
            each.zero_grad()
        self.manual_backward(self.loss(batch))
        body.step()
        if batch_idx % 2 == 0:
            head.step()


class WatchZeros(Watch):
    """The checks of `Watch`, where Lightning's count of steps adds several optimizers up."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps = trainer.global_step - 1
        super().on_train_batch_end(trainer, pl_module)


def two_optimizers(column: Column, folder: Path) -> None:
    model = task(kind=Manual)
    runner, _ = start(column, model, WatchZeros(column), watch=False)
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


def manual(column: Column, folder: Path) -> None:
    class One(Manual):
        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    fit(column, task(kind=One))


def tied(column: Column, folder: Path) -> None:
    class Tied(Task):
        def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
            super().__init__(make_optimizer)
            self.embedding = nn.Embedding(16, 32)
            self.decoder = nn.Linear(32, 16, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            tokens = (x[:, :4].abs() * 8).long() % 16
            hidden = self.embedding(tokens).mean(1)
            logits: Tensor = super().forward(hidden) + self.decoder(hidden)[:, :4]
            return logits

    if isinstance(column, Ours):
        # A tie is one weight under its first name; an embedding is left alone unless it is named.
        column.method.sparsifier.targets.include = ["*", "embedding.weight"]

    class BothPruned(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 2:
                [mask] = [m for n, m in column.masks(model).items() if n in ("embedding.weight", "decoder.weight")]
                assert not model.embedding.weight[~mask].any(), "the head is pruned, the embedding it is tied to is not"

    pl.seed_everything(0, verbose=False)
    model = Tied()
    runner, _ = start(column, model, BothPruned())
    runner.fit(model, Batches())
    right(column, model, SPARSITY)
    column.finish(model)
    assert model.embedding.weight is model.decoder.weight, "the embedding and the head are no longer tied"


def frozen(column: Column, folder: Path) -> None:
    class Frozen(Task):
        def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
            super().__init__(make_optimizer)
            self.two.requires_grad_(False)
            self.unused = nn.Linear(16, 8)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                for weight in self.parameters():
                    weight.requires_grad_(True)

    fit(column, task(kind=Frozen))


def compiled(column: Column, folder: Path) -> None:
    class Compiled(Task):
        def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
            super().__init__(make_optimizer)
            self.one = torch.compile(self.one, backend="eager")  # type: ignore[assignment]  # a module all the same

    fit(column, task(kind=Compiled))
