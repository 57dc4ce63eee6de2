"""Products with a weight of single kept values and a bit for each place, for the few rows of a step of generation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity.ops.cuda.blocks import precision

ROWS = 16  # of the weight, in a program; tensor cores take no fewer
BATCH = 16  # rows of x at once, for the same reason
BYTES = 32  # of the bits of each row, expanded at once


def linear(x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """``x W^T + bias`` for ``x [batch, width]``: ``[batch, out]``, in the dtype of x, with sums in float32.

    Bit j of ``bits[row, i]`` tells whether the weight has a value in column 8 i + j, and row r has the values
    ``starts[r] : starts[r + 1]``. The weight is read once for each 16 rows of x. It has not been timed.
    """
    x, values, bits, (batch, out) = x.contiguous(), values.contiguous(), bits.contiguous(), (len(x), len(bits))
    y = x.new_empty(batch, out)
    grid = (triton.cdiv(out, ROWS), triton.cdiv(batch, BATCH))
    with torch.cuda.device_of(x):
        _linear_kernel[grid](
            x, values, bits, starts.contiguous(), values if bias is None else bias.contiguous(), y, batch, width, out,
            bits.shape[1], ROWS=ROWS, BATCH=BATCH, BYTES=BYTES, BIASED=bias is not None, PRECISION=precision(),
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


@triton.jit
def _ones(byte):
    """How many bits of a byte are set, by arithmetic: the instruction for it has an eighth of its rate."""
    pairs = (byte * 0x08040201 >> 3) & 0x11111111
    return (pairs * 0x11111111 >> 28).to(tl.int32)


@triton.jit
def _next(value, at, byte, bit: tl.constexpr):
    """The weights of one bit of each byte, and the places of what follows."""
    kept = byte & (1 << bit) != 0
    return tl.load(value + at, mask=kept, other=0.0), at + kept.to(tl.int32)


@triton.jit
def _linear_kernel(
    x, values, bits, starts, bias, y, batch, width, out, length, ROWS: tl.constexpr, BATCH: tl.constexpr,
    BYTES: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of some rows of the weight with some rows of x."""
    rows, items = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    row = bits + rows.to(tl.int64)[:, None] * length
    item = x + items.to(tl.int64)[None, :] * width
    value = values + tl.load(starts + rows, mask=rows < out, other=0)[:, None]  # the next one of each row
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for first in range(0, length, BYTES):
        each = first + tl.arange(0, BYTES)[None, :]
        byte = tl.load(row + each, mask=(rows < out)[:, None] & (each < length), other=0).to(tl.uint32)
        counts = _ones(byte)
        at = tl.cumsum(counts, 1) - counts
        w0, at = _next(value, at, byte, 0)
        w1, at = _next(value, at, byte, 1)
        w2, at = _next(value, at, byte, 2)
        w3, at = _next(value, at, byte, 3)
        w4, at = _next(value, at, byte, 4)
        w5, at = _next(value, at, byte, 5)
        w6, at = _next(value, at, byte, 6)
        w7, at = _next(value, at, byte, 7)
        even, odd = tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7))
        weight = tl.reshape(tl.join(even, odd), (ROWS, BYTES * 8))
        value += tl.sum(counts, 1)[:, None]
        column = first * 8 + tl.arange(0, BYTES * 8)
        inputs = tl.load(item + column[:, None], mask=(column < width)[:, None] & (items < batch)[None, :], other=0.0)
        total = tl.dot(weight, inputs, total, input_precision=PRECISION)
    if BIASED:
        total += tl.load(bias + rows, mask=rows < out, other=0.0).to(tl.float32)[:, None]
    to = y + items.to(tl.int64)[None, :] * out + rows[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=(items < batch)[None, :] & (rows < out)[:, None])
