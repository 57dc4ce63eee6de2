"""A run of two gloo processes, one column, DDP or FSDP2; each rank writes its sparsity and the hash of its masks.

This project's methods also write a report, save a checkpoint and go on from it.
"""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from callbacks import SparsityReport
from sparsity import masks, shards
from tests.guarantees.columns import Column, Ours, column
from tests.guarantees.runs import Task, sgd
from tests.nets import Batch, trainer


class Validated(Task):
    """The task with a validation after each epoch, and one before training."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.loss(batch)


class Sharded(Validated):
    """The task with each layer sharded over the processes, the head as a part of the root."""

    def configure_model(self) -> None:
        if not shards.is_spread(self.one.weight):
            for module in (self.one, self.norm, self.two):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]  # the strategy's
            fully_shard(self, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]  # the strategy's


class ZerosEverywhere(pl.Callback):
    """After each step: what the masks prune is zero in the whole weights and their optimizer state."""

    def __init__(self, column: Column) -> None:
        self.column = column

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        found = self.column.masks(pl_module)
        for name, weight in self.column.parameters(pl_module).items():
            states = [s for s in trainer.optimizers[0].state.get(weight, {}).values() if isinstance(s, torch.Tensor)]
            if self.column.keeps_state:
                states = []
            for tensor in [weight, *states] if isinstance(self.column, Ours) else []:
                if tensor.shape == weight.shape:
                    assert not shards.whole(tensor.detach())[~found[name]].any(), f"{name} is not zero"


def fit(method: Column, strategy: str, folder: Path, epochs: int, resume: Path | None = None) -> pl.Trainer:
    """Trains on two processes, with a report if the method is ours, and saves a checkpoint."""
    model: Task = Sharded(sgd) if strategy == "fsdp2" else Validated(sgd)
    how: Any = strategy
    if strategy == "fsdp2":
        how = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(96, 32), torch.randint(0, 4, (96,)))
    report = [SparsityReport()] if isinstance(method, Ours) else []
    runner = trainer(
        *method.callbacks(model), ZerosEverywhere(method), *report,
        epochs=epochs, strategy=how, devices=2, default_root_dir=folder,
    )  # fmt: skip
    validation = DataLoader(data, batch_size=8)
    runner.fit(
        model, DataLoader(data, batch_size=8, shuffle=True), validation, ckpt_path=str(resume) if resume else None
    )
    if isinstance(method, Ours):
        runner.save_checkpoint(folder / f"{epochs}.ckpt")
    return runner


def main(name: str, strategy: str, folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    method = column(name)
    runner = fit(method, strategy, folder, epochs=3)
    if isinstance(method, Ours):
        method = column(name)
        runner = fit(method, strategy, folder, epochs=4, resume=folder / "3.ckpt")
    model = runner.lightning_module
    found = method.masks(model)
    for key, weight in method.weights(model).items():
        assert not shards.whole(weight)[~found[key]].any(), f"{key} is not zero"
    total = sum(mask.numel() for mask in found.values())
    sparsity = 1 - sum(int(mask.count_nonzero()) for mask in found.values()) / total
    whole = {key: shards.whole(weight).double().sum().item() for key, weight in method.weights(model).items()}
    text = f"{sparsity} {masks.fingerprint(found)} {whole}"
    if isinstance(method, Ours):
        assert method.took(method.method.step, 24), f"{method.method.step} steps"
        text += json.loads((folder / "report.json").read_text())["sparsity"]["achieved"].__format__(".4f")
    (folder / f"rank{runner.global_rank}").write_text(text)
