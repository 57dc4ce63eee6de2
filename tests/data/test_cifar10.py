import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from sparsity.data import CIFAR10


def colour(count: int) -> datasets.Dataset:
    """Images of one colour each, with the columns of the hub's repository."""
    images = [Image.new("RGB", (32, 32), (level, 0, 255)) for level in range(count)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict({"img": images, "label": list(range(count))}, features=features)


def test_reads_a_folder(tmp_path: Path) -> None:
    colour(10).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    colour(4).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    data = CIFAR10(str(tmp_path), batch_size=4, validation=0.2)
    data.prepare_data()
    data.setup()

    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [8, 2, 4]
    images, labels = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3]
    by_hand = [(3 / 255 - 0.4914) / 0.247, (0 - 0.4822) / 0.243, (1 - 0.4465) / 0.261]
    torch.testing.assert_close(images[3, :, 5, 7], torch.tensor(by_hand))


def test_reads_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(repository: str, split: str | None) -> Any:
        asked.append((repository, split))
        return colour(6)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = CIFAR10(validation=0.5)
    data.prepare_data()
    data.setup()
    assert asked == [("uoft-cs/cifar10", None), ("uoft-cs/cifar10", "train"), ("uoft-cs/cifar10", "test")]
    assert data.splits["test"].images.shape == (6, 3, 32, 32)


def test_augments_unless_told_otherwise() -> None:
    assert CIFAR10().augment
    assert not CIFAR10(augment=False).augment


@pytest.fixture(scope="module")
def real() -> CIFAR10:
    if "SPARSITY_DATA" not in os.environ:
        pytest.skip("SPARSITY_DATA does not name a folder with mnist/ and cifar10/ in it")
    data = CIFAR10(str(Path(os.environ["SPARSITY_DATA"]) / "cifar10"))
    data.setup()
    return data


def test_the_real_images_are_all_there(real: CIFAR10) -> None:
    train, validation, test = (real.splits[name] for name in ("train", "validation", "test"))
    assert (train.images.shape, validation.images.shape) == ((45000, 3, 32, 32), (5000, 3, 32, 32))
    assert torch.cat([train.labels, validation.labels]).bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10


def test_the_constants_are_those_of_the_real_images(real: CIFAR10) -> None:
    pixels = torch.cat([real.splits["train"].images, real.splits["validation"].images]).float() / 255
    # A copy may have been compressed again, which takes some contrast away; its mean stays.
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(CIFAR10.mean, abs=1e-3)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(CIFAR10.std, abs=3e-3)
