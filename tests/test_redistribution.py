"""How many weights each layer drops and grows: hand-worked cases, the authors' rule written differently, properties."""

import math

import pytest
import torch

from sparsity.redistribution import InPlace, Proportional
from sparsity.scores import Magnitude, Momentum

SIZES = {"a": 100, "b": 200, "c": 1000}


def test_in_place_every_layer_grows_what_it_drops() -> None:
    kept = {"a": 10, "b": 3, "c": 1}
    dropped, grown = InPlace()({}, kept, SIZES, 0.35)
    assert dropped == grown == {"a": 3, "b": 1, "c": 0}


def test_proportional_by_hand() -> None:
    """20 + 40 + 20 weights are dropped, and the shares are 1/2, 1/4 and 1/4."""
    kept = {"a": 40, "b": 80, "c": 40}
    dropped, grown = Proportional()({"a": 0.4, "b": 0.2, "c": 0.2}, kept, SIZES, 0.5)
    assert dropped == {"a": 20, "b": 40, "c": 20}
    assert grown == {"a": 40, "b": 20, "c": 20}


def test_what_a_full_layer_cannot_take_goes_evenly_to_the_others() -> None:
    """Half of 60 + 80 + 80 is dropped; layer a would grow 90 % of 110 = 99, and has 70 free, 69 of them to fill."""
    kept = {"a": 60, "b": 80, "c": 80}
    dropped, grown = Proportional()({"a": 9.0, "b": 0.5, "c": 0.5}, kept, SIZES, 0.5)
    assert dropped == {"a": 30, "b": 40, "c": 40}
    # 5.5 by share, and 15 each of what layer a could not take.
    assert grown["a"] == 69
    assert sorted([grown["b"], grown["c"]]) == [20, 21]


def test_a_nearly_dense_layer_that_matters_drops_no_more_than_it_is_sparse() -> None:
    kept = {"a": 90, "b": 20, "c": 100}
    means = {"a": 2.0, "b": 1.0, "c": 1.0}
    assert Proportional()(means, kept, SIZES, 0.5)[0] == {"a": 9, "b": 10, "c": 50}
    assert Proportional(protected=0.05)(means, kept, SIZES, 0.5)[0] == {"a": 45, "b": 10, "c": 50}
    unimportant = {"a": 0.9, "b": 1.0, "c": 1.1}
    assert Proportional()(unimportant, kept, SIZES, 0.5)[0]["a"] == 45


def test_without_any_momentum_the_shares_are_equal() -> None:
    _, grown = Proportional()(dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 30), SIZES, 0.5)
    assert grown == {"a": 15, "b": 15, "c": 15}


def authors(total: int, shares: dict[str, float], room: dict[str, int]) -> dict[str, float]:
    """The authors' loop, in the facts' words: cap, sum what overflows, give every layer an equal part, again."""
    grown = {name: total * share for name, share in shares.items()}
    for _ in range(10_000):
        overflow = sum(max(0.0, grown[name] - room[name]) for name in grown)
        if overflow < 1e-9:
            break
        grown = {name: min(value, room[name]) + overflow / len(grown) for name, value in grown.items()}
    return grown


@pytest.mark.parametrize("seed", range(200))
def test_growth_is_the_authors_within_a_weight_and_sums_exactly(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    names = [str(i) for i in range(draw(1, 7))]
    sizes = {name: draw(1, 3000) for name in names}
    kept = {name: draw(0, size + 1) for name, size in sizes.items()}
    means = {name: float(torch.rand(1, generator=generator)) ** 4 for name in names}
    fraction = draw(1, 100) / 100
    dropped, grown = Proportional()(means, kept, sizes, fraction)
    assert sum(dropped.values()) == sum(grown.values())
    free = {name: sizes[name] - kept[name] + dropped[name] for name in names}
    assert all(0 <= grown[name] <= free[name] for name in names)
    assert all(dropped[name] <= fraction * kept[name] + 1e-9 for name in names)
    room = {name: math.floor(0.99 * slots) for name, slots in free.items()}
    if sum(room.values()) >= sum(dropped.values()):
        assert all(grown[name] <= room[name] for name in names)
        expected = authors(sum(dropped.values()), {n: m / sum(means.values()) for n, m in means.items()}, room)
        assert all(abs(grown[name] - expected[name]) < 1.001 for name in names)


def test_every_layer_keeps_a_weight() -> None:
    dropped, _ = Proportional()({"a": 1.0, "b": 0.0}, {"a": 1, "b": 1}, {"a": 50, "b": 50}, 0.99)
    assert dropped == {"a": 0, "b": 0}


def test_the_score_is_momentum_or_what_is_given() -> None:
    assert isinstance(Proportional().score, Momentum)
    assert isinstance(Proportional(Magnitude()).score, Magnitude)
    assert InPlace().score is None
