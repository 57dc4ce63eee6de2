import sys

import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity import InputError
from sparsity.data import Digits
from sparsity.data.images import Batch

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Linear(pl.LightningModule):
    """Softmax regression."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def training_step(self, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Batch) -> None:
        self.measure("val", batch)

    def test_step(self, batch: Batch) -> None:
        self.measure("test", batch)

    def measure(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        self.log(f"{stage}/acc", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def every_image(data: Digits) -> Tensor:
    data.setup()
    return torch.cat([split.images for split in data.splits.values()])


def test_splits_hold_every_digit_once() -> None:
    data = Digits()
    images = every_image(data)
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 1294, "validation": 144, "test": 359}

    # All 1,797 images differ, so equal sets of images are equal splits.
    read = {bytes(image.flatten().tolist()) for image in images}
    source = {bytes(round(v * 255 / 16) for v in image.flatten().tolist()) for image in load_digits().images}
    assert len(read) == 1797
    assert read == source


def test_levels_come_back_exactly() -> None:
    images = every_image(Digits())
    assert (images.dtype, images.shape) == (torch.uint8, (1797, 1, 8, 8))
    levels = (images.double() * 16 / 255).round()
    assert set(levels.flatten().tolist()) == set(range(17))
    assert len(set(images.flatten().tolist())) == 17


def test_every_label_belongs_to_its_image() -> None:
    data = Digits()
    data.setup()
    source = load_digits()
    label_of = {image.tobytes(): label for image, label in zip(source.images, source.target, strict=True)}
    for split in data.splits.values():
        levels = (split.images.double() * 16 / 255).round().squeeze(1)
        assert [label_of[image.numpy().tobytes()] for image in levels] == split.labels.tolist()
        assert split.labels.dtype == torch.int64


def test_splits_do_not_depend_on_the_seed() -> None:
    held_out = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        data = Digits()
        data.setup()
        held_out.append((data.splits["validation"].images, data.splits["test"].images))
    assert torch.equal(held_out[0][0], held_out[1][0])
    assert torch.equal(held_out[0][1], held_out[1][1])


def test_the_constants_are_those_of_the_images() -> None:
    pixels = every_image(Digits()).double() / 255
    assert pixels.mean().item() == pytest.approx(Digits.mean[0], abs=5e-4)
    assert pixels.std().item() == pytest.approx(Digits.std[0], abs=5e-4)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r'sklearn is missing: pip install "lightning-sparsity\[data\]"'):
        Digits().setup()


def test_a_linear_model_learns_them() -> None:
    pl.seed_everything(0, verbose=False)
    model, data = Linear(), Digits()
    run = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(model, datamodule=data)
    assert run.callback_metrics["val/acc"] > 0.9
    assert run.test(model, datamodule=data, verbose=False)[0]["test/acc"] > 0.9
