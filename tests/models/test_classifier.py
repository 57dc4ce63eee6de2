import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD

from sparsity.models import Classifier

# Lightning's own CombinedLoader raises it under torch 2.13, whatever loader it is given.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")

Batch = tuple[Tensor, Tensor]


class Batches(list[Batch]):
    """A loader: Lightning takes a list for several loaders and warns of a DataLoader without workers."""


class Descent(Classifier):
    """The Python way to an optimizer; a rate of 0 leaves the weights where a hand calculation knows them."""

    lr = 0.0

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=self.lr)


def trainer(epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def identity(classes: int) -> nn.Linear:
    """A net whose logits are its inputs."""
    net = nn.Linear(classes, classes)
    nn.init.eye_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def by_hand(batches: Batches, label_smoothing: float = 0.0) -> tuple[float, float]:
    """Mean cross entropy and accuracy over all samples, summed one by one, if the logits are the images."""
    losses, hits = [], []
    for images, labels in batches:
        for logits, label in zip(images.tolist(), labels.tolist(), strict=True):
            log_total = math.log(sum(math.exp(z) for z in logits))
            uniform = label_smoothing / len(logits)
            target = [uniform + (1 - label_smoothing) * (k == label) for k in range(len(logits))]
            losses.append(sum(t * (log_total - z) for t, z in zip(target, logits, strict=True)))
            hits.append(logits.index(max(logits)) == label)
    return sum(losses) / len(losses), sum(hits) / len(hits)


def batches(seed: int, sizes: tuple[int, ...] = (5, 2), classes: int = 3) -> Batches:
    """Of unequal sizes, so that a mean of batch means differs from the mean over samples."""
    draw = torch.Generator().manual_seed(seed)
    return Batches(
        (torch.randn(n, classes, generator=draw), torch.randint(classes, (n,), generator=draw)) for n in sizes
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_fit_logs_means_over_samples(label_smoothing: float) -> None:
    training, validation = batches(0), batches(1)
    fit = trainer()
    fit.fit(Descent(identity(3), 3, label_smoothing), training, validation)

    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    expected = dict(zip(("train/loss", "train/acc"), by_hand(training, label_smoothing), strict=True))
    expected |= dict(zip(("val/loss", "val/acc"), by_hand(validation), strict=True))
    assert logged == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["val/acc"] < 1
    assert set(fit.progress_bar_metrics) == {"val/acc"}


def test_test_logs_means_over_samples() -> None:
    data = batches(2)
    test = trainer()
    test.test(Classifier(identity(3), 3, label_smoothing=0.2), data, verbose=False)
    logged = [test.callback_metrics[name].item() for name in ("test/loss", "test/acc")]
    assert logged == pytest.approx(by_hand(data), abs=1e-6)


def test_metrics_start_afresh_every_epoch() -> None:
    once, thrice = trainer(), trainer(epochs=3)
    once.fit(Descent(identity(3), 3), batches(0), batches(1))
    thrice.fit(Descent(identity(3), 3), batches(0), batches(1))
    assert once.callback_metrics == thrice.callback_metrics


def test_fit_learns() -> None:
    torch.manual_seed(0)
    data = batches(0, sizes=(32, 32))
    separable = Batches((images, images.argmax(1)) for images, _ in data)
    model = Descent(nn.Linear(3, 3), 3)
    model.lr = 1.0
    fit = trainer(epochs=30)
    fit.fit(model, separable, separable)
    assert fit.callback_metrics["val/acc"] > 0.9


def test_forward_is_the_net() -> None:
    images = torch.randn(4, 3)
    assert torch.equal(Classifier(identity(3), 3)(images), images)


def test_gradient_reaches_every_parameter() -> None:
    model = Classifier(nn.Linear(3, 3), 3)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # no Trainer to log to
    torch.autograd.backward(model.training_step(batches(0)[0]))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_checkpoint_holds_the_net_and_loads_weights_only(tmp_path: Path) -> None:
    model = Descent(identity(3), 3)
    fit = trainer()
    fit.fit(model, batches(0), batches(1))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"net.weight", "net.bias"}
    assert "hyper_parameters" not in checkpoint


def test_the_recipe_owns_the_optimizer() -> None:
    assert "configure_optimizers" not in vars(Classifier)


def test_errors_name_the_values() -> None:
    with pytest.raises(ValueError, match=r"classes must be at least 2, got 1"):
        Classifier(nn.Identity(), classes=1)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1\.0; 0 turns it off"):
        Classifier(nn.Identity(), label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"shape \[B, 10\], got \(4, 3\); give net and Classifier the same"):
        Classifier(identity(3))(torch.randn(4, 3))
