"""The Lightning module that trains a language model."""

import math

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

Batch = tuple[Tensor, Tensor]


class LanguageModel(pl.LightningModule):
    """Trains ``net`` to predict the next byte; logs ``loss``, ``perplexity`` and ``bits_per_character``.

    A batch is (bytes ``[B, T]``, the bytes that follow each ``[B, T]``), int64. The loss is the mean cross entropy of
    a byte in nats; perplexity is its exponential, per byte; bits per character count each character of UTF-8 once, so
    for ASCII they are the logarithm of the perplexity to base 2. ``val/`` and ``test/`` have all three, means over the
    whole split; ``train/loss`` is the mean over an epoch.

    The optimizer belongs to the recipe: LightningCLI builds it from the keys ``optimizer`` and ``lr_scheduler``. In
    Python, subclass and define ``configure_optimizers``.

    Args:
        net: maps bytes ``[B, T]`` to logits ``[B, T, vocabulary]``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.val_perplexity, self.val_bits = Perplexity(), MeanMetric()
        self.test_perplexity, self.test_bits = Perplexity(), MeanMetric()

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``[B, T, vocabulary]``."""
        logits: Tensor = self.net(text)
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """The loss to differentiate, a scalar."""
        loss = _loss(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Logs ``val/loss``, ``val/perplexity`` and ``val/bits_per_character``."""
        self._measure("val", self.val_perplexity, self.val_bits, batch)

    def test_step(self, batch: Batch) -> None:
        """Logs ``test/loss``, ``test/perplexity`` and ``test/bits_per_character``."""
        self._measure("test", self.test_perplexity, self.test_bits, batch)

    def _measure(self, stage: str, perplexity: Perplexity, bits: MeanMetric, batch: Batch) -> None:
        text, following = batch
        logits = self(text).float()
        loss = _loss(logits, following)
        perplexity.update(logits, following)
        # Bytes 10xxxxxx go on with a character that another byte has begun.
        characters = ((following & 0xC0) != 0x80).sum()
        bits.update(loss * following.numel() / characters / math.log(2), weight=characters)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log(f"{stage}/perplexity", perplexity, on_step=False, on_epoch=True)
        self.log(f"{stage}/bits_per_character", bits, on_step=False, on_epoch=True, prog_bar=stage == "val")


def _loss(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())
