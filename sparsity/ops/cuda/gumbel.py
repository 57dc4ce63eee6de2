"""Sampled N:M masks and the gradient of their logits, each in one pass: see `sparsity.ops.gumbel` for the definitions.

The noise is made from the same bits as there; results differ by the rounding of float32 only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # groups of a program


def mask(logits: Tensor, table: Tensor, scale: float, temperature: float, keys: tuple[int, int]) -> Tensor:
    """Soft masks ``[groups, m]`` by logits ``[candidates, groups]`` and the table ``[candidates, m]`` of candidates."""
    logits, table = logits.contiguous(), table.to(logits.device)
    found = logits.new_empty(logits.shape[1], table.shape[1])
    with torch.cuda.device_of(logits):
        _mask_kernel[(triton.cdiv(len(found), BLOCK),)](
            logits, table, found, len(found), scale, 1 / temperature, *keys, **_sizes(table)
        )
    return found


def gradient(
    logits: Tensor, slopes: Tensor, table: Tensor, scale: float, temperature: float, keys: tuple[int, int]
) -> Tensor:
    """The gradient of the logits from ``slopes [groups, m]`` of the masks."""
    logits, slopes, table = logits.contiguous(), slopes.contiguous(), table.to(logits.device)
    found = torch.empty_like(logits)
    with torch.cuda.device_of(logits):
        _gradient_kernel[(triton.cdiv(len(slopes), BLOCK),)](
            logits, table, slopes, found, len(slopes), scale, 1 / temperature, *keys, **_sizes(table)
        )
    return found


def _sizes(table: Tensor) -> dict[str, int]:
    count, m = table.shape
    return {"COUNT": count, "M": m, "LANES": triton.next_power_of_2(m), "UNROLL": min(count, 8), "BLOCK": BLOCK}


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _sampled(logits, groups, group, here, candidate, scale, coldness, first, second):
    """``(scale * logits + gumbel) / temperature`` of one candidate."""
    lane = (second.to(tl.int64) + candidate * -0x61C88647).to(tl.uint32)  # modulo 2^32, 0x9E3779B9 times
    bits = _mixed(_mixed((group + first).to(tl.uint32)) ^ lane)
    uniform = ((bits.to(tl.int32, bitcast=True) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07 + 0.5
    logit = tl.load(logits + candidate * groups.to(tl.int64) + group, mask=here, other=0.0)
    return (logit * scale - tl.log(-tl.log(uniform))) * coldness


@triton.jit(do_not_specialize=["first", "second"])
def _mask_kernel(
    logits, table, found, groups, scale, coldness, first, second, COUNT: tl.constexpr, M: tl.constexpr,
    LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LANES)
    here = group < groups
    most = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # of -inf, no difference could be taken
    total, sums = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, LANES), tl.float32)
    for candidate in tl.range(0, COUNT, loop_unroll_factor=UNROLL):
        y = _sampled(logits, groups, group, here, candidate, scale, coldness, first, second)
        higher = tl.maximum(most, y)
        before, weight = tl.exp(most - higher), tl.exp(y - higher)
        kept = tl.load(table + candidate * M + lanes, mask=lanes < M, other=0.0)
        total, sums, most = total * before + weight, sums * before[:, None] + weight[:, None] * kept[None, :], higher
    to = found + group[:, None] * M + lanes[None, :]
    tl.store(to, sums / total[:, None], mask=here[:, None] & (lanes < M)[None, :])


@triton.jit(do_not_specialize=["first", "second"])
def _gradient_kernel(
    logits, table, slopes, found, groups, scale, coldness, first, second, COUNT: tl.constexpr, M: tl.constexpr,
    LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LANES)
    here = group < groups
    slope = tl.load(slopes + group[:, None] * M + lanes[None, :], mask=here[:, None] & (lanes < M)[None, :], other=0.0)
    most = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # of -inf, no difference could be taken
    total, mean = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for candidate in tl.range(0, COUNT, loop_unroll_factor=UNROLL):
        y = _sampled(logits, groups, group, here, candidate, scale, coldness, first, second)
        higher = tl.maximum(most, y)
        before, weight = tl.exp(most - higher), tl.exp(y - higher)
        kept = tl.load(table + candidate * M + lanes, mask=lanes < M, other=0.0)
        inner = tl.sum(slope * kept[None, :], 1)
        total, mean, most = total * before + weight, mean * before + weight * inner, higher
    mean /= total
    for candidate in tl.range(0, COUNT, loop_unroll_factor=UNROLL):
        y = _sampled(logits, groups, group, here, candidate, scale, coldness, first, second)
        kept = tl.load(table + candidate * M + lanes, mask=lanes < M, other=0.0)
        inner = tl.sum(slope * kept[None, :], 1)
        result = scale * coldness * (tl.exp(y - most) / total) * (inner - mean)
        tl.store(found + candidate * groups.to(tl.int64) + group, result, mask=here)
