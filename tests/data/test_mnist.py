import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from sparsity.data import MNIST

# What the 60,000 training labels and the 10,000 test labels count, digit by digit.
TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def grey(count: int) -> datasets.Dataset:
    """Images of one level each, with the columns of the hub's repository."""
    images = [Image.new("L", (28, 28), level) for level in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict({"image": images, "label": list(range(count))}, features=features)


def test_reads_a_folder(tmp_path: Path) -> None:
    grey(10).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    grey(4).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    data = MNIST(str(tmp_path), batch_size=4, validation=0.2)
    data.prepare_data()
    data.setup()

    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [8, 2, 4]
    images, labels = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert images.shape == (4, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3]
    by_hand = [(level / 255 - 0.1307) / 0.3081 for level in range(4)]
    torch.testing.assert_close(images[:, 0, 5, 7], torch.tensor(by_hand))


def test_reads_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(repository: str, split: str | None) -> Any:
        asked.append((repository, split))
        return grey(6)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = MNIST(validation=0.5)
    data.prepare_data()
    data.setup()
    assert asked == [("ylecun/mnist", None), ("ylecun/mnist", "train"), ("ylecun/mnist", "test")]
    assert data.splits["test"].images.shape == (6, 1, 28, 28)


@pytest.fixture(scope="module")
def real() -> MNIST:
    if "SPARSITY_DATA" not in os.environ:
        pytest.skip("SPARSITY_DATA does not name a folder with mnist/ and cifar10/ in it")
    data = MNIST(str(Path(os.environ["SPARSITY_DATA"]) / "mnist"))
    data.setup()
    return data


def test_the_real_images_are_all_there(real: MNIST) -> None:
    train, validation, test = (real.splits[name] for name in ("train", "validation", "test"))
    assert (train.images.shape, validation.images.shape) == ((54000, 1, 28, 28), (6000, 1, 28, 28))
    assert torch.cat([train.labels, validation.labels]).bincount().tolist() == TRAIN
    assert test.labels.bincount().tolist() == TEST


def test_the_constants_are_those_of_the_real_images(real: MNIST) -> None:
    pixels = torch.cat([real.splits["train"].images, real.splits["validation"].images]).double() / 255
    assert pixels.mean().item() == pytest.approx(MNIST.mean[0], abs=1e-4)
    assert pixels.std().item() == pytest.approx(MNIST.std[0], abs=1e-4)
