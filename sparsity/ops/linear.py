"""Linear layers by their kept weights only: the weight in compressed rows, in plain index and value tensors."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import product

NARROW = 1 << 15  # input features that columns of int16 can name

Rows = tuple[Tensor, Tensor, Tensor]  # values, columns, starts


def compressed(weight: Tensor, mask: Tensor | None = None) -> Rows:
    """A matrix ``[out, in]`` in compressed rows: its values where the mask is True, or where they are not zero.

    Values are in order of rows, then columns; columns are int16 where ``in`` is at most 32,768, else int32; row r has
    the values ``starts[r] : starts[r + 1]``, int64 ``[out + 1]``. Gradients reach the weight.

    Raises `ValueError` for anything but a matrix, and a mask of another shape.
    """
    rows, columns = kept(weight, mask).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(weight))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return weight[rows, columns], columns.to(torch.int16 if weight.shape[1] <= NARROW else torch.int32), starts


def kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """What is kept of a matrix: what the mask says, or else what is not zero; `ValueError` for what does not fit."""
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix [out, in], got a tensor of shape {tuple(weight.shape)}")
    mask = weight != 0 if mask is None else mask
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask of {tuple(weight.shape)}, got {mask.dtype} of {tuple(mask.shape)}")
    return mask


def decompressed(values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    """The matrix ``[out, width]`` that `compressed` had: what all the operations here are defined by."""
    empty = values.new_zeros(starts.shape[0] - 1, width)
    return empty.index_put((rows_of(values, starts), columns.long()), values, accumulate=True)


def sparse_linear(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` for ``x [..., in]`` and a weight in compressed rows (`compressed`): ``[..., out]``.

    It has gradients of x, the values and the bias. On a CPU it runs in C++ where that can be compiled, in float32 and
    float64 (16-bit numbers are computed in float32 and rounded); there weights that are pruned take no part at all, and
    sums are in another order than a dense layer's. Elsewhere, and for small products, it is the layer of the dense
    matrix, in which zeros meet what is not finite, too.

    Raises `ValueError` for tensors that do not fit one another, and `IndexError` for columns out of range.
    """
    x, values, bias = product.autocasted(x, values, bias)
    out: Tensor = torch.ops.sparsity.linear(x, values, columns, starts, bias)
    return out


@product.define("linear", lambda x, values, columns, starts, bias: x.new_empty(*x.shape[:-1], starts.shape[0] - 1))
def _linear(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    _check(values, columns, starts, x, None, x.shape[-1])
    if bias is not None and (bias.shape != (starts.shape[0] - 1,) or bias.dtype != x.dtype):
        raise ValueError(f"expected a bias of {starts.shape[0] - 1} {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    if not product.is_native("linear", x, values):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, decompressed(values, columns, starts, x.shape[-1]), bias)
    flat, bias = product.wide(product.flattened(x)), None if bias is None else product.wide(bias)
    y = flat.new_empty(len(flat), starts.shape[0] - 1)
    _call("sparsity_linear", product.wide(values), columns, starts, x.shape[-1], flat, len(flat), bias, y)
    return product.shaped(y, x)


@product.define("linear_input", lambda y, values, columns, starts, width: y.new_empty(*y.shape[:-1], width))
def _linear_input(y: Tensor, values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    """``y W`` for ``y [..., out]``: ``[..., width]``."""
    _check(values, columns, starts, None, y, width)
    if not product.is_native("linear", y, values):
        with torch.autocast(y.device.type, enabled=False):
            return y @ decompressed(values, columns, starts, width)
    flat = product.wide(product.flattened(y))
    x = flat.new_empty(len(flat), width)
    _call("sparsity_linear_input", product.wide(values), columns, starts, width, flat, len(flat), x)
    return product.shaped(x, y)


@product.define("linear_values", lambda y, x, columns, starts: x.new_empty(columns.shape[0]))
def _linear_values(y: Tensor, x: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """``y^T x`` at the kept places, for ``y [..., out]`` and ``x [..., in]``: in the order of the values."""
    _check(None, columns, starts, x, y, x.shape[-1])
    flat_y, flat_x = product.flattened(y), product.flattened(x)
    if not product.is_native("linear", x, columns):
        with torch.autocast(x.device.type, enabled=False):
            return (flat_y.t() @ flat_x)[rows_of(columns, starts), columns.long()]
    flat_y, flat_x = product.wide(flat_y), product.wide(flat_x)
    values = flat_x.new_empty(len(columns))
    _call("sparsity_linear_values", values, columns, starts, x.shape[-1], flat_y, flat_x, len(flat_x))
    return values.to(x.dtype)


product.differentiate(
    "linear",
    lambda y, x, values, columns, starts: torch.ops.sparsity.linear(x, values, columns, starts, None),
    lambda y, x, values, columns, starts: torch.ops.sparsity.linear_input(y, values, columns, starts, x.shape[-1]),
    lambda y, x, values, columns, starts: torch.ops.sparsity.linear_values(y, x, columns, starts),
)


def rows_of(values: Tensor, starts: Tensor) -> Tensor:
    """The row of each value."""
    rows = torch.arange(starts.shape[0] - 1, device=starts.device)
    return torch.repeat_interleave(rows, starts.diff(), output_size=len(values))


def _check(
    values: Tensor | None, columns: Tensor, starts: Tensor, x: Tensor | None, y: Tensor | None, width: int
) -> None:
    """Raises what the C++ would not survive."""
    product.check_alike((values, x, y), columns, starts)
    if columns.dtype not in (torch.int16, torch.int32) or starts.dtype != torch.int64 or starts.ndim != 1:
        raise ValueError(f"expected columns of int16 or int32 and starts of int64, got {columns.dtype}, {starts.dtype}")
    if starts.shape[0] < 1 or columns.ndim != 1 or (values is not None and values.shape != columns.shape):
        shape = tuple(values.shape) if values is not None else "as many"
        raise ValueError(f"expected as many values as columns, and starts, got {shape} and {tuple(columns.shape)}")
    product.check_batch(x, y, starts.shape[0] - 1)
    check_places(columns, starts, width)


def check_places(columns: Tensor, starts: Tensor, width: int) -> None:
    """Raises `IndexError` for places outside of the weight; looks `once`."""

    def look() -> None:
        ends = [int(starts[0]), int(starts[-1])]
        if ends != [0, len(columns)] or (starts.shape[0] > 1 and int(starts.diff().min()) < 0):
            raise IndexError(f"expected starts that rise from 0 to {len(columns)}, the number of columns, got {ends}")
        if len(columns):
            least, most = (int(each) for each in columns.aminmax())
            if least < 0 or most >= width:
                raise IndexError(f"columns are from {least} to {most}, the weight has {width}")

    product.once(look, columns, starts, width)


def _call(name: str, values: Tensor, columns: Tensor, starts: Tensor, width: int, *others: Tensor | int | None) -> None:
    columns, starts = columns.contiguous(), starts.contiguous()
    first: list[Tensor | int] = [values, values.element_size(), columns, columns.element_size(), starts]
    product.native_call("linear", name, first, [starts.shape[0] - 1, width, *others])
