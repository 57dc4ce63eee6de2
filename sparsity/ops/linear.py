"""Linear layers by their kept weights only: the weight in compressed rows, in plain index and value tensors."""

from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparsity.ops import native

WORK = 1 << 12  # products that C++ is compiled for: the dense matrix is made in less time than it takes to call it
NARROW = 1 << 15  # input features that columns of int16 can name

WIDE = (torch.float32, torch.float64)

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
    empty = values.new_zeros(len(starts) - 1, width)
    return empty.index_put((rows_of(values, starts), columns.long()), values, accumulate=True)


def sparse_linear(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` for ``x [..., in]`` and a weight in compressed rows (`compressed`): ``[..., out]``.

    It has gradients of x, the values and the bias. On a CPU it runs in C++ where that can be compiled, in float32 and
    float64 (16-bit numbers are computed in float32 and rounded); there weights that are pruned take no part at all, and
    sums are in another order than a dense layer's. Elsewhere, and for small products, it is the layer of the dense
    matrix, in which zeros meet what is not finite, too.

    Raises `ValueError` for tensors that do not fit one another, and `IndexError` for columns out of range.
    """
    x, values, bias = autocasted(x, values, bias)
    out: Tensor = torch.ops.sparsity.linear(x, values, columns, starts, bias)
    return out


def autocasted(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """These in the dtype of the user's autocast where it is on, which leaves float64 alone.

    By hand, as torch.library's own rule knows one dtype only, whatever the autocast has.
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, values, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)


@torch.library.custom_op("sparsity::linear", mutates_args=())
def _linear(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    _check(values, columns, starts, x, None, x.shape[-1])
    if bias is not None and (bias.shape != (len(starts) - 1,) or bias.dtype != x.dtype):
        raise ValueError(f"expected a bias of {len(starts) - 1} {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    if not is_native(x, values):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, decompressed(values, columns, starts, x.shape[-1]), bias)
    flat, bias = wide(flattened(x)), None if bias is None else wide(bias)
    y = flat.new_empty(len(flat), len(starts) - 1)
    _call("sparsity_linear", wide(values), columns, starts, x.shape[-1], flat, len(flat), bias, y)
    return y.view(*x.shape[:-1], len(starts) - 1).to(x.dtype)


@torch.library.custom_op("sparsity::linear_input", mutates_args=())
def _linear_input(y: Tensor, values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    """``y W`` for ``y [..., out]``: ``[..., width]``."""
    _check(values, columns, starts, None, y, width)
    if not is_native(y, values):
        with torch.autocast(y.device.type, enabled=False):
            return y @ decompressed(values, columns, starts, width)
    flat = wide(flattened(y))
    x = flat.new_empty(len(flat), width)
    _call("sparsity_linear_input", wide(values), columns, starts, width, flat, len(flat), x)
    return x.view(*y.shape[:-1], width).to(y.dtype)


@torch.library.custom_op("sparsity::linear_values", mutates_args=())
def _linear_values(y: Tensor, x: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """``y^T x`` at the kept places, for ``y [..., out]`` and ``x [..., in]``: in the order of the values."""
    _check(None, columns, starts, x, y, x.shape[-1])
    flat_y, flat_x = flattened(y), flattened(x)
    if not is_native(x, columns):
        with torch.autocast(x.device.type, enabled=False):
            return (flat_y.t() @ flat_x)[rows_of(columns, starts), columns.long()]
    flat_y, flat_x = wide(flat_y), wide(flat_x)
    values = flat_x.new_empty(len(columns))
    _call("sparsity_linear_values", values, columns, starts, x.shape[-1], flat_y, flat_x, len(flat_x))
    return values.to(x.dtype)


@_linear.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], starts.shape[0] - 1)


@_linear_input.register_fake
def _(y: Tensor, values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    return y.new_empty(*y.shape[:-1], width)


@_linear_values.register_fake
def _(y: Tensor, x: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty(columns.shape[0])


# The three are one trilinear form of y, x and the values, so the gradients of each are the other two.


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what the gradients of an operation need: its first four tensors, and whether it had a bias."""
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    ctx.save_for_backward(*tensors[:4])
    ctx.biased = len(tensors) > 4


def _linear_backward(context: Any, y: Tensor) -> tuple[Tensor | None, ...]:
    x, values, columns, starts = context.saved_tensors
    wanted = context.needs_input_grad
    return (
        torch.ops.sparsity.linear_input(y, values, columns, starts, x.shape[-1]) if wanted[0] else None,
        torch.ops.sparsity.linear_values(y, x, columns, starts) if wanted[1] else None,
        None, None, flattened(y).sum(0) if context.biased and wanted[4] else None,
    )  # fmt: skip


def _linear_input_backward(context: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    y, values, columns, starts = context.saved_tensors
    wanted = context.needs_input_grad
    return (
        torch.ops.sparsity.linear(x, values, columns, starts, None) if wanted[0] else None,
        torch.ops.sparsity.linear_values(y, x, columns, starts) if wanted[1] else None,
        None, None, None,
    )  # fmt: skip


def _linear_values_backward(context: Any, values: Tensor) -> tuple[Tensor | None, ...]:
    y, x, columns, starts = context.saved_tensors
    wanted = context.needs_input_grad
    return (
        torch.ops.sparsity.linear(x, values, columns, starts, None) if wanted[0] else None,
        torch.ops.sparsity.linear_input(y, values, columns, starts, x.shape[-1]) if wanted[1] else None,
        None, None,
    )  # fmt: skip


_linear.register_autograd(_linear_backward, setup_context=save)
_linear_input.register_autograd(_linear_input_backward, setup_context=save)
_linear_values.register_autograd(_linear_values_backward, setup_context=save)


def rows_of(values: Tensor, starts: Tensor) -> Tensor:
    """The row of each value."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return torch.repeat_interleave(rows, starts.diff(), output_size=len(values))


def _check(
    values: Tensor | None, columns: Tensor, starts: Tensor, x: Tensor | None, y: Tensor | None, width: int
) -> None:
    """Raises what the C++ would not survive."""
    check_alike((values, x, y), columns, starts)
    if columns.dtype not in (torch.int16, torch.int32) or starts.dtype != torch.int64 or starts.ndim != 1:
        raise ValueError(f"expected columns of int16 or int32 and starts of int64, got {columns.dtype}, {starts.dtype}")
    if len(starts) < 1 or columns.ndim != 1 or (values is not None and values.shape != columns.shape):
        shape = tuple(values.shape) if values is not None else "as many"
        raise ValueError(f"expected as many values as columns, and starts, got {shape} and {tuple(columns.shape)}")
    check_batch(x, y, len(starts) - 1)
    check_places(columns, starts, width)


def check_alike(floats: Sequence[Tensor | None], *places: Tensor) -> None:
    """Raises `ValueError` for numbers of several dtypes, or none that float, and for tensors on several devices."""
    given = [each for each in floats if each is not None]
    if len({each.dtype for each in given}) > 1 or not given[0].is_floating_point():
        raise ValueError(f"expected floating tensors of one dtype, got {', '.join(str(each.dtype) for each in given)}")
    if len({each.device for each in (*given, *places)}) > 1:
        raise ValueError(f"expected tensors on one device, got {', '.join(str(e.device) for e in (*given, *places))}")


def check_batch(x: Tensor | None, y: Tensor | None, out: int) -> None:
    """Raises `ValueError` for a result that is not of the weight's rows, or of another batch than what goes in."""
    if y is not None and (y.ndim == 0 or y.shape[-1] != out):
        raise ValueError(f"expected [..., {out}], one number for each row, got {tuple(y.shape)}")
    if x is not None and y is not None and x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"expected one batch, got {tuple(x.shape)} and {tuple(y.shape)}")


def check_places(columns: Tensor, starts: Tensor, width: int) -> None:
    """Raises `IndexError` for places outside of the weight; looks `once`."""

    def look() -> None:
        ends = [int(starts[0]), int(starts[-1])]
        if ends != [0, len(columns)] or (len(starts) > 1 and int(starts.diff().min()) < 0):
            raise IndexError(f"expected starts that rise from 0 to {len(columns)}, the number of columns, got {ends}")
        if len(columns):
            least, most = (int(each) for each in columns.aminmax())
            if least < 0 or most >= width:
                raise IndexError(f"columns are from {least} to {most}, the weight has {width}")

    once(look, columns, starts, width)


class Remembered:
    """What was found out about places and their starts, as long as neither changes.

    Writes through `.data` or numpy are not seen, and nothing is remembered of inference tensors, which do not tell.
    """

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def find(self, places: Tensor, starts: Tensor, *sizes: int) -> Any:
        """What was kept for these, or None."""
        known, state = self._known.get(places), self._state(places, starts, sizes)
        return known[2] if state and known and known[0] is starts and known[1] == state else None

    def keep(self, places: Tensor, starts: Tensor, *sizes: int, found: Any) -> None:
        if state := self._state(places, starts, sizes):
            self._known[places] = starts, state, found

    def _state(self, places: Tensor, starts: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
        if places.is_inference() or starts.is_inference():
            return None
        memory = (starts.data_ptr(), places.data_ptr(), len(places), len(starts))
        return starts._version, places._version, *sizes, *memory


_SEEN = Remembered()


def once(look: Callable[[], None], places: Tensor, starts: Tensor, *sizes: int) -> None:
    """Calls this, which raises what places, starts and sizes have wrong, but once for tensors that do not change."""
    if not _SEEN.find(places, starts, *sizes):
        look()
        _SEEN.keep(places, starts, *sizes, found=True)


def is_native(x: Tensor, kept: Tensor) -> bool:
    """Whether a product of these runs in C++."""
    batch = x.numel() // max(1, x.shape[-1])
    small = batch * kept.numel() < WORK or batch == 0
    return x.is_cpu and not small and native.library() is not None


def flattened(tensor: Tensor) -> Tensor:
    """As a matrix of the last dimension, also where that is empty."""
    return tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[None]


def wide(tensor: Tensor) -> Tensor:
    """Contiguous, in float32 or float64."""
    if tensor.dtype in WIDE and tensor.is_contiguous():
        return tensor  # three calls less: small batches feel them
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def _call(name: str, values: Tensor, columns: Tensor, starts: Tensor, width: int, *others: Tensor | int | None) -> None:
    columns, starts = columns.contiguous(), starts.contiguous()
    first: list[Tensor | int] = [values, values.element_size(), columns, columns.element_size(), starts]
    native_call(name, first, [len(starts) - 1, width, *others])


def native_call(name: str, first: list[Tensor | int], sizes: list[Tensor | int | None]) -> None:
    """The C++ function of this name: tensors by their memory, numbers as int and, of `sizes`, int64; then threads."""
    given = [each if isinstance(each, int) else _at(each) for each in first]
    rest = [c_int64(each) if isinstance(each, int) else None if each is None else _at(each) for each in sizes]
    if getattr(native.library(), name)(*given, *rest, torch.get_num_threads()):
        raise MemoryError(f"there is no memory for the batch of {name}: take a smaller one")


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
