"""Passes through the training data outside of the training loop, as its steps would make them."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from sparsity.calibration import run
from sparsity.errors import InputError


def training_batches(trainer: Trainer, module: LightningModule) -> Iterator[Any]:
    """The training batches, on the device and in the precision that a training step gets them in."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    one_loader(trainer)
    for number, batch in enumerate(() if trainer.train_dataloader is None else trainer.train_dataloader):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        if number + 1 >= trainer.num_training_batches:
            return


def one_loader(trainer: Trainer) -> None:
    """Raises `InputError` where there are several training dataloaders."""
    if isinstance(trainer.train_dataloader, list | tuple | dict):
        kind = type(trainer.train_dataloader).__name__
        raise InputError(f"the training data is read outside of training too, from one dataloader; got a {kind}")


def forward(trainer: Trainer, model: nn.Module, batch: Any) -> Any:
    """A forward pass in the trainer's precision."""
    with trainer.precision_plugin.forward_context():
        return run(model, batch)


def training_loss(module: nn.Module, batch: Any, number: int = 0) -> Tensor:
    """What the module's `training_step` returns for a batch, with its graph; what it logs and counts is forgotten."""
    training_step: Any = getattr(module, "training_step", None)
    if training_step is None:
        raise InputError(f"{type(module).__name__} has no training_step, whose loss is needed: set `loss` instead")
    more = {"batch_idx": number} if "batch_idx" in signature(training_step).parameters else {}
    with _aside(module):
        outputs = training_step(batch, **more)
    found = outputs["loss"] if isinstance(outputs, dict) else outputs
    if not isinstance(found, Tensor):
        raise InputError(f"training_step returned {type(found).__name__}, and its loss is needed: return the loss")
    return found


@contextmanager
def _aside(module: nn.Module) -> Iterator[None]:
    metrics = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Metric)
    ]
    names = ("log", "log_dict")
    try:
        for parent, name, metric in metrics:
            setattr(parent, name, metric.clone())
        for name in names:
            object.__setattr__(module, name, lambda *_, **__: None)
        yield
    finally:
        for name in names:
            object.__delattr__(module, name)
        for parent, name, metric in metrics:
            setattr(parent, name, metric)
