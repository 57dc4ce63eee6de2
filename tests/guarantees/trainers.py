"""Trainers: what they do besides training, and with several processes."""

import copy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks import Sparsify
from tests.guarantees import distributed
from tests.guarantees.columns import SPARSITY, Column
from tests.guarantees.runs import Batches, Forked, Watch, right, same, sgd, start, task
from tests.nets import Batch, trainer


def lr_finder(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, watch=False, default_root_dir=folder)
    before = copy.deepcopy(model.state_dict())
    Tuner(runner).lr_find(model, Batches(20), num_training=15)
    assert same(before, model.state_dict()), "the learning rate finder left its traces in the model"
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


def second_fit(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model)
    runner.fit(model, Batches())
    callbacks: list[pl.Callback] = runner.callbacks  # type: ignore[attr-defined]  # set by a connector
    kinds = (Sparsify, ModelPruning)
    again = trainer(*(each for each in callbacks if isinstance(each, kinds)), Watch(column, asked=SPARSITY))
    again.fit(model, Batches())
    right(column, model, SPARSITY)


def lightning_pytorch(column: Column, folder: Path) -> None:
    class Modern(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(32, 24), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.two(torch.relu(self.one(x)))
            return logits

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return sgd(self.parameters())

    if column.name == "ModelPruning":
        from lightning.pytorch.callbacks import ModelPruning as Modern_

        callbacks: list[Any] = [
            Modern_("l1_unstructured", amount=SPARSITY, apply_pruning=lambda epoch: epoch == 0,
                    parameter_names=["weight"], use_lottery_ticket_hypothesis=False)
        ]  # fmt: skip
    model = Modern()
    if column.name != "ModelPruning":
        callbacks = column.callbacks(model)  # type: ignore[arg-type]  # the same class under its other name
    runner = lightning.pytorch.Trainer(
        max_epochs=3, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


def processes(strategy: str) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # As torchrun would start them.
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "0"}
        ranks = [
            Forked(folder / f"{rank}.log", distributed.main, column.name, strategy, folder,
                   RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank in range(2)
        ]  # fmt: skip
        for rank in ranks:
            rank.status()
        reports = [path.read_text() for path in sorted(folder.glob("rank*"))]
        if len(reports) != 2:
            raise RuntimeError(next(rank.last_line() for rank in ranks if rank.status() != 0))
        assert reports[0] == reports[1], f"the ranks differ: {reports}"
        assert f"{SPARSITY} " in reports[0], f"sparsity and hash of the masks: {reports[0]}"

    return check
