"""The server's step, against sums written out by hand and in plain loops."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sparsity import InputError
from sparsity.federated.layout import Layout
from sparsity.federated.server import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedLAW,
    FedMedian,
    FedTrimmedMean,
    Sums,
    Update,
    server_step,
)
from sparsity.federated.state import State
from tests.federated.small import model


class One(nn.Module):
    """One weight of four entries with a mask, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)


def layout() -> Layout:
    return Layout(One(), ["layer.weight"])


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bools(*values: int) -> Tensor:
    return torch.tensor(values).bool()


def step(server: FedAvg, state: State, updates: list[Update], samples: int = 0) -> State:
    sums = Sums(layout(), {})
    for update in updates:
        sums.add(update)
    return server_step(state, sums, server, layout(), samples or sums.samples, updates)


def test_a_weight_is_averaged_over_those_that_keep_it() -> None:
    state = State(vector(1, 2, 0, 0, 0.5), bools(1, 1, 0, 0))
    updates = [Update(vector(2, 0, 4, 0, 1), bools(1, 0, 1, 0), 1), Update(vector(4, 1, 0, 0, 4), bools(1, 1, 0, 0), 3)]
    after = step(FedAvg(), state, updates)
    # (2 + 3 * 4) / 4 = 3.5; 3 * 1 / 3 = 1; 4 / 1 = 4: of three, the two largest stay. The bias is (1 + 3 * 4) / 4.
    assert after.values.tolist() == [3.5, 0, 4, 0, 3.25]
    assert after.mask.tolist() == [True, False, True, False]
    assert after.directions.tolist() == [1, -1, 1, 0]
    assert after.round == 1


def test_those_that_are_absent_count_with_the_last_weights() -> None:
    state = State(vector(1, 2, 0, 0, 0.5), bools(1, 1, 0, 0))
    updates = [Update(vector(2, 0, 4, 0, 1), bools(1, 0, 1, 0), 2)]
    after = step(FedAvg(residual=True), state, updates, samples=10)
    # 1.2 = (8 * 1 + 2 * 2) / 10 is the smallest; what its only client pruned keeps its value; 4 is only its grower's.
    assert after.values.tolist() == pytest.approx([0, 2, 4, 0, (8 * 0.5 + 2 * 1) / 10])
    dense = step(FedAvg(residual=True), State(vector(1, 2, 3, 4, 0), bools(1, 1, 1, 1)),
                 [Update(vector(2, 2, 2, 2, 2), bools(1, 1, 1, 1), 2)], samples=10)  # fmt: skip
    assert dense.values.tolist() == pytest.approx([1.2, 2, 2.8, 3.6, 0.4])


def test_without_updates_the_state_stays() -> None:
    state = State(vector(1, 2, 0, 0, 0.5), bools(1, 1, 0, 0))
    after = step(FedAvg(), state, [], samples=10)
    assert torch.equal(after.values, state.values)
    assert torch.equal(after.mask, state.mask)
    assert after.round == 1


def test_momentum_by_hand() -> None:
    state = State(vector(0, 0, 0, 0, 0), bools(1, 1, 1, 1))
    update = Update(vector(1, 1, 1, 1, 1), bools(1, 1, 1, 1), 5)
    once = step(FedAvgM(0.5, 0.9), state, [update])
    assert once.values.tolist() == [0.5] * 5
    twice = step(FedAvgM(0.5, 0.9), once, [update])
    assert twice.values.tolist() == pytest.approx([0.5 + 0.5 * (0.9 * 1 + 0.5)] * 5)


def test_adam_by_hand_and_only_where_somebody_keeps_the_weight() -> None:
    state = State(vector(0, 0, 0, 0, 0), bools(1, 1, 1, 1))
    updates = [Update(vector(2, 0, 2, 2, 2), bools(1, 0, 1, 1), 5)]
    after = step(FedAdam(0.1), state, updates)
    first, second = 0.1 * 2, 0.99 * 1e-6 + 0.01 * 4
    expected = 0.1 * first / (math.sqrt(second) + 1e-3)
    assert after.values.tolist() == pytest.approx([expected, 0, expected, expected, expected])
    assert after.mask.tolist() == [True, False, True, True]
    assert after.moments["second"].tolist() == pytest.approx([second, 0, second, second, second])


def test_buffers_are_averaged_whatever_the_server_does() -> None:
    net = model()
    shape = Layout(net, ["first.weight"])
    before = shape.read()
    values = before + 1
    sums = Sums(shape, {})
    sums.add(Update(values, torch.ones(shape.masked).bool(), 3))
    after = server_step(State(before, torch.ones(shape.masked).bool()), sums, FedAdam(10.0), shape, 3)
    found = shape.split(after.values)
    assert torch.equal(found["norm.running_var"], torch.full((12,), 2.0))
    assert int(found["norm.num_batches_tracked"]) == 1
    assert float((found["first.bias"] - shape.split(before)["first.bias"]).min()) > 2


@pytest.mark.parametrize(("server", "expected"), [
    (FedMedian(), [2, 15, 3, 0, 2]),
    (FedTrimmedMean(0.34), [2, 15, 3, 0, 2]),
    (FedTrimmedMean(0.0), [101, 15, 3, 0, 2]),
])  # fmt: skip
def test_one_client_cannot_move_a_median(server: FedAvg, expected: list[float]) -> None:
    state = State(vector(1, 1, 1, 0, 0), bools(1, 1, 1, 0))
    updates = [
        Update(vector(1, 10, 3, 0, 1), bools(1, 1, 1, 0), 1),
        Update(vector(300, 20, 0, 0, 2), bools(1, 1, 0, 0), 100),
        Update(vector(2, 0, 0, 0, 3), bools(1, 0, 0, 0), 1),
    ]
    assert step(server, state, updates).values.tolist() == expected


def test_learned_weights_go_where_the_servers_samples_are() -> None:
    """A loss of squares around a target: of two clients, one is half way there and the other is far off."""
    target = vector(2, 4, 6, 8, 10)
    updates = [Update(target / 2, bools(1, 1, 1, 1), 10), Update(-target, bools(1, 1, 1, 1), 30)]

    def slopes(where: Callable[[], Tensor]) -> Iterator[Tensor]:
        for _ in range(5):
            yield 2 * (where() - target)

    found, held = FedLAW(0.1, 200, 0.05).gathered(updates, layout(), slopes)
    torch.testing.assert_close(found, target, rtol=0.02, atol=0)
    assert held.all()
    pruned = [Update(vector(4, 4, 4, 4, 4), bools(1, 1, 1, 1), 1), Update(vector(0, 8, 8, 8, 8), bools(0, 1, 1, 1), 1)]
    shared, _ = FedLAW(0.1, 1).gathered(pruned, layout(), lambda where: iter(()))
    assert shared.tolist() == pytest.approx([4, 6, 6, 6, 6]), "over those that keep it"
    untouched, _ = FedLAW(0.1, 1).gathered(updates, layout(), lambda where: iter(()))
    torch.testing.assert_close(untouched, 0.25 * target / 2 - 0.75 * target)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_layout_reads_and_writes_weights_however_they_lie(format: torch.memory_format) -> None:
    net = nn.Conv2d(3, 4, 3, bias=False)
    net.weight.data = net.weight.data.contiguous(memory_format=format)
    shape = Layout(net, ["weight"])
    expected = torch.tensor(net.weight.detach().flatten().tolist())
    assert torch.equal(shape.read(), expected)
    assert not shape.read().requires_grad
    shape.write(expected + 1)
    assert torch.equal(shape.read(), expected + 1)
    assert net.weight.is_contiguous(memory_format=format)
    assert net.weight.requires_grad
    assert torch.equal(net.weight.flatten(), expected + 1)


def test_a_layout_has_tied_weights_once_and_buffers() -> None:
    net = model()
    shape = Layout(net, ["first.weight", "middle.weight"])
    assert list(shape.tensors)[:2] == ["first.weight", "middle.weight"]
    assert "again.weight" not in shape.tensors
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= shape.tensors.keys()
    values = shape.read()
    shape.write(values * 2)
    assert torch.equal(net.again.weight, net.middle.weight)
    assert torch.equal(shape.read(), values * 2)
    assert shape.masked == 6 * 12 + 144
    mask = torch.rand(shape.masked) < 0.5
    assert torch.equal(shape.mask(shape.masks(mask)), mask)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: FedAvg(0), "rate must be above 0"),
    (lambda: FedAvgM(momentum=1), r"momentum must lie in \[0, 1\)"),
    (lambda: FedAdam(tau=0), "tau=0 above 0"),
    (lambda: FedTrimmedMean(0.5), r"must lie in \[0, 0.5\)"),
    (lambda: Layout(nn.ReLU(), []), "nothing to share"),
])  # fmt: skip
def test_bad_input(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
