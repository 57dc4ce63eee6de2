"""The language model's metrics, by hand."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD

from sparsity.models import LanguageModel

Batch = tuple[Tensor, Tensor]


class Batches(list[Batch]):
    """A loader: Lightning takes a list for several loaders and warns of a DataLoader without workers."""


class Descent(LanguageModel):
    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.0)


def trainer() -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def bigram() -> nn.Embedding:
    """A net whose logits depend on the byte alone."""
    torch.manual_seed(0)
    return nn.Embedding(256, 256)


def batches(text: str, sizes: tuple[int, ...]) -> Batches:
    values, start, found = torch.tensor(list(text.encode())), 0, Batches()
    for size in sizes:
        window = values[start : start + 4 * size + 1]
        found.append((window[:-1].view(size, 4), window[1:].view(size, 4)))
        start += 4 * size
    return found


@pytest.mark.parametrize("text", ["To be, or not to be: that is it.", "Größe ✓ — äöü ß and some more"])
def test_loss_perplexity_and_bits_by_hand(text: str) -> None:
    data, net = batches(text, (3, 2)), bigram()
    nats, count, characters = 0.0, 0, 0
    with torch.no_grad():
        for context, following in data:
            for before, after in zip(context.flatten().tolist(), following.flatten().tolist(), strict=True):
                logits = net(torch.tensor(before)).double()
                nats -= float(logits.log_softmax(0)[after])
                count += 1
                characters += after < 0x80 or after >= 0xC0
    test = trainer()
    test.test(LanguageModel(net), data, verbose=False)
    logged = {name: value.item() for name, value in test.callback_metrics.items()}
    assert logged["test/perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert logged["test/bits_per_character"] == pytest.approx(nats / characters / math.log(2), rel=1e-4)
    if text.isascii():
        assert logged["test/bits_per_character"] == pytest.approx(math.log2(logged["test/perplexity"]), rel=1e-4)


def test_fit_logs_losses() -> None:
    data = batches("abcdefghijklmnopqrstuvwxyz", (3, 3))
    fit = trainer()
    fit.fit(Descent(bigram()), data, data)
    logged = fit.callback_metrics
    assert logged["train/loss"] == pytest.approx(logged["val/loss"].item(), rel=1e-5)
    assert logged["val/perplexity"].item() == pytest.approx(math.exp(logged["val/loss"].item()), rel=1e-4)
    assert set(fit.progress_bar_metrics) == {"val/bits_per_character"}
