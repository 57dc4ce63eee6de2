"""Linear layers by their kept blocks only: square blocks of the weight, in plain index and value tensors."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import linear
from sparsity.ops.linear import Rows, check_places, flattened, native_call, rows_of, wide

SIDES = (16, 32, 64, 128)


def compressed_blocks(weight: Tensor, mask: Tensor | None = None, side: int = 32) -> Rows:
    """A matrix ``[out, in]`` as its kept blocks: those that the mask keeps, or those that are not zero.

    Values are ``[blocks, side, side]``, in order of block rows, then block columns; columns, int32, say which block
    column each is, and block row r has the blocks ``starts[r] : starts[r + 1]``, int64. Where ``side`` does not divide
    the matrix, the last blocks are filled up with zeros. Gradients reach the weight.

    Raises `ValueError` for anything but a matrix, a side that is not 16, 32, 64 or 128, and a mask that keeps a block
    in part.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix [out, in], got a tensor of shape {tuple(weight.shape)}")
    if side not in SIDES:
        raise ValueError(f"blocks are squares with a side of {', '.join(map(str, SIDES))}, got {side}")
    blocks = _cut(weight, side)
    if mask is None:
        kept = (blocks != 0).flatten(2).any(2)
    else:
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(f"expected a bool mask of {tuple(weight.shape)}, got {mask.dtype} of {tuple(mask.shape)}")
        kept, partly = _blocks_of(mask, side)
        if bool(partly.any()):
            row, column = partly.nonzero()[0].tolist()
            raise ValueError(
                f"the mask keeps the block of {side} x {side} in block row {row}, block column {column} in part: "
                "prune by blocks of that size"
            )
    rows, columns = kept.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(kept))
    return blocks[rows, columns], columns.to(torch.int32), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def decompressed_blocks(values: Tensor, columns: Tensor, starts: Tensor, out: int, width: int) -> Tensor:
    """The matrix ``[out, width]`` that `compressed_blocks` had: what the operations here are defined by."""
    side = values.shape[-1]
    empty = values.new_zeros(len(starts) - 1, -(-width // side), side, side)
    blocks = empty.index_put((rows_of(values, starts), columns.long()), values, accumulate=True)
    return rearrange(blocks, "row column r c -> (row r) (column c)")[:out, :width]


def block_sparse_linear(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, out: int, bias: Tensor | None = None
) -> Tensor:
    """``x W^T + bias`` for ``x [..., in]`` and a weight ``[out, in]`` in blocks (`compressed_blocks`): ``[..., out]``.

    As `sparse_linear` in everything else: gradients of x, the values and the bias, C++ on a CPU, the dense matrix
    elsewhere. An index for a whole block leaves the processor to its arithmetic, so blocks pay at higher densities.

    Raises `ValueError` for tensors that do not fit one another, and `IndexError` for columns out of range.
    """
    x, values, bias = linear.autocasted(x, values, bias)
    found: Tensor = torch.ops.sparsity.blocks(x, values, columns, starts, bias, out)
    return found


@torch.library.custom_op("sparsity::blocks", mutates_args=())
def _blocks(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, out: int) -> Tensor:
    width = x.shape[-1]
    _check(values, columns, starts, x, None, out, width)
    if bias is not None and (bias.shape != (out,) or bias.dtype != x.dtype):
        raise ValueError(f"expected a bias of {out} {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    if not linear.is_native(x, values):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, decompressed_blocks(values, columns, starts, out, width), bias)
    flat, bias = wide(flattened(x)), None if bias is None else wide(bias)
    y = flat.new_empty(len(flat), out)
    _call("sparsity_blocks", wide(values), columns, starts, out, width, flat, len(flat), bias, y)
    return y.view(*x.shape[:-1], out).to(x.dtype)


@torch.library.custom_op("sparsity::blocks_input", mutates_args=())
def _blocks_input(y: Tensor, values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    """``y W`` for ``y [..., out]``: ``[..., width]``."""
    out = y.shape[-1]
    _check(values, columns, starts, None, y, out, width)
    if not linear.is_native(y, values):
        with torch.autocast(y.device.type, enabled=False):
            return y @ decompressed_blocks(values, columns, starts, out, width)
    flat = wide(flattened(y))
    x = flat.new_empty(len(flat), width)
    _call("sparsity_blocks_input", wide(values), columns, starts, out, width, flat, len(flat), x)
    return x.view(*y.shape[:-1], width).to(y.dtype)


@torch.library.custom_op("sparsity::blocks_values", mutates_args=())
def _blocks_values(y: Tensor, x: Tensor, columns: Tensor, starts: Tensor, side: int) -> Tensor:
    """``y^T x`` at the kept blocks: ``[blocks, side, side]``, zero beyond the matrix."""
    out, width = y.shape[-1], x.shape[-1]
    values = x.new_empty(len(columns), side, side, dtype=wide(x[:0]).dtype)
    _check(values.to(x.dtype), columns, starts, x, y, out, width)
    flat_y, flat_x = flattened(y), flattened(x)
    if not linear.is_native(x, values):
        with torch.autocast(x.device.type, enabled=False):
            return _cut(flat_y.t() @ flat_x, side)[rows_of(values, starts), columns.long()]
    _call("sparsity_blocks_values", values, columns, starts, out, width, wide(flat_y), wide(flat_x), len(flat_x))
    return values.to(x.dtype)


@_blocks.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@_blocks_input.register_fake
def _(y: Tensor, values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    return y.new_empty(*y.shape[:-1], width)


@_blocks_values.register_fake
def _(y: Tensor, x: Tensor, columns: Tensor, starts: Tensor, side: int) -> Tensor:
    return x.new_empty(columns.shape[0], side, side)


# As in `linear`: one trilinear form, so the gradients of each operation are the other two.


def _blocks_backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
    x, values, columns, starts = ctx.saved_tensors
    wanted, ops = ctx.needs_input_grad, torch.ops.sparsity
    return (
        ops.blocks_input(y, values, columns, starts, x.shape[-1]) if wanted[0] else None,
        ops.blocks_values(y, x, columns, starts, values.shape[-1]) if wanted[1] else None,
        None, None, flattened(y).sum(0) if ctx.biased and wanted[4] else None, None,
    )  # fmt: skip


def _blocks_input_backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    y, values, columns, starts = ctx.saved_tensors
    wanted, ops = ctx.needs_input_grad, torch.ops.sparsity
    return (
        ops.blocks(x, values, columns, starts, None, y.shape[-1]) if wanted[0] else None,
        ops.blocks_values(y, x, columns, starts, values.shape[-1]) if wanted[1] else None,
        None, None, None,
    )  # fmt: skip


def _blocks_values_backward(ctx: Any, values: Tensor) -> tuple[Tensor | None, ...]:
    y, x, columns, starts = ctx.saved_tensors
    wanted, ops = ctx.needs_input_grad, torch.ops.sparsity
    return (
        ops.blocks(x, values, columns, starts, None, y.shape[-1]) if wanted[0] else None,
        ops.blocks_input(y, values, columns, starts, x.shape[-1]) if wanted[1] else None,
        None, None, None,
    )  # fmt: skip


_blocks.register_autograd(_blocks_backward, setup_context=linear.save)
_blocks_input.register_autograd(_blocks_input_backward, setup_context=linear.save)
_blocks_values.register_autograd(_blocks_values_backward, setup_context=linear.save)


def in_blocks(mask: Tensor, side: int) -> bool:
    """Whether a mask keeps every block of this size whole, or not at all."""
    return not bool(_blocks_of(mask, side)[1].any())


def kept_blocks(mask: Tensor, side: int) -> int:
    """How many blocks of this size a mask keeps anything of."""
    return int(_blocks_of(mask, side)[0].count_nonzero())


def _blocks_of(mask: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Which blocks a mask keeps anything of, and which of them only in part."""
    some, missing = _cut(mask, side).flatten(2).any(2), _cut(~mask, side).flatten(2).any(2)
    return some, some & missing


def _cut(matrix: Tensor, side: int) -> Tensor:
    """All blocks of a matrix, filled up with zeros: ``[block rows, block columns, side, side]``."""
    rows, columns = matrix.shape
    whole = F.pad(matrix, (0, -columns % side, 0, -rows % side))
    return rearrange(whole, "(row r) (column c) -> row column r c", r=side, c=side)


def _check(
    values: Tensor, columns: Tensor, starts: Tensor, x: Tensor | None, y: Tensor | None, out: int, width: int
) -> None:
    """Raises what the C++ would not survive."""
    side = values.shape[-1]
    given = [each for each in (values, x, y) if each is not None]
    if len({each.dtype for each in given}) > 1 or not given[0].is_floating_point():
        raise ValueError(f"expected floating tensors of one dtype, got {', '.join(str(each.dtype) for each in given)}")
    if len({each.device for each in (*given, columns, starts)}) > 1:
        raise ValueError(f"expected tensors on one device, got {', '.join(str(e.device) for e in (*given, columns))}")
    if values.ndim != 3 or values.shape != (len(columns), side, side) or side not in SIDES:
        raise ValueError(f"expected {len(columns)} square blocks of 16, 32, 64 or 128, got {tuple(values.shape)}")
    if columns.dtype != torch.int32 or starts.dtype != torch.int64 or columns.ndim != 1 or starts.ndim != 1:
        raise ValueError(f"expected columns of int32 and starts of int64, got {columns.dtype} and {starts.dtype}")
    if len(starts) - 1 != -(-out // side):
        raise ValueError(
            f"{out} rows in blocks of {side} have {-(-out // side)} block rows, starts say {len(starts) - 1}"
        )
    if x is not None and y is not None and x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"expected one batch, got {tuple(x.shape)} and {tuple(y.shape)}")
    check_places(columns, starts, -(-width // side))


def _call(
    name: str, values: Tensor, columns: Tensor, starts: Tensor, out: int, width: int, *others: Tensor | int | None
) -> None:
    native_call(name, [values, values.element_size(), columns.contiguous(), starts.contiguous()],
                [values.shape[-1], out, width, *others])  # fmt: skip
