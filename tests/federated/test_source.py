"""Clients get the samples that the training loader would draw, and no others; labels are what classes are made of."""

from typing import Any

import numpy as np
import pytest
import torch
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
from sparsity.federated import IID, ById, Dirichlet, Federation, Local, Pathological, Protocol, simulate
from sparsity.federated.partition import labels_of
from tests.federated.small import Model, Points, model


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
