"""Sampled N:M masks against the definition, Gumbel's own property, and finite differences."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparsity.ops import best_nm_mask, candidates, gumbel_nm_gradient, gumbel_nm_mask
from sparsity.ops import gumbel as module

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (1, 16)]


def logits(n: int, m: int, groups: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(math.comb(m, n), groups, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_candidates_are_all_masks_once(n: int, m: int) -> None:
    table = candidates(n, m)
    expected = {tuple(float(i in kept) for i in range(m)) for kept in combinations(range(m), n)}
    assert {tuple(row.tolist()) for row in table} == expected
    assert len(table) == len(expected)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_masks_are_in_0_1_and_sum_to_n(n: int, m: int, dtype: torch.dtype) -> None:
    mask = gumbel_nm_mask(logits(n, m, 501, dtype), n, m, 2.0, 0.7, seed=3)
    assert mask.shape == (501, m)
    assert mask.dtype == dtype
    assert mask.min() >= 0
    assert mask.max() <= 1 + 1e-6
    torch.testing.assert_close(mask.sum(1), torch.full((501,), float(n), dtype=dtype))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)])
def test_gradient_by_finite_differences(n: int, m: int) -> None:
    start = logits(n, m, 5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gumbel_nm_mask(x, n, m, 1.5, 0.8, 11), start)


def test_gradient_function_is_the_backward_pass() -> None:
    start, upstream = logits(2, 4, 77).requires_grad_(), torch.randn(77, 4)
    torch.autograd.backward(gumbel_nm_mask(start, 2, 4, 3.0, 2.0, 5), upstream)
    torch.testing.assert_close(start.grad, gumbel_nm_gradient(start.detach(), upstream, 2, 4, 3.0, 2.0, 5))


def test_cold_samples_have_the_odds_of_the_logits() -> None:
    """The Gumbel-max property: the largest of scale * logit + noise is drawn with the softmax's probability."""
    one = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -3.0], dtype=torch.float64)
    groups = 200_000
    mask = gumbel_nm_mask(one[:, None].expand(6, groups).contiguous(), 2, 4, 1.5, 1e-4, seed=1)
    drawn = (mask.round() @ candidates(2, 4).double().T == 2).double().mean(0)
    expected = (1.5 * one).softmax(0)
    deviation = (expected * (1 - expected) / groups).sqrt()
    assert ((drawn - expected).abs() < 5 * deviation).all()


def test_noise_is_gumbels() -> None:
    """With one logit per group fixed, log-odds of two candidates are logistic: mean 0, variance pi^2 / 3."""
    groups = 100_000
    mask = gumbel_nm_mask(torch.zeros(2, groups, dtype=torch.float64), 1, 2, 1.0, 1.0, seed=2)
    odds = (mask[:, 0] / mask[:, 1]).log()
    assert abs(float(odds.mean())) < 5 * math.pi / math.sqrt(3 * groups)
    assert float(odds.var()) == pytest.approx(math.pi**2 / 3, rel=0.03)


def test_seeds_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    start = logits(2, 4, 1000)
    first, again, other = (gumbel_nm_mask(start, 2, 4, 1.0, 1.0, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    monkeypatch.setattr(module, "CHUNK", 600)  # 100 groups at a time
    mask = gumbel_nm_mask(start.double().requires_grad_(), 2, 4, 1.0, 1.0, 1)
    assert mask.shape == (1000, 4)
    assert not torch.equal(mask[:100], mask[100:200])
    small = start[:, :301].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gumbel_nm_mask(x, 2, 4, 1.0, 1.0, 1)[::50], small)


def test_noise_is_of_the_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    start = logits(2, 4, 1000, torch.float64)
    whole = gumbel_nm_mask(start, 2, 4, 1.0, 1.0, 1)
    part = gumbel_nm_mask(start[:, :70].contiguous(), 2, 4, 1.0, 1.0, 1)
    torch.testing.assert_close(part, whole[:70])
    torch.testing.assert_close(gumbel_nm_mask(start.float(), 2, 4, 1.0, 1.0, 1).double(), whole, rtol=0, atol=1e-5)
    monkeypatch.setattr(module, "CHUNK", 600)
    torch.testing.assert_close(gumbel_nm_mask(start, 2, 4, 1.0, 1.0, 1), whole)


def hashed(x: int) -> int:
    """Of 32 bits, in Python's integers."""
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def test_uniform_numbers_by_pythons_integers() -> None:
    for start in (0, 7, 2**31 - 2, 2**32 - 1):
        found = module._uniform(start, torch.empty(6, 5), -3, 2**31 - 1)
        for candidate in range(6):
            for i in range(5):
                bits = hashed(hashed((start + i - 3) % 2**32) ^ (2**31 - 1 + 0x9E3779B9 * candidate) % 2**32)
                expected = ((bits - 2**32 * (bits >> 31) >> 9) + 0.5) / 2**23 + 0.5
                assert float(found[candidate, i]) == expected
                assert 0 < expected < 1


def test_uniform_numbers_are_uniform_and_independent() -> None:
    first, second = (module._uniform(0, torch.empty(6, 1 << 17), *module.keys(seed)).double() for seed in (1, 2))
    bins = 256
    for each in (first, second):
        counts = (each.flatten() * bins).long().bincount(minlength=bins).double()
        mean = each.numel() / bins
        assert abs(float(((counts - mean) ** 2 / mean).sum()) - (bins - 1)) < 5 * math.sqrt(2 * bins)
    pairs = [(first[0], first[1]), (first[0][1:], first[0][:-1]), (first[2], second[2]), (first[0][1:], second[0][:-1])]
    for one, other in pairs:
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / math.sqrt(len(one))


def test_best_mask_is_the_likeliest_candidate() -> None:
    start = logits(2, 4, 50)
    best = best_nm_mask(start, 2, 4)
    for group, mask in enumerate(best):
        row = max(range(6), key=lambda index, group=group: float(start[index, group]))  # type: ignore[misc]  # a default
        assert torch.equal(mask, candidates(2, 4)[row].bool())
    assert torch.equal(best_nm_mask(torch.zeros(6, 1), 2, 4), torch.tensor([[True, True, False, False]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="logits must be float32 or float64, as their updates are small"):
        gumbel_nm_mask(logits(2, 4, 3).to(dtype), 2, 4, 1.0, 1.0, 0)


def test_shapes_and_temperatures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits \[6, groups\] for 2:4, got \[3, 6\]"):
        gumbel_nm_mask(torch.zeros(3, 6), 2, 4, 1.0, 1.0, 0)
    with pytest.raises(ValueError, match="the temperature must be above 0, got 0"):
        gumbel_nm_mask(torch.zeros(6, 3), 2, 4, 1.0, 0.0, 0)
