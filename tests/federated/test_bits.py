"""Masks as bytes: exact, short, and strict."""

import math

import pytest
import torch
import zstandard

from sparsity import InputError
from sparsity.federated import bits


def mask(size: int, density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("density", [0.0, 1e-4, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (300, 784), (3, 5, 3, 3)])
def test_every_mask_comes_back(density: float, shape: tuple[int, ...]) -> None:
    before = mask(math.prod(shape), density).reshape(shape)
    assert torch.equal(bits.decode(bits.encode(before), shape), before)


def test_long_gaps_at_their_borders() -> None:
    for gap in (0, 1, 254, 255, 256, 509, 510, 511, 5000):
        before = torch.zeros(gap + 40_000, dtype=torch.bool)
        before[gap] = before[-1] = True
        assert torch.equal(bits.decode(bits.encode(before), (len(before),)), before)


@pytest.mark.parametrize("density", [0.05, 0.08, 0.1, 0.12, 0.13, 0.14, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, 0.95])
def test_within_five_percent_of_the_bound(density: float) -> None:
    before = mask(1_000_000, density)
    assert len(bits.encode(before)) <= 1.05 * bits.entropy_bound(before)


def test_the_bound_by_hand() -> None:
    assert bits.entropy_bound(mask(800, 0.0)) == 0
    assert bits.entropy_bound(mask(800, 1.0)) == 0
    half = torch.arange(800) % 2 == 0
    assert bits.entropy_bound(half) == pytest.approx(100)
    quarter = torch.arange(800) % 4 == 0
    assert bits.entropy_bound(quarter) == pytest.approx(100 * (2 * 0.25 + math.log2(4 / 3) * 0.75))


@pytest.mark.parametrize("density", [0.01, 0.3, 0.99])
def test_nothing_else_is_taken_for_a_mask(density: float) -> None:
    before = mask(10_000, density)
    data = bits.encode(before)
    for wrong in (b"", data[:1], data[:-1], data[: len(data) // 2], data + b"\0", data + data, b"\7" + data[1:]):
        with pytest.raises(InputError):
            bits.decode(wrong, (10_000,))
    for shape in ((9_000,), (9_992,), (100, 99)) if density == 0.3 else ((100,),):
        with pytest.raises(InputError):
            bits.decode(data, shape)
    refused = 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        try:
            assert torch.equal(bits.decode(bytes(changed), (10_000,)), before) or place == 0
        except InputError:
            refused += 1
    assert refused >= len(data) - 3, "a few bits of a frame's header mean nothing"


def test_a_small_frame_cannot_become_a_large_one() -> None:
    bomb = bits.encode(torch.zeros(80_000_000, dtype=torch.bool))
    assert len(bomb) < 20_000
    with pytest.raises(InputError):
        bits.decode(b"\0" + zstandard.ZstdCompressor().compress(bytes(10_000_000)), (800,))


def test_a_mask_that_lies_about_its_end() -> None:
    with pytest.raises(InputError, match="of 11 bytes was expected, got a frame of 10"):
        bits.decode(bits.encode(torch.arange(80) % 2 == 0), (81,))
    with pytest.raises(InputError, match="there is more"):
        bits.decode(bits.encode(torch.arange(80) % 2 == 1), (79,))
