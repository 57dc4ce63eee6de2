"""Products with a weight of square blocks, at its kept blocks only: see `sparsity.ops.blocks` for the definitions.

What is compiled depends on the side, the dtype and whether sizes are multiples of tiles, never on which blocks are
kept. Sums are in float32. Products of float32 are so too, unless torch is told to do with TF32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity.ops import cuda
from sparsity.ops.linear import rows_of
from sparsity.ops.product import Remembered

GROUP = 4  # tiles of a batch that are worked on together: their blocks come from the cache
WAVES = 2  # programs for each multiprocessor, below which sums over the batch are split


class Topology(NamedTuple):
    """Which blocks are kept: the block row of each; and by block columns, which and of what row, and the starts."""

    rows: Tensor
    order: Tensor
    turned_rows: Tensor
    turned_starts: Tensor


class Tiles(NamedTuple):
    """Sizes that kernels are compiled for: rows of the batch, numbers summed at once, warps, and steps in memory."""

    rows: int
    step: int
    warps: int
    buffers: int


def linear(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, out: int, activation: str | None
) -> Tensor:
    """``activation(x W^T + bias)`` for ``x [batch, in]``: ``[batch, out]``."""
    return _product(x, values, None, columns, starts, bias, out, activation)


def linear_input(y: Tensor, values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    """``y W`` for ``y [batch, out]``: ``[batch, width]``."""
    kept = _topology(columns, starts, -(-width // values.shape[-1]))
    return _product(y, values, kept.order, kept.turned_rows, kept.turned_starts, None, width, None)


def linear_values(y: Tensor, x: Tensor, columns: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """``y^T x`` at the kept blocks, written to ``values [blocks, side, side]``, zero beyond the matrix."""
    y, x, count, side = y.contiguous(), x.contiguous(), len(columns), values.shape[-1]
    if count == 0:
        return values
    kept, tiles = _topology(columns, starts, -(-x.shape[1] // side)), _tiles(x, side, side)
    steps = -(-len(x) // tiles.step)
    parts = max(1, min(steps, WAVES * cuda.processors(x) // count))
    sums = values if parts == 1 else values.new_empty(parts, *values.shape, dtype=torch.float32)
    even = len(x) % tiles.step == 0 and y.shape[1] % side == 0 and x.shape[1] % side == 0
    with torch.cuda.device_of(x):
        _values_kernel[count, parts](
            y, x, kept.rows, columns.contiguous(), sums, len(x), y.shape[1], x.shape[1], -(-steps // parts), SIDE=side,
            STEP=tiles.step, EVEN=even, PRECISION=precision(), num_warps=tiles.warps, num_stages=tiles.buffers,
        )  # fmt: skip
    return values if parts == 1 else sums.sum(0).to(values.dtype)


def _product(
    x: Tensor, values: Tensor, order: Tensor | None, sources: Tensor, starts: Tensor, bias: Tensor | None, out: int,
    activation: str | None,
) -> Tensor:  # fmt: skip
    """With the blocks as they are, or with each turned and the p-th being the block ``order[p]``."""
    x, values, side, (batch, width) = x.contiguous(), values.contiguous(), values.shape[-1], x.shape
    tiles = _tiles(x, side, batch)
    y = x.new_empty(batch, out)
    grid = (-(-batch // tiles.rows) * -(-out // side),)
    with torch.cuda.device_of(x):
        _product_kernel[grid](
            x, values, values if order is None else order, sources.contiguous(), starts.contiguous(),
            values if bias is None else bias.contiguous(), y, batch, width, out, SIDE=side, ROWS=tiles.rows,
            STEP=min(side, tiles.step), GROUP=GROUP, TURNED=order is not None, BIASED=bias is not None,
            ACTIVATION=activation, EVEN=width % side == 0 and out % side == 0, PRECISION=precision(),
            num_warps=tiles.warps, num_stages=2 * tiles.buffers - 1,  # numbers wait for their places, so stages are two
        )  # fmt: skip
    return y


def _tiles(x: Tensor, side: int, batch: int) -> Tiles:
    """By the side and the dtype, by the batch where that is small, and by whether rows begin at whole 16 bytes."""
    wide = x.element_size() == 4
    most = 256 if side == 128 and not wide and x.shape[1] * x.element_size() % 16 == 0 else 128
    rows = next((each for each in (16, 32, 64, 128) if batch <= each), most)
    step = 16 if wide else 64
    buffers = cuda.shared_memory(x) // ((rows + side) * step * x.element_size())
    return Tiles(rows, step, 8 if rows * side >= 128 * 128 else 4 if side > 32 else 2, max(1, min(3, buffers)))


def precision() -> str:
    """How products of float32 are taken: as torch's own."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


_KNOWN = Remembered()


def _topology(columns: Tensor, starts: Tensor, width: int) -> Topology:
    """Made on the device, without waiting for it, and once for tensors that do not change."""
    found: Topology | None = _KNOWN.find(columns, starts, width)
    if found is None:
        rows = rows_of(columns, starts).int()
        ordered, order = columns.sort(stable=True)
        bounds = torch.arange(width + 1, dtype=columns.dtype, device=columns.device)
        found = Topology(rows, order.int(), rows[order], torch.searchsorted(ordered, bounds))
        _KNOWN.keep(columns, starts, width, found=found)
    return found


@triton.jit
def _product_kernel(
    x, values, order, sources, starts, bias, y, batch, width, out, SIDE: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, GROUP: tl.constexpr, TURNED: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``y [batch, out]``: of ROWS rows, and of the columns that one row of blocks gives."""
    tiles, strips = tl.cdiv(batch, ROWS), tl.cdiv(out, SIDE)
    program, group = tl.program_id(0), GROUP * strips
    first = program // group * GROUP
    here = tl.minimum(tiles - first, GROUP)
    tile, strip = first + program % group % here, program % group // here

    rows, lanes, steps = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, SIDE), tl.arange(0, STEP)
    columns = strip * SIDE + lanes
    row = x + (rows % batch).to(tl.int64)[:, None] * width  # rows beyond the batch are computed and not stored
    total = tl.zeros((ROWS, SIDE), tl.float32)
    parts: tl.constexpr = SIDE // STEP
    for i in range(tl.load(starts + strip) * parts, tl.load(starts + strip + 1) * parts):
        block, k = i // parts, (i % parts * STEP + steps).to(tl.int32)
        source = tl.load(sources + block) * SIDE + k
        if TURNED:
            cell = values + tl.load(order + block).to(tl.int64) * (SIDE * SIDE) + k[:, None] * SIDE + lanes[None, :]
        else:
            cell = values + block * (SIDE * SIDE) + lanes[None, :] * SIDE + k[:, None]
        if EVEN:
            left, right = tl.load(row + source[None, :]), tl.load(cell)
        else:
            inside = source < width
            left = tl.load(row + source[None, :], mask=inside[None, :], other=0.0)
            right = tl.load(cell, mask=inside[:, None] & (columns < out)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if BIASED:
        total += tl.load(bias + columns, mask=columns < out, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)  # NaN stays, as in torch
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    elif ACTIVATION == "silu":
        total = total * tl.sigmoid(total)
    place = y + rows.to(tl.int64)[:, None] * out + columns[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(rows < batch)[:, None] & (columns < out)[None, :])


@triton.jit
def _values_kernel(
    y, x, rows, columns, values, batch, out, width, share, SIDE: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The slopes of one block, or of those the part that `share` steps over the batch give."""
    block, part, lanes = tl.program_id(0), tl.program_id(1), tl.arange(0, SIDE)
    row, column = tl.load(rows + block) * SIDE + lanes, tl.load(columns + block) * SIDE + lanes
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for step in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(batch, STEP))):
        each = step * STEP + tl.arange(0, STEP)
        left = y + each.to(tl.int64)[:, None] * out + row[None, :]
        right = x + each.to(tl.int64)[:, None] * width + column[None, :]
        if EVEN:
            slopes, inputs = tl.load(left), tl.load(right)
        else:
            given = (each < batch)[:, None]
            slopes = tl.load(left, mask=given & (row < out)[None, :], other=0.0)
            inputs = tl.load(right, mask=given & (column < width)[None, :], other=0.0)
        total = tl.dot(tl.trans(slopes), inputs, total, input_precision=PRECISION)
    inside = (row < out)[:, None] & (column < width)[None, :]
    total = tl.where(inside, total, 0.0)  # also where zeros met what is not finite
    place = values + (part * tl.num_programs(0) + block).to(tl.int64) * (SIDE * SIDE)
    tl.store(place + lanes[:, None] * SIDE + lanes[None, :], total.to(values.dtype.element_ty))
