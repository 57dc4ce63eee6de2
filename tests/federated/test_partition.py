"""Partitions: every sample once, the same for the same seed, and as skewed as they say."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from sparsity import InputError
from sparsity.federated.partition import (
    IID,
    ById,
    Dirichlet,
    Partition,
    Pathological,
    QuantitySkew,
    figure,
    holdings,
    labels_of,
)

LABELS = torch.arange(6000) * 7 % 10
KINDS: dict[str, Partition] = {
    "iid": IID(), "dirichlet": Dirichlet(0.3), "pathological": Pathological(2), "quantity": QuantitySkew(0.5),
    "ids": ById([f"writer {n % 20:02}" for n in range(6000)]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_sample_is_at_one_client(name: str) -> None:
    parts = KINDS[name](LABELS, 20, seed=3)
    assert len(parts) == 20
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(6000))
    assert all(len(part) and part.dtype == torch.int64 and bool((part.diff() > 0).all()) for part in parts)


@pytest.mark.parametrize("name", KINDS)
def test_the_seed_decides(name: str) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [part.tolist() for part in KINDS[name](LABELS, 20, seed)]

    torch.manual_seed(1)
    first = drawn(3)
    torch.manual_seed(2)
    assert drawn(3) == first
    assert (drawn(4) == first) == (name == "ids")


def test_iid_is_even() -> None:
    parts = IID()(LABELS, 7)
    assert {len(part) for part in parts} == {857, 858}
    assert int(holdings(parts, LABELS).min()) > 50


def test_each_client_has_just_so_many_classes() -> None:
    for classes in (1, 2, 3, 10):
        table = holdings(Pathological(classes)(LABELS, 20), LABELS)
        assert ((table > 0).sum(1) == classes).all()
        held = (table > 0).sum(0)
        assert int(held.max() - held.min()) <= 1, "classes are shared out evenly"


def test_the_smaller_alpha_the_more_skew() -> None:
    def concentration(alpha: float) -> float:
        table = holdings(Dirichlet(alpha)(LABELS, 20), LABELS).double()
        return float((table / table.sum(1, keepdim=True)).square().sum(1).mean())

    assert concentration(0.05) > concentration(0.5) > concentration(5.0) > concentration(500.0)
    assert concentration(500.0) == pytest.approx(0.1, abs=0.01)


def test_quantities_differ_and_classes_do_not() -> None:
    parts = QuantitySkew(0.5, least=20)(LABELS, 20)
    sizes = sorted(len(part) for part in parts)
    assert sizes[0] >= 20
    assert sizes[-1] > 5 * sizes[0]
    largest = max(parts, key=len)
    shares = LABELS[largest].bincount() / len(largest)
    assert float((shares - 0.1).abs().max()) < 0.05


def test_ids_are_clients_in_their_order() -> None:
    parts = ById(["b", "a", "b", "c"])(torch.zeros(4, dtype=torch.int64), 3)
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3]]


def test_labels_of_datasets() -> None:
    class Targets(list[Any]):
        targets = (1, 0, 2)

    assert labels_of(Targets("abc")).tolist() == [1, 0, 2]
    assert labels_of(TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1]))).tolist() == [2, 0, 1]


def test_who_holds_what() -> None:
    labels = torch.tensor([0, 1, 1, 2])
    table = holdings([torch.tensor([0, 1]), torch.tensor([2, 3])], labels)
    assert table.tolist() == [[1, 1, 0], [0, 1, 1]]
    axes = figure([torch.tensor([0, 1]), torch.tensor([2, 3])], labels).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1", "2"]  # type: ignore[union-attr]  # there is one


@pytest.mark.parametrize(("partition", "labels", "clients", "message"), [
    (IID(), LABELS[:5], 6, "5 samples cannot be divided among 6 clients"),
    (IID(), LABELS, 0, "among 0 clients"),
    (Dirichlet(0.01, least=200), LABELS, 20, r"alpha=0.01 starves a client: .* fewer than 200 of 6000 samples"),
    (QuantitySkew(0.01, least=200), LABELS, 20, "alpha=0.01 starves a client"),
    (Pathological(11), LABELS, 20, "at most 10 classes"),
    (Pathological(2), LABELS, 4, "at least 5 clients"),
    (Pathological(1), torch.tensor([0] * 9 + [1]), 10, "class 1 has 1 samples for 5 clients"),
    (ById([1, 2]), LABELS, 2, "2 ids, 2 different ones, for 6000 samples"),
    (ById([1] * 6000), LABELS, 2, "take 1 clients"),
])  # fmt: skip
def test_what_cannot_be_divided_is_said(partition: Partition, labels: Tensor, clients: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        partition(labels, clients)


def test_settings_that_cannot_be() -> None:
    for make in (lambda: Dirichlet(0), lambda: QuantitySkew(1.0, 0), lambda: Pathological(0)):
        with pytest.raises(InputError):
            make()
    with pytest.raises(NotImplementedError):
        Partition()(LABELS, 3)
