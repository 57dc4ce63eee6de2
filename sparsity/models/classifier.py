"""The Lightning module that trains an image classifier."""

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]


class Classifier(pl.LightningModule):
    """Trains ``net`` with cross entropy; logs ``loss`` and ``acc`` under ``train/``, ``val/`` and ``test/``.

    A batch is ``(images, labels)``: float ``[B, ...]`` as ``net`` takes them, int64 ``[B]``. All six values
    are means over the samples of an epoch; accuracy is a fraction in [0, 1]. The two of training are taken
    batch by batch, while the weights move.

    The optimizer belongs to the recipe: LightningCLI builds it from the keys ``optimizer`` and
    ``lr_scheduler``. In Python, subclass and define ``configure_optimizers``.

    Args:
        net: maps ``images`` to logits ``[B, classes]``.
        classes: number of labels.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1) (arXiv 1512.00567,
            section 7). A regulariser, so only the training loss has it; ``val/loss`` and ``test/loss`` remain
            comparable between settings.
    """

    def __init__(self, net: nn.Module, classes: int = 10, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}; 0 turns it off")
        self.net = net
        self.classes = classes
        self.label_smoothing = label_smoothing
        self.train_acc = micro_accuracy(classes)
        self.val_acc = micro_accuracy(classes)
        self.test_acc = micro_accuracy(classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.net(images)
        if logits.shape[1:] != (self.classes,):
            raise ValueError(
                f"net must return logits of shape [B, {self.classes}], got {tuple(logits.shape)}; "
                "give net and Classifier the same number of classes"
            )
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """The loss to differentiate, a scalar."""
        return self._measure("train", self.train_acc, batch, self.label_smoothing)

    def validation_step(self, batch: Batch) -> None:
        """Logs ``val/loss`` and ``val/acc``."""
        self._measure("val", self.val_acc, batch)

    def test_step(self, batch: Batch) -> None:
        """Logs ``test/loss`` and ``test/acc``."""
        self._measure("test", self.test_acc, batch)

    def _measure(self, stage: str, accuracy: MulticlassAccuracy, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss


def micro_accuracy(classes: int) -> MulticlassAccuracy:
    """Correct predictions / all predictions."""
    # The metric's own checks read the labels back from the device at every step.
    return MulticlassAccuracy(classes, average="micro", validate_args=False)
