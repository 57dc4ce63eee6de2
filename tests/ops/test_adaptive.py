"""`adaptive_counts` against LAMP's formula, written out in Python's own floats."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sparsity.ops import adaptive_counts
from sparsity.scores import lamp


def slow(tensors: list[Tensor], k: int) -> list[int]:
    """Every score by the definition; the k highest, the first tensor's first among equals."""
    scored = []
    for index, tensor in enumerate(tensors):
        total = 0.0
        for value in sorted((float(v) for v in tensor.flatten() if v >= 0), reverse=True):
            total += value * value
            scored.append((-(value * value / total if total else 0.0), index))
    chosen = [index for _, index in sorted(scored)[:k]]
    return [chosen.count(index) for index in range(len(tensors))]


def random_tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    tensors = []
    for _ in range(draw(6)):
        tensor = torch.randn(draw(800), generator=generator, dtype=torch.float64).abs() * 10.0 ** (draw(7) - 4)
        kind = draw(5)
        if kind == 1:
            tensor = tensor.round(decimals=1)
        if kind == 2:
            tensor[torch.rand(tensor.shape, generator=generator) < 0.5] = 0
        if kind == 3:
            tensor[torch.rand(tensor.shape, generator=generator) < 0.5] = -math.inf
        tensors.append(tensor if seed % 2 else tensor.float())
    return tensors


@pytest.mark.parametrize("seed", range(30))
def test_counts_are_those_of_the_formula(seed: int) -> None:
    tensors = random_tensors(seed)
    size = sum(int((tensor >= 0).sum()) for tensor in tensors)
    for k in {1, min(size, len(tensors)), max(1, size // 50), max(1, size // 10), max(1, size // 2), size} - {0}:
        if k <= size:
            found = adaptive_counts(tensors, k)
            assert sum(found) == k
            assert found == slow(tensors, k)


def test_by_hand() -> None:
    # Squares 16, 9 and 4, 1 score 1, 9/25 and 1, 1/5: in order 1, 1, 0.36, 0.2.
    tensors = [torch.tensor([4.0, 3.0]), torch.tensor([1.0, 2.0])]
    assert [adaptive_counts(tensors, k) for k in (1, 2, 3, 4)] == [[1, 0], [1, 1], [2, 1], [2, 2]]


def test_equal_magnitudes_are_a_harmonic_series() -> None:
    # n equal weights score 1, 1/2, ... 1/n: of 10 and 1,000 equal ones, the 20 highest are the first ten of both.
    assert adaptive_counts([torch.ones(10), torch.full((1000,), 1e-3)], 20) == [10, 10]


def test_zeros_come_last_and_pruned_ones_not_at_all() -> None:
    tensors = [torch.zeros(5), torch.tensor([1e-30, -math.inf, 1e-20])]
    assert adaptive_counts(tensors, 2) == [0, 2]
    assert adaptive_counts(tensors, 4) == [2, 2]
    with pytest.raises(ValueError, match=r"k must lie in \[1, 7\], the number of elements; got k=8"):
        adaptive_counts(tensors, 8)
    with pytest.raises(ValueError, match="got k=0"):
        adaptive_counts(tensors, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(300).abs().to(dtype), (3 * torch.randn(70).abs()).to(dtype)]
    assert adaptive_counts(tensors, 40) == slow(tensors, 40)


def test_denormal_weights_are_told_apart() -> None:
    tiny = torch.tensor([1e-44, 3e-44, 1e-40])
    exact = [Fraction(float(v)) ** 2 for v in tiny.sort(descending=True).values]
    scores = [float(square / sum(exact[: i + 1])) for i, square in enumerate(exact)]
    assert scores == pytest.approx([float(s) for s in lamp(tiny).sort(descending=True).values], rel=1e-6)
    assert adaptive_counts([tiny, torch.tensor([1.0, 0.1])], 3) == [1, 2]


def test_order_and_shape_do_not_matter() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(40, 50).abs(), torch.randn(7, 3, 3, 3).abs()]
    shuffled = [t.flatten()[torch.randperm(t.numel())] for t in tensors]
    assert adaptive_counts(tensors, 150) == adaptive_counts(shuffled, 150)


def test_layers_of_any_scale_count_alike() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(500).abs(), torch.randn(300).abs()
    assert adaptive_counts([one, other], 90) == adaptive_counts([one * 64, other / 1024], 90)
