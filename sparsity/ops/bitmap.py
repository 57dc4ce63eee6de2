"""Linear layers by a bitmap and their kept weights: where too many are kept for an index each to pay."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import cuda, linear, product

ROWS = 16  # of a batch that one read of the weight serves on a GPU
FEW = 8  # rows of a batch up to which reading the weight takes longer than computing with it
SLAB = 1 << 20  # weights that are dense at a time, where there are more rows

Bitmap = tuple[Tensor, Tensor, Tensor]  # values, bits, starts


def compressed_bitmap(weight: Tensor, mask: Tensor | None = None) -> Bitmap:
    """A matrix ``[out, in]`` as a bitmap: its values where the mask is True, or where they are not zero.

    Values are in order of rows, then columns. Bits are uint8 ``[out, ceil(in / 8)]``: bit j (of value 2^j) of byte i
    says whether column 8 i + j is kept, and what is beyond the last column is 0. Row r has the values
    ``starts[r] : starts[r + 1]``, int64 ``[out + 1]``. Gradients reach the weight.

    Raises `ValueError` for anything but a matrix, and a mask of another shape.
    """
    mask = linear.kept(weight, mask)
    whole = F.pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -(-mask.shape[1] // 8), 8)
    bits = (whole.to(torch.uint8) << _eight(mask)).sum(2, dtype=torch.uint8)
    counts = mask.sum(1)
    return weight[mask], bits, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def decompressed_bitmap(values: Tensor, bits: Tensor, starts: Tensor, width: int) -> Tensor:
    """The matrix ``[out, width]`` that `compressed_bitmap` had: what the operations here are defined by."""
    return values.new_zeros(len(starts) - 1, width).masked_scatter(_mask(bits, width), values)


def bitmap_linear(x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` for ``x [..., in]`` and a weight as a bitmap (`compressed_bitmap`): ``[..., out]``.

    It has gradients of x, the values and the bias. A bit for each weight is less to read than an index of 16 for each
    that is kept, from a density of 1 / 16 on; but every place is computed with, so it pays where reading the weight is
    what takes the time. On a CPU up to 8 rows of x meet the bitmap as it is, in C++, where that can be compiled: in
    float64 or float32, and bfloat16 in float32. More rows, and the gradients, take the dense matrix in parts that fit
    the cache; small products take the whole of it. On a GPU up to 16 rows are a Triton kernel, which has not been
    timed, and everything else is the dense matrix.

    Raises `ValueError` for tensors that do not fit one another, and `IndexError` for starts that are not the bits'.
    """
    x, values, bias = product.autocasted(x, values, bias)
    found: Tensor = torch.ops.sparsity.bitmap(x, values, bits, starts, bias)
    return found


@product.define("bitmap", lambda x, values, bits, starts, bias: x.new_empty(*x.shape[:-1], starts.shape[0] - 1))
def _bitmap(x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    width = x.shape[-1]
    _check(values, bits, starts, x, None, width, len(values))
    out = len(starts) - 1
    if bias is not None and (bias.shape != (out,) or bias.dtype != x.dtype):
        raise ValueError(f"expected a bias of {out} {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    if cuda.serves(x) and cuda.serves(values) and x.numel() // width <= ROWS:
        from sparsity.ops.cuda import bitmap as kernels

        return kernels.linear(product.flattened(x), values, bits, starts, bias, width).view(*x.shape[:-1], out)
    with torch.autocast(x.device.type, enabled=False):
        if not product.is_native("bitmap", x, bits):
            return F.linear(x, decompressed_bitmap(values, bits, starts, width), bias)
        flat = product.flattened(x)
        if len(flat) <= FEW and values.dtype != torch.float16:
            flat, bias = product.wide(flat), None if bias is None else product.wide(bias)
            y = flat.new_empty(len(flat), out)
            _call("sparsity_bitmap", values, bits, starts, width, flat, len(flat), bias, y)
        else:
            y = flat.new_empty(len(flat), out)
            for rows, part in _slabs(values, bits, starts, width):
                y[:, rows] = F.linear(flat, part, None if bias is None else bias[rows])
        return product.shaped(y, x)


@product.define("bitmap_input", lambda y, values, bits, starts, width: y.new_empty(*y.shape[:-1], width))
def _bitmap_input(y: Tensor, values: Tensor, bits: Tensor, starts: Tensor, width: int) -> Tensor:
    """``y W`` for ``y [..., out]``: ``[..., width]``."""
    _check(values, bits, starts, None, y, width, len(values))
    with torch.autocast(y.device.type, enabled=False):
        if not product.is_native("bitmap", y, bits):
            return y @ decompressed_bitmap(values, bits, starts, width)
        flat = product.flattened(y)
        x = product.wide(flat[:0]).new_zeros(len(flat), width)
        for rows, part in _slabs(values, bits, starts, width):
            x += flat[:, rows] @ part
        return product.shaped(x, y)


@product.define("bitmap_values", lambda y, x, bits, starts, count: x.new_empty(count))
def _bitmap_values(y: Tensor, x: Tensor, bits: Tensor, starts: Tensor, count: int) -> Tensor:
    """``y^T x`` at the kept places, of which there are `count`: in the order of the values."""
    width = x.shape[-1]
    _check(None, bits, starts, x, y, width, count)
    flat_y, flat_x = product.flattened(y), product.flattened(x)
    with torch.autocast(x.device.type, enabled=False):
        if not product.is_native("bitmap", x, bits):
            return (flat_y.t() @ flat_x)[_mask(bits, width)]
        values = x.new_empty(count)
        for rows in _parts(len(starts) - 1, width):
            part = flat_y[:, rows].t() @ flat_x
            _call("sparsity_bitmap_gather", values, bits, starts, width, rows.start, len(part), part)
        return values


product.differentiate(
    "bitmap",
    lambda y, x, values, bits, starts: torch.ops.sparsity.bitmap(x, values, bits, starts, None),
    lambda y, x, values, bits, starts: torch.ops.sparsity.bitmap_input(y, values, bits, starts, x.shape[-1]),
    lambda y, x, values, bits, starts: torch.ops.sparsity.bitmap_values(y, x, bits, starts, values.shape[0]),
)


def _check(
    values: Tensor | None, bits: Tensor, starts: Tensor, x: Tensor | None, y: Tensor | None, width: int, count: int
) -> None:
    """Raises what the C++ would not survive."""
    product.check_alike((values, x, y), bits, starts)
    if bits.dtype != torch.uint8 or starts.dtype != torch.int64 or starts.ndim != 1 or len(starts) < 1:
        raise ValueError(f"expected bits of uint8 and starts of int64, got {bits.dtype} and {starts.dtype}")
    if bits.shape != (len(starts) - 1, -(-width // 8)) or (values is not None and values.ndim != 1):
        raise ValueError(
            f"{len(starts) - 1} rows of {width} columns have bits of ({len(starts) - 1}, {-(-width // 8)}) and flat "
            f"values, got {tuple(bits.shape)}" + (f" and {tuple(values.shape)}" if values is not None else "")
        )
    product.check_batch(x, y, len(starts) - 1)
    product.once(lambda: _look(bits, starts, width, count), bits, starts, width, count)


def _look(bits: Tensor, starts: Tensor, width: int, count: int) -> None:
    """Raises what the numbers of bits and starts have wrong."""
    if width % 8 and bool((bits[:, -1] >> width % 8).any()):
        raise ValueError(f"bits beyond the {width} columns of the weight are set")
    counts = _mask(bits, width).sum(1)
    if int(starts[0]) or not torch.equal(starts.diff(), counts):
        raise IndexError("expected starts that rise from 0 by the number of bits that are set in each row")
    if int(starts[-1]) != count:
        raise IndexError(f"the bits keep {int(starts[-1])} weights, and there are {count} values")


def _mask(bits: Tensor, width: int) -> Tensor:
    """The bits as bool, ``[out, width]``."""
    return (bits.unsqueeze(2) >> _eight(bits) & 1).bool().flatten(1)[:, :width]


def _eight(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _slabs(values: Tensor, bits: Tensor, starts: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """The dense matrix, some rows at a time, in memory that the next ones take over."""
    memory = None
    for rows in _parts(len(starts) - 1, width):
        count = rows.stop - rows.start
        memory = values.new_empty(count, width) if memory is None else memory
        part = memory[:count]
        _call("sparsity_bitmap_expand", values, bits, starts, width, rows.start, count, part)
        yield rows, part


def _parts(out: int, width: int) -> list[slice]:
    """Rows that are worked on together, so that they stay in the cache."""
    many = max(1, SLAB // max(1, width))
    return [slice(first, min(first + many, out)) for first in range(0, out, many)]


def _call(name: str, values: Tensor, bits: Tensor, starts: Tensor, width: int, *others: Tensor | int | None) -> None:
    first: list[Tensor | int] = [values.contiguous(), values.element_size(), bits.contiguous(), starts.contiguous()]
    product.native_call("bitmap", name, first, [len(starts) - 1, width, *others])
