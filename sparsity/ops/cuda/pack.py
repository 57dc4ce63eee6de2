"""N:M selection and packing in one pass over the weight, and its reverse: see `sparsity.ops.pack`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # groups of a program: a multiple of 8, whose indices fill whole bytes


def pack(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Values and indices of ``weight [..., in]``, for m of 2, 4, 8 or 16."""
    weight, groups, bits = weight.contiguous(), weight.shape[-1] // m, n * (m - 1).bit_length()
    values = weight.new_empty(*weight.shape[:-1], groups * n)
    indices = weight.new_empty(*weight.shape[:-1], -(-groups * bits // 8), dtype=torch.uint8)
    _run(_pack_kernel, weight, values, indices, n, m)
    return values, indices


def unpack(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """The weight ``[..., in]``."""
    values, indices = values.contiguous(), indices.contiguous()
    weight = values.new_empty(*values.shape[:-1], values.shape[-1] // n * m)
    _run(_unpack_kernel, weight, values, indices, n, m)
    return weight


def _run(kernel: Any, weight: Tensor, values: Tensor, indices: Tensor, n: int, m: int) -> None:
    groups, length = weight.shape[-1] // m, indices.shape[-1]
    blocks = triton.cdiv(groups, BLOCK)
    with torch.cuda.device_of(weight):
        kernel[(weight.numel() // weight.shape[-1] * blocks,)](
            weight, values, indices, groups, length, N=n, M=m, WIDTH=(m - 1).bit_length(), BLOCK=BLOCK
        )


@triton.jit
def _pack_kernel(
    weight, values, indices, groups, length, N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(groups, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    group, lane = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, M)
    here = (group < groups)[:, None]
    given = tl.load(weight + row * groups * M + group[:, None] * M + lane[None, :], mask=here, other=0.0)
    size = tl.abs(given.to(tl.float32)).to(tl.int32, bitcast=True)  # in order of the magnitudes, and NaN above all
    one, other = size[:, :, None], size[:, None, :]
    ahead = (other > one) | ((other == one) & (lane[None, None, :] < lane[None, :, None]))
    kept = tl.sum(ahead.to(tl.int32), 2) < N
    place = tl.cumsum(kept.to(tl.int32), 1) - 1
    tl.store(values + row * groups * N + group[:, None] * N + place, given, mask=kept & here)
    # The indices of a group as one number; eight groups make N * WIDTH whole bytes.
    words = tl.sum(tl.where(kept & here, lane[None, :].to(tl.int64) << place * WIDTH, 0), 1)
    words = tl.reshape(words, (BLOCK // 8, 8))
    for i in tl.static_range(N * WIDTH):
        shift = tl.arange(0, 8) * (N * WIDTH) - 8 * i
        left, right = tl.minimum(tl.maximum(shift, 0), 8), tl.minimum(tl.maximum(-shift, 0), 63)
        byte = tl.sum((words << left[None, :] >> right[None, :]) & 255, 1)
        at = (block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)) * (N * WIDTH) + i
        tl.store(indices + row * length + at, byte.to(tl.uint8), mask=at < length)


@triton.jit
def _unpack_kernel(
    weight, values, indices, groups, length, N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(groups, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    group, lane = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, M)
    here = group < groups
    result = tl.zeros((BLOCK, M), weight.dtype.element_ty)
    for i in tl.static_range(N):
        bit = (group * N + i) * WIDTH
        byte = indices + row * length + bit // 8
        low = tl.load(byte, mask=here, other=0).to(tl.int32)
        high = tl.load(byte + 1, mask=here & (bit // 8 + 1 < length), other=0).to(tl.int32)
        place = (low | high << 8) >> bit % 8 & (1 << WIDTH) - 1
        value = tl.load(values + (row * groups + group) * N + i, mask=here, other=0.0)
        result = tl.where(lane[None, :] == place[:, None], value[:, None], result)
    to = weight + (row * groups + group[:, None]) * M + lane[None, :]
    tl.store(to, result, mask=here[:, None])
