"""Sampled N:M masks: a Gumbel-softmax over the masks that a group of weights can have."""

import math
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsity.ops import cuda

CHUNK = 1 << 18  # logits worked on together: what bounds the extra memory
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: multiples of it are far from one another


@cache
def candidates(n: int, m: int) -> Tensor:
    """All masks of m weights that keep n, float32 ``[C(m, n), m]``, in lexical order of what they keep."""
    kept = torch.tensor(list(combinations(range(m), n)))
    return torch.zeros(math.comb(m, n), m).scatter_(1, kept, 1.0)


def gumbel_nm_mask(logits: Tensor, n: int, m: int, scale: float, temperature: float, seed: int) -> Tensor:
    """Soft N:M masks ``[groups, m]`` by logits ``[C(m, n), groups]`` of the candidates: values in [0, 1], n in sum.

        y = softmax((scale * logits + gumbel) / temperature)        mask = sum of candidates, weighted by y

    MaskLLM, Fang et al. (arXiv 2409.17481). The noise is Gumbel's and a hash of `seed` and of the place alone, the same
    on every device, so it is not stored: the backward pass, which gives the gradient of the logits, makes it again.
    Candidates are on axis 0, where a softmax over few of them is one pass over contiguous numbers, and everything
    happens in chunks that stay in the cache: some three times as fast on a CPU as `gumbel_softmax(logits) @ table`, and
    with no memory but the result. On a GPU float32 is one Triton kernel each way.

    Raises `ValueError` for logits that are not float32 or float64 of that shape, or a temperature that is not positive.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits must be float32 or float64, as their updates are small, got {logits.dtype}")
    if logits.ndim != 2 or len(logits) != math.comb(m, n):
        raise ValueError(f"expected logits [{math.comb(m, n)}, groups] for {n}:{m}, got {list(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    mask: Tensor = _Sample.apply(logits, n, m, scale, temperature, seed)  # type: ignore[no-untyped-call]  # torch's
    return mask


def best_nm_mask(logits: Tensor, n: int, m: int) -> Tensor:
    """The most likely N:M masks, bool ``[groups, m]``; among equals, the first candidate."""
    return candidates(n, m).to(logits.device).bool()[logits.argmax(0)]


def gumbel_nm_gradient(
    logits: Tensor, gradient: Tensor, n: int, m: int, scale: float, temperature: float, seed: int
) -> Tensor:
    """The gradient of the logits, of their shape, from that of the mask `gumbel_nm_mask` gave for the same settings."""
    if cuda.serves(logits):
        from sparsity.ops.cuda import gumbel as kernels

        return kernels.gradient(logits, gradient, candidates(n, m), scale, temperature, keys(seed))
    table, result = candidates(n, m).to(logits), torch.empty_like(logits)
    for start, y in _soft(logits, scale, temperature, seed):
        inner = table @ gradient[start : start + y.shape[1]].T
        inner -= (y * inner).sum(0)
        torch.mul(inner.mul_(scale / temperature), y, out=result[:, start : start + y.shape[1]])
    return result


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, n: int, m: int, scale: float, temperature: float, seed: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.settings = (n, m, scale, temperature, seed)
        if cuda.serves(logits):
            from sparsity.ops.cuda import gumbel as kernels

            return kernels.mask(logits, candidates(n, m), scale, temperature, keys(seed))
        table, mask = candidates(n, m).to(logits), logits.new_empty(logits.shape[1], m)
        for start, y in _soft(logits, scale, temperature, seed):
            torch.mm(y.T, table, out=mask[start : start + y.shape[1]])
        return mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        n, m, scale, temperature, seed = ctx.settings
        return gumbel_nm_gradient(logits, gradient, n, m, scale, temperature, seed), None, None, None, None, None


def _soft(logits: Tensor, scale: float, temperature: float, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Chunk by chunk: where it starts, and the weights of the candidates ``[candidates, chunk]``."""
    size = max(1, CHUNK // len(logits))
    for start in range(0, logits.shape[1], size):
        part = logits[:, start : start + size]
        noise = _uniform(start, part, *keys(seed))
        noise.log_().neg_().log_()  # the log of an exponential variable; Gumbel's is its negative
        y = torch.sub(part * scale, noise).div_(temperature)
        yield start, torch.softmax(y, 0)


def keys(seed: int) -> tuple[int, int]:
    """Two numbers of 32 bits, with sign, by the mixing of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = seed + 0x9E3779B97F4A7C15 & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    x ^= x >> 31
    return _signed(x), _signed(x >> 32)


def _signed(x: int) -> int:
    return (x + (1 << 31) & (1 << 32) - 1) - (1 << 31)


def _uniform(start: int, like: Tensor, first: int, second: int) -> Tensor:
    """Numbers in (0, 1), the middles of 2^23 intervals: for each candidate and each group from `start` on."""
    groups = torch.arange(start, start + like.shape[1], device=like.device).add_(first).to(torch.int32)
    lanes = torch.tensor([[_signed(second + GOLDEN * i)] for i in range(len(like))], dtype=torch.int32)
    bits = _mixed(_mixed(groups) ^ lanes.to(like.device))
    return (bits >> 9).to(like.dtype).add_(0.5).mul_(2.0**-23).add_(0.5)


def _mixed(x: Tensor) -> Tensor:
    """A hash of integers of 32 bits, in place: Wellons' hash-prospector, of low bias."""
    for shift, factor in ((16, 0x21F0AAAD), (15, _signed(0xD35A2D97)), (15, 1)):
        x ^= (x >> shift).bitwise_and_((1 << 32 - shift) - 1)  # `>>` repeats the sign
        if factor != 1:
            x *= factor
    return x
