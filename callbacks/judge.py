"""Judge: how good a network is on the training data, while it trains and as it stands."""

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparsity.calibration import evaluating
from sparsity.errors import InputError

from .passes import training_batches, training_loss

MEASURES = ("accuracy", "loss")


class Judge:
    """The higher the better: accuracy, or minus the loss, over an epoch of training batches and over all processes.

    "accuracy" is that of `module(inputs)`, for batches (inputs, integer labels, ...); while training it is read from
    what the module's own forward gives. "loss" is what `training_step` returns, for any module.
    """

    def __init__(self, measure: str = "accuracy") -> None:
        if measure not in MEASURES:
            raise InputError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        self.measure = measure
        self._hook: RemovableHandle | None = None
        self._outputs: Tensor | None = None
        self._sums: list[Tensor] = []  # of the epoch so far: qualities, and how many of them

    def watch(self, module: LightningModule) -> None:
        """Begins to read what the module gives; sums that were restored are gone on with."""
        sums = self._sums or [torch.zeros((), dtype=torch.float64) for _ in range(2)]
        self.forget()
        self._sums = [each.to(_place(module)) for each in sums]
        if self.measure == "accuracy":
            self._hook = module.register_forward_hook(self._read)

    def begin(self) -> None:
        """A new epoch."""
        for each in self._sums:
            each.zero_()

    def forget(self) -> None:
        """Reads no more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._outputs, self._sums = None, None, []

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch so far, those of this process."""
        return {"sums": [each.cpu().clone() for each in self._sums]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = list(state["sums"])

    def see(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        """A batch of training has ended."""
        if not self._sums:
            return
        if self.measure == "loss":
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if not isinstance(loss, Tensor):
                raise InputError('measure="loss" reads the loss that training_step returns, and it returned none')
            finite = torch.isfinite(loss.detach())  # a gradient scaler may have skipped the others
            self._sums[0] -= torch.where(finite, loss.detach(), 0) * trainer.accumulate_grad_batches
            self._sums[1] += finite
            return
        if self._outputs is None:
            raise InputError(
                'measure="accuracy" reads what the module\'s forward gives, and training_step never calls '
                'self(inputs): call it there, or take measure="loss"'
            )
        right = hits(self._outputs, batch)
        self._sums[0] += right.sum()
        self._sums[1] += right.numel()
        self._outputs = None

    def running(self, trainer: Trainer) -> float:
        """The quality over the epoch that ends, batch by batch while the weights moved."""
        return _mean(trainer, *self._sums)

    def of(self, trainer: Trainer, module: LightningModule) -> float:
        """The quality of the module as it stands, in eval mode, over the training batches."""
        total, count = (torch.zeros((), dtype=torch.float64, device=_place(module)) for _ in range(2))
        with isolate_rng(), evaluating(module), torch.no_grad():
            for number, batch in enumerate(training_batches(trainer, module)):
                with trainer.precision_plugin.forward_context():
                    if self.measure == "accuracy":
                        right = hits(module(batch[0]), batch)
                        total, count = total + right.sum(), count + right.numel()
                    else:
                        total, count = total - training_loss(module, batch, number), count + 1
        self._outputs = None
        return _mean(trainer, total, count)

    def _read(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        # Under DDP the module's forward is the training step for a moment, and returns a loss.
        if isinstance(outputs, Tensor) and outputs.ndim > 1:
            self._outputs = outputs.detach()


def hits(outputs: Tensor, batch: Any) -> Tensor:
    """Which labels of a batch are the most likely class, bool in the labels' shape; the axis of classes is found."""
    labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        for axis in (-1, 1):
            if outputs.ndim == labels.ndim + 1 and outputs.movedim(axis, -1).shape[:-1] == labels.shape:
                return outputs.argmax(axis) == labels
    got = "no labels" if labels is None else f"labels of shape {tuple(getattr(labels, 'shape', ()))}"
    raise InputError(
        f'measure="accuracy" wants batches (inputs, integer labels) and outputs with one more axis, the classes; got '
        f'outputs of shape {tuple(outputs.shape)} and {got}: take measure="loss"'
    )


def _place(module: LightningModule) -> torch.device:
    # float64 sums, which MPS has not.
    return torch.device("cpu") if module.device.type == "mps" else module.device


def _mean(trainer: Trainer, total: Tensor, count: Tensor) -> float:
    sums = trainer.strategy.reduce(torch.stack([total, count]), reduce_op="sum")
    assert isinstance(sums, Tensor)
    return float(sums[0] / sums[1])
