"""Sums in whole numbers: what fractions come to, the same bits in C++, and nothing missed that may not be added."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sparsity.ops.sums import CHUNK, add_whole_, look

SIZES = (0, 1, 7, 64, 1001, 2 * CHUNK + 3)
FLOATS = (torch.float32, torch.float64)
SCALE, PARTS = 3 * 2.0**6, 2.0**46


def awkward(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of all magnitudes, zeros of both signs, halves, and the smallest there are."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(size, generator=generator, dtype=torch.float64)
    found *= 10.0 ** torch.randint(-20, 8, (size,), generator=generator)
    special = torch.tensor([0.0, -0.0, 0.5, 1.5, -2.5, 2.0**-7, 1e-310, 2.0**-53, -(2.0**30)], dtype=torch.float64)
    found[: len(special)] = special[:size]
    return found.to(dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", FLOATS)
def test_they_are_what_fractions_come_to(dtype: torch.dtype) -> None:
    rows = [awkward(60, dtype, seed) for seed in range(5)]
    upper, lower = torch.zeros(60, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    for row in rows:
        add_whole_(upper, lower, row, SCALE, PARTS)
    for place in range(60):
        above = below = 0
        for row in rows:
            addend = Fraction(float(row[place]) * SCALE)  # Python, too, rounds halves to even numbers
            above += round(addend)
            below += round(Fraction(float((addend - round(addend)) * Fraction(PARTS))))
        assert (float(upper[place]), float(lower[place])) == (above, below)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.bfloat16])
def test_they_are_the_same_bits_at_every_size(size: int, dtype: torch.dtype) -> None:
    values = awkward(size, dtype)
    values[~values.isfinite()] = 1.0  # float16's
    wide = values.double()
    whole = (wide * SCALE).round()
    expected = whole, ((wide * SCALE - whole) * PARTS).round()
    upper, lower = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    add_whole_(upper, lower, values, SCALE, PARTS)
    assert torch.equal(upper, expected[0])
    assert torch.equal(lower, expected[1])


@pytest.mark.usefixtures("backend")
def test_values_that_lie_apart() -> None:
    values = awkward(200)[::2]
    found, expected = torch.zeros(2, 100, dtype=torch.float64), torch.zeros(2, 100, dtype=torch.float64)
    add_whole_(found[0], found[1], values, SCALE, PARTS)
    add_whole_(expected[0], expected[1], values.clone(), SCALE, PARTS)
    assert torch.equal(found, expected)
    assert look(values, torch.zeros(100, dtype=torch.bool)) == look(values.clone(), torch.zeros(100, dtype=torch.bool))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_look_finds_the_largest_and_the_strays(size: int, dtype: torch.dtype) -> None:
    values = awkward(size, dtype)
    mask = torch.rand(size // 2, generator=torch.Generator().manual_seed(1)) < 0.5
    numbers, kept = values.tolist(), mask.tolist()
    strays = sum(1 for number, keeps in zip(numbers, kept, strict=False) if number != 0 and not keeps)
    assert look(values, mask) == (max(map(abs, numbers), default=0.0), sum(kept), strays)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 500, 1000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_that_is_not_finite_is_missed(bad: float, place: int, dtype: torch.dtype) -> None:
    values = awkward(1001, dtype)
    values[place] = bad
    mask = torch.ones(1001, dtype=torch.bool)
    assert not math.isfinite(look(values, mask).largest)
    assert look(values, mask).strays == 0
    mask[place] = False
    assert look(values, mask).strays == 1, "and it does not hide among pruned weights"
