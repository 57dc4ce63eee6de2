"""A tiny federation: two Gaussian classes more than a network can confuse, and a network small enough to follow."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparsity.schedules import CosineDrop


class Points(pl.LightningDataModule):
    """240 points of 6 coordinates in 3 classes, and 60 for validation and test each."""

    def __init__(self, batch_size: int = 4, count: int = 240) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(count + 120) % 3
        self.points = torch.randn(len(labels), 6, generator=generator) + 4 * torch.eye(6)[labels]
        self.labels, self.count = labels, count

    def _loader(self, begin: int, end: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.points[begin:end], self.labels[begin:end]), self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0, self.count)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.count, self.count + 60)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.count + 60, self.count + 120)


class Model(pl.LightningModule):
    """Two linear layers around a batch norm, with a layer whose weight is tied to another's and dropout."""

    def __init__(self, rate: float = 0.1, momentum: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.rate, self.momentum = rate, momentum
        self.first, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12) if norm else nn.Identity()
        self.middle, self.again, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.again.weight = self.middle.weight
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.first(x))))
        logits: Tensor = self.last(torch.relu(self.again(torch.relu(self.middle(x)))))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.rate, self.momentum)


class Unlucky(Model):
    """Some of its losses are NaN."""

    def training_step(self, batch: Any) -> Tensor:
        loss = super().training_step(batch)
        return loss * float("nan") if float(batch[0][0, 0]) < -2 else loss


class Precise(Model):
    """In float64."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def model(seed: int = 0, **settings: Any) -> Model:
    """Its weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Model(**settings)


def drops(every: int = 2) -> CosineDrop:
    """Masks that move a lot, and often."""
    return CosineDrop(0.4, every, 0.9)
