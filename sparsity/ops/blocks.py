"""Linear layers by their kept blocks only: square blocks of the weight, in plain index and value tensors."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import cuda, product
from sparsity.ops.linear import Rows, check_places, rows_of

SIDES = (16, 32, 64, 128)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "silu": torch.ops.aten.silu_,
}


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
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, out: int, bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    """``x W^T + bias`` for ``x [..., in]`` and a weight ``[out, in]`` in blocks (`compressed_blocks`): ``[..., out]``.

    As `sparse_linear` in everything else: gradients of x, the values and the bias, C++ on a CPU, and the dense matrix
    for small products; on a GPU it is Triton, with sums in float32. An index for a whole block leaves the processor to
    its arithmetic, so blocks pay at higher densities.

    `activation` is "relu", "gelu" or "silu" of the result. Where no gradient is wanted Triton takes it of its sums, so
    16-bit numbers are rounded once.

    Raises `ValueError` for tensors that do not fit one another and other activations, and `IndexError` for columns out
    of range.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    x, values, bias = product.autocasted(x, values, bias)
    learned = any(each is not None and each.requires_grad for each in (x, values, bias))
    if activation is None or (learned and torch.is_grad_enabled()):
        y: Tensor = torch.ops.sparsity.blocks(x, values, columns, starts, bias, out)
        return y if activation is None else ACTIVATIONS[activation](y)
    found: Tensor = torch.ops.sparsity.blocks_activated(x, values, columns, starts, bias, out, activation)
    return found


@product.define("blocks", lambda x, values, columns, starts, bias, out: x.new_empty(*x.shape[:-1], out))
def _blocks(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, out: int) -> Tensor:
    return _activated(x, values, columns, starts, bias, out, None)


@product.define(
    "blocks_activated", lambda x, values, columns, starts, bias, out, activation: x.new_empty(*x.shape[:-1], out)
)
def _blocks_activated(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, out: int, activation: str
) -> Tensor:
    return _activated(x, values, columns, starts, bias, out, activation)


def _activated(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, out: int, activation: str | None
) -> Tensor:
    width = x.shape[-1]
    _check(values, columns, starts, x, None, out, width)
    if bias is not None and (bias.shape != (out,) or bias.dtype != x.dtype):
        raise ValueError(f"expected a bias of {out} {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    if cuda.serves(x):
        from sparsity.ops.cuda import blocks as kernels

        y = kernels.linear(product.flattened(x), values, columns, starts, bias, out, activation)
        return y.view(*x.shape[:-1], out)
    if not product.is_native("blocks", x, values):
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x, decompressed_blocks(values, columns, starts, out, width), bias)
        return ACTIVATIONS[activation](y) if activation else y
    flat, bias = product.wide(product.flattened(x)), None if bias is None else product.wide(bias)
    y = flat.new_empty(len(flat), out)
    _call("sparsity_blocks", product.wide(values), columns, starts, out, width, flat, len(flat), bias, y)
    if activation:
        IN_PLACE[activation](y)
    return product.shaped(y, x)


@product.define("blocks_input", lambda y, values, columns, starts, width: y.new_empty(*y.shape[:-1], width))
def _blocks_input(y: Tensor, values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    """``y W`` for ``y [..., out]``: ``[..., width]``."""
    out = y.shape[-1]
    _check(values, columns, starts, None, y, out, width)
    if cuda.serves(y) and width > 0:
        from sparsity.ops.cuda import blocks as kernels

        return kernels.linear_input(product.flattened(y), values, columns, starts, width).view(*y.shape[:-1], width)
    if not product.is_native("blocks", y, values):
        with torch.autocast(y.device.type, enabled=False):
            return y @ decompressed_blocks(values, columns, starts, out, width)
    flat = product.wide(product.flattened(y))
    x = flat.new_empty(len(flat), width)
    _call("sparsity_blocks_input", product.wide(values), columns, starts, out, width, flat, len(flat), x)
    return product.shaped(x, y)


@product.define("blocks_values", lambda y, x, columns, starts, side: x.new_empty(columns.shape[0], side, side))
def _blocks_values(y: Tensor, x: Tensor, columns: Tensor, starts: Tensor, side: int) -> Tensor:
    """``y^T x`` at the kept blocks: ``[blocks, side, side]``, zero beyond the matrix."""
    out, width = y.shape[-1], x.shape[-1]
    values = x.new_empty(len(columns), side, side)
    _check(values, columns, starts, x, y, out, width)
    flat_y, flat_x = product.flattened(y), product.flattened(x)
    if cuda.serves(x) and out > 0:
        from sparsity.ops.cuda import blocks as kernels

        return kernels.linear_values(flat_y, flat_x, columns, starts, values)
    if not product.is_native("blocks", x, values):
        with torch.autocast(x.device.type, enabled=False):
            return _cut(flat_y.t() @ flat_x, side)[rows_of(values, starts), columns.long()]
    values = values.to(torch.promote_types(x.dtype, torch.float32))
    _call(
        "sparsity_blocks_values",
        values,
        columns,
        starts,
        out,
        width,
        product.wide(flat_y),
        product.wide(flat_x),
        len(flat_x),
    )
    return values.to(x.dtype)


product.differentiate(
    "blocks",
    lambda y, x, values, columns, starts: torch.ops.sparsity.blocks(x, values, columns, starts, None, y.shape[-1]),
    lambda y, x, values, columns, starts: torch.ops.sparsity.blocks_input(y, values, columns, starts, x.shape[-1]),
    lambda y, x, values, columns, starts: torch.ops.sparsity.blocks_values(y, x, columns, starts, values.shape[-1]),
)


def _no_gradient(context: Any, y: Tensor) -> None:
    raise RuntimeError(
        "sparsity::blocks_activated has no gradient: it is traced where none is wanted, as under torch.no_grad; trace "
        "with tensors that require gradients, or without it"
    )


torch.library.register_autograd("sparsity::blocks_activated", _no_gradient)


def in_blocks(mask: Tensor, side: int) -> bool:
    """Whether a mask keeps every block of this size whole, or not at all."""
    return not bool(_blocks_of(mask, side)[1].any())


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
    product.check_alike((values, x, y), columns, starts)
    if values.ndim != 3 or values.shape != (len(columns), side, side) or side not in SIDES:
        raise ValueError(f"expected {len(columns)} square blocks of 16, 32, 64 or 128, got {tuple(values.shape)}")
    if columns.dtype != torch.int32 or starts.dtype != torch.int64 or columns.ndim != 1 or starts.ndim != 1:
        raise ValueError(f"expected columns of int32 and starts of int64, got {columns.dtype} and {starts.dtype}")
    if len(starts) - 1 != -(-out // side):
        raise ValueError(
            f"{out} rows in blocks of {side} have {-(-out // side)} block rows, starts say {len(starts) - 1}"
        )
    product.check_batch(x, y, out)
    check_places(columns, starts, -(-width // side))


def _call(
    name: str, values: Tensor, columns: Tensor, starts: Tensor, out: int, width: int, *others: Tensor | int | None
) -> None:
    first: list[Tensor | int] = [values, values.element_size(), columns.contiguous(), starts.contiguous()]
    product.native_call("blocks", name, first, [values.shape[-1], out, width, *others])
