"""Clients get the samples that the training loader would draw, and no others; labels are what classes are made of."""

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sparsity import InputError
from sparsity.federated import IID, ById, Dirichlet, Federation, Local, Pathological, Protocol, Running, simulate
from sparsity.federated.partition import labels_of
from tests.federated.small import Model, Points, model


def seeded(kind: type[Model]) -> Model:
    torch.manual_seed(0)
    return kind()


class Sampled(Points):
    """One dataset of all samples, of which a sampler takes those for training, as in many tutorials."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.sampler = sampler

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.points, self.labels), self.batch_size, sampler=self.sampler)


class Watching(Model):
    """Notes every sample that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append(batch[0])
        return super().training_step(batch)


@pytest.mark.parametrize("partition", [IID(), Dirichlet(1.0), Pathological(2)])
def test_what_a_sampler_leaves_out_no_client_gets(partition: Any) -> None:
    places = torch.randperm(360, generator=torch.Generator().manual_seed(1))[:240].tolist()
    data, net = Sampled(SubsetRandomSampler(places)), Watching()
    outcome = simulate(net, data, None, Federation(6, 6, 1, partition), Protocol(Local(1)), seed=1)
    mine = {tuple(point) for point in data.points[places].tolist()}
    seen = [tuple(point) for batch in net.seen for point in batch.tolist()]
    assert len(seen) == len(set(seen)) == 240
    assert set(seen) == mine
    for part in outcome.parts:
        assert bool((part < 240).all())


@pytest.mark.parametrize("sampler", [
    WeightedRandomSampler(torch.ones(360).tolist(), 360), RandomSampler(range(360), replacement=True),
    RandomSampler(range(360), num_samples=10),
])  # fmt: skip
def test_a_sampler_that_would_be_ignored_is_refused(sampler: Any) -> None:
    with pytest.raises(InputError, match=f"so the {type(sampler).__name__} of train_dataloader would be ignored"):
        simulate(model(), Sampled(sampler), None, Federation(3, 3, 1))


class Labelled(TensorDataset):
    """With labels of its own kind."""

    def __init__(self, targets: Any) -> None:
        super().__init__(torch.zeros(len(targets), 2))
        self.targets = targets


@pytest.mark.parametrize(
    "targets", [[2, 0, 1], torch.tensor([2, 0, 1]), np.array([2, 0, 1]), torch.tensor([2.0, 0, 1])]
)
def test_labels_are_whole_numbers_however_they_come(targets: Any) -> None:
    assert labels_of(Labelled(targets)).tolist() == [2, 0, 1]
    part: Any = Subset(Labelled(targets), [2, 0])
    assert labels_of(part).tolist() == [1, 2]
    assert labels_of(TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1]))).tolist() == [2, 0, 1]


@pytest.mark.parametrize("targets", [
    torch.eye(3), torch.tensor([0.5, 1.0, 2.0]), ["cat", "dog", "cat"], torch.tensor([-1, 0, 1]),
])  # fmt: skip
def test_labels_that_are_no_classes_are_refused(targets: Any) -> None:
    with pytest.raises(InputError, match="labels are one whole number"):
        labels_of(Labelled(targets))


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_ids_may_be_a_tensor(kind: Any) -> None:
    parts = ById(kind([7, 3, 7, 3, 3]))(torch.zeros(5), 2)
    assert [part.tolist() for part in parts] == [[1, 3, 4], [0, 2]]


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # which Lightning sets
def test_a_data_module_of_datasets_is_measured_on() -> None:
    points = Points()
    train, val, test = (
        TensorDataset(points.points[a:b], points.labels[a:b]) for a, b in ((0, 240), (240, 300), (300, 360))
    )
    torch.manual_seed(1)
    data = pl.LightningDataModule.from_datasets(train, val, test, batch_size=4)
    found = simulate(model(), data, None, Federation(6, 6, 1, IID()), Protocol(Local(1)), seed=1)
    by_hand = simulate(model(), Points(), None, Federation(6, 6, 1, IID()), Protocol(Local(1)), seed=1)
    assert found.metrics == by_hand.metrics
    assert found.metrics.keys() == {"val/acc", "test/acc"}


class Several(Points):
    def __init__(self, loaders: Any) -> None:
        super().__init__()
        self.loaders = loaders

    def val_dataloader(self) -> Any:
        return self.loaders


class ByLoader(Model):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]  # as Lightning allows
        super().validation_step(batch, batch_idx)
        self.log("val/loader", float(dataloader_idx), add_dataloader_idx=False)
        self.log("val/count", float(len(batch[0])), reduce_fx="sum")


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_several_validation_loaders_are_measured_one_by_one(kind: Any) -> None:
    points = Points()
    loaders = [points._loader(240, 250), points._loader(250, 300)]
    given = dict(zip("ab", loaders, strict=True)) if kind is dict else kind(loaders)
    torch.manual_seed(0)
    found = simulate(ByLoader(), Several(given), None, Federation(6, 6, 1, IID()), Protocol(Local(1)), seed=1).metrics
    accuracy, counts = ([found[f"val/{name}/dataloader_idx_{place}"] for place in (0, 1)] for name in ("acc", "count"))
    assert counts == [10, 50]
    whole = simulate(model(), Points(), None, Federation(6, 6, 1, IID()), Protocol(Local(1)), seed=1).metrics
    assert (10 * accuracy[0] + 50 * accuracy[1]) / 60 == pytest.approx(whole["val/acc"])
    assert found["val/loader"] == pytest.approx(50 / 60)


def test_no_validation_loader_is_no_validation() -> None:
    found = simulate(model(), Several(None), None, Federation(6, 6, 1, IID()), Protocol(Local(1)), seed=1)
    assert found.metrics.keys() == {"test/acc"}


class Pairs(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, place: int) -> Any:
        return {"x": torch.zeros(6), "y": place % 3}


def test_labels_that_cannot_be_found_are_asked_for() -> None:
    with pytest.raises(InputError, match=r"looked for in pairs \(input, label\), got dict"):
        labels_of(Pairs())


class Metered(Model):
    """Logs a metric's object, which all loaders share."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.meter = torchmetrics.MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.meter((self(batch[0]).argmax(1) == batch[1]).float().mean(), len(batch[0]))
        self.log("val/acc", self.meter)
        self.log("val/plain", (self(batch[0]).argmax(1) == batch[1]).float().mean())


def test_a_metric_is_computed_for_each_loader() -> None:
    points = Points()
    data, net = Several([points._loader(240, 250), points._loader(250, 300)]), seeded(Metered)
    found = simulate(net, data, None, Federation(6, 6, 1, IID()), Protocol(Local(1)), seed=1).metrics
    for place in (0, 1):
        name = f"dataloader_idx_{place}"
        assert found[f"val/acc/{name}"] == pytest.approx(found[f"val/plain/{name}"])


class Random(torch.utils.data.Dataset[Any]):
    def __init__(self, points: Points) -> None:
        self.points = points

    def __len__(self) -> int:
        return 60

    def __getitem__(self, place: int) -> Any:
        return self.points.points[240 + place] + 3 * torch.randn(6), self.points.labels[240 + place]


def test_random_validation_samples_do_not_depend_on_the_number_of_workers() -> None:
    found = []
    for workers in (1, 2):
        data = Several(DataLoader(Random(Points()), 4, num_workers=1))
        federation = Federation(6, 6, 2, IID())
        outcome = simulate(seeded(Model), data, None, federation, Protocol(Local(1)), Running(workers), seed=1)
        found.append([row["metrics"] for row in outcome.rows])
    assert found[0] == found[1]
