"""Products of a batch with a weight that is kept in part: what all its forms have in common."""

from collections.abc import Callable, Sequence
from ctypes import c_int64
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from sparsity.ops import native

WORK = 1 << 12  # products that C++ is compiled for: the dense matrix is made in less time than it takes to call it

WIDE = (torch.float32, torch.float64)

Function = Callable[..., Tensor]
Gradients = tuple[Tensor | None, ...]


def define(name: str, fake: Function) -> Callable[[Function], Function]:
    """Makes a function an operation of torch, as `torch.library.custom_op` does; `fake` gives an empty result.

    It leaves out that one's look, at each call, for results that share memory with what was given: those of small
    batches feel it, and `torch.library.opcheck` looks for the same.
    """

    def register(function: Function) -> Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"sparsity::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Dynamo, where it has given up on a caller, is not to compile what this does; `disable` would import it now.
        plain = torch._disable_dynamo(function)  # type: ignore[attr-defined]  # not among what torch exports
        torch.library.impl(f"sparsity::{name}", "CompositeExplicitAutograd")(plain)
        torch.library.register_fake(f"sparsity::{name}", fake)
        return function

    return register


def differentiate(name: str, to_y: Function, to_x: Function, to_values: Function) -> None:
    """Gives three operations, `name`, `name_input` and `name_values`, their gradients, of any order.

    They are one trilinear form of y, x and the values, so the gradients of each are the other two. All three functions
    are called with y, x, the values and the places; of what theirs is the gradient of they need the shape only.
    """

    def of_output(context: Any, y: Tensor) -> Gradients:
        x, values, *places = context.saved_tensors
        bias = flattened(y).sum(0) if context.biased and context.needs_input_grad[4] else None
        return _gradients(context, (to_x, to_values), (y, x, values, *places), None, None, bias)

    def of_input(context: Any, x: Tensor) -> Gradients:
        y, values, *places = context.saved_tensors
        return _gradients(context, (to_y, to_values), (y, x, values, *places))

    def of_values(context: Any, values: Tensor) -> Gradients:
        y, x, *places = context.saved_tensors
        return _gradients(context, (to_y, to_x), (y, x, values, *places))

    for suffix, gradients in (("", of_output), ("_input", of_input), ("_values", of_values)):
        torch.library.register_autograd(f"sparsity::{name}{suffix}", gradients, setup_context=_save)


def _gradients(
    context: Any, functions: tuple[Function, Function], form: tuple[Tensor, ...], *others: Tensor | None
) -> Gradients:
    """Those of an operation's first two arguments, where they are wanted, then these others, and None for the rest."""
    wanted = context.needs_input_grad
    found = [function(*form) if asked else None for function, asked in zip(functions, wanted[:2], strict=True)]
    return (*found, *others, *[None] * (len(wanted) - 2 - len(others)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what the gradients of an operation need: its first four tensors, and whether it had a bias."""
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    ctx.save_for_backward(*tensors[:4])
    ctx.biased = len(tensors) > 4


def autocasted(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """These in the dtype of the user's autocast where it is on, which leaves float64 alone.

    By hand, as torch.library's own rule knows one dtype only, whatever the autocast has.
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, values, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)


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


class Remembered:
    """What was found out about places and their starts, as long as neither changes.

    Writes through `.data` or numpy are not seen, and nothing is remembered of inference tensors, which do not tell.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ReferenceType[Tensor], Tensor, tuple[int, ...], Any]] = {}

    def find(self, places: Tensor, starts: Tensor, *sizes: int) -> Any:
        """What was kept for these, or None."""
        known = self._known.get(id(places))
        if known is None or known[0]() is not places or known[1] is not starts:
            return None
        return known[3] if known[2] == self._state(places, starts, sizes) else None

    def keep(self, places: Tensor, starts: Tensor, *sizes: int, found: Any) -> None:
        if places.is_inference() or starts.is_inference():
            return
        place = id(places)
        watch = ref(places, lambda _: self._known.pop(place, None))
        self._known[place] = watch, starts, self._state(places, starts, sizes), found

    def _state(self, places: Tensor, starts: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
        memory = (starts.data_ptr(), places.data_ptr(), places.numel(), starts.numel())
        return starts._version, places._version, *sizes, *memory


_SEEN = Remembered()


def once(look: Callable[[], None], places: Tensor, starts: Tensor, *sizes: int) -> None:
    """Calls this, which raises what places, starts and sizes have wrong, but once for tensors that do not change."""
    if not _SEEN.find(places, starts, *sizes):
        look()
        _SEEN.keep(places, starts, *sizes, found=True)


def is_native(source: str, x: Tensor, kept: Tensor) -> bool:
    """Whether a product of these runs in C++, of this file."""
    batch = x.numel() // max(1, x.shape[-1])
    small = batch * kept.numel() < WORK or batch == 0
    return x.is_cpu and not small and native.library(source) is not None


def flattened(tensor: Tensor) -> Tensor:
    """As a matrix of the last dimension, also where that is empty."""
    return tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[None]


def wide(tensor: Tensor) -> Tensor:
    """Contiguous, in float32 or float64."""
    if tensor.dtype in WIDE and tensor.is_contiguous():
        return tensor  # three calls less: small batches feel them
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def shaped(result: Tensor, like: Tensor) -> Tensor:
    """A matrix as what it was computed of came: in the same batch, and the same dtype."""
    if like.ndim == 2 and like.dtype == result.dtype:
        return result
    return result.view(*like.shape[:-1], result.shape[1]).to(like.dtype)


def native_call(source: str, name: str, first: list[Tensor | int], sizes: list[Tensor | int | None]) -> None:
    """A C++ function of this file: tensors by their memory, numbers as int and, of `sizes`, int64; then threads."""
    given = [each if isinstance(each, int) else native.at(each) for each in first]
    rest = [c_int64(each) if isinstance(each, int) else None if each is None else native.at(each) for each in sizes]
    if getattr(native.library(source), name)(*given, *rest, torch.get_num_threads()):
        raise MemoryError(f"there is no memory for the batch of {name}: take a smaller one")
