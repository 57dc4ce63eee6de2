"""N:M weights as their kept values and, for each, the few bits that say where in its group it lies."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import cuda

MOST = 256  # weights of a group


def pack_nm(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The n largest magnitudes of each m consecutive weights of the last axis: values and indices.

    For a weight ``[..., in]`` values are ``[..., in / m * n]``, in order of columns. Indices are uint8
    ``[..., ceil(in / m * n * b / 8)]``, where b is the number of bits of m - 1: the index of value i of a row, its
    place in its group, is bits i b to i b + b - 1 of the row's bytes, the lowest first; what is left of the last byte
    is zero. For 2:4 four indices of 2 bits make a byte. Among equal magnitudes the first are kept, and NaN is above
    all. The values have a gradient.

    On a GPU and for m of 2, 4, 8 or 16 it is one Triton kernel, which has not been timed.

    Raises `ValueError` for anything but a floating weight,
    and where m does not divide its last axis.
    """
    if weight.ndim < 1 or not weight.is_floating_point():
        raise ValueError(f"expected a floating weight [..., in], got {weight.dtype} of {tuple(weight.shape)}")
    _check(n, m)
    if weight.shape[-1] % m:
        raise ValueError(f"groups of {m} do not divide {weight.shape[-1]} weights, the last axis")
    found: tuple[Tensor, Tensor] = torch.ops.sparsity.pack_nm(weight, n, m)
    return found


def unpack_nm(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """The weight ``[..., in]`` that `pack_nm` had, with zeros elsewhere. It has a gradient by the values.

    Raises `ValueError` for values and indices that do not fit each other.
    """
    _check(n, m)
    if values.ndim < 1 or values.shape[-1] % n:
        raise ValueError(f"expected values [..., groups * {n}], got {tuple(values.shape)}")
    shape = (*values.shape[:-1], _bytes(values.shape[-1], m))
    if indices.dtype != torch.uint8 or indices.shape != shape:
        raise ValueError(f"expected indices of uint8 {shape}, got {indices.dtype} of {tuple(indices.shape)}")
    if indices.device != values.device:
        raise ValueError(f"expected tensors on one device, got {values.device} and {indices.device}")
    weight: Tensor = torch.ops.sparsity.unpack_nm(values, indices, n, m)
    return weight


@torch.library.custom_op("sparsity::pack_nm", mutates_args=())
def _pack(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    if cuda.serves(weight) and m in (2, 4, 8, 16):
        from sparsity.ops.cuda import pack as kernels

        return kernels.pack(weight, n, m)
    groups = rearrange(weight.detach(), "... (group m) -> ... group m", m=m)
    places = groups.abs().argsort(dim=-1, descending=True, stable=True)[..., :n].sort(-1).values
    values = groups.gather(-1, places).flatten(-2)
    width = _width(m)
    bits = places.flatten(-2)[..., None] >> torch.arange(width, device=weight.device) & 1
    bits = F.pad(bits.flatten(-2), (0, -values.shape[-1] * width % 8))
    bits = rearrange(bits, "... (byte bit) -> ... byte bit", bit=8)
    return values, (bits << torch.arange(8, device=weight.device)).sum(-1).to(torch.uint8)


@torch.library.custom_op("sparsity::unpack_nm", mutates_args=())
def _unpack(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    if cuda.serves(values) and m in (2, 4, 8, 16):
        from sparsity.ops.cuda import pack as kernels

        return kernels.unpack(values, indices, n, m)
    groups = rearrange(values.detach(), "... (group n) -> ... group n", n=n)
    places = _places(indices, values.shape[-1], n, m)
    if m & (m - 1) and places.numel() and int(places.max()) >= m:
        raise ValueError(f"an index names place {int(places.max())} of a group of {m}")
    empty = groups.new_zeros(*groups.shape[:-1], m)
    weight: Tensor = empty.scatter_(-1, places, groups).flatten(-2)
    return weight


@_pack.register_fake
def _(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    *rows, width = weight.shape
    count = width // m * n
    return weight.new_empty(*rows, count), weight.new_empty(*rows, _bytes(count, m), dtype=torch.uint8)


@_unpack.register_fake
def _(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return values.new_empty(*values.shape[:-1], values.shape[-1] // n * m)


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.pattern = inputs[1:]
    ctx.mark_non_differentiable(output[1])


def _pack_backward(ctx: Any, values: Tensor, indices: Tensor) -> tuple[Tensor | None, ...]:
    (places,) = ctx.saved_tensors
    weight: Tensor = torch.ops.sparsity.unpack_nm(values, places, *ctx.pattern)
    return weight, None, None


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.pattern = inputs[2:]


def _unpack_backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    n, m = ctx.pattern
    places = _places(indices, weight.shape[-1] // m * n, n, m)
    return rearrange(weight, "... (group m) -> ... group m", m=m).gather(-1, places).flatten(-2), None, None, None


_pack.register_autograd(_pack_backward, setup_context=_save_pack)
_unpack.register_autograd(_unpack_backward, setup_context=_save_unpack)


def _places(indices: Tensor, count: int, n: int, m: int) -> Tensor:
    """The place of each value in its group: int64 ``[..., groups, n]``."""
    width = _width(m)
    bits = (indices[..., None].long() >> torch.arange(8, device=indices.device) & 1).flatten(-2)
    bits = rearrange(bits[..., : count * width], "... (group n bit) -> ... group n bit", n=n, bit=width)
    places: Tensor = (bits << torch.arange(width, device=indices.device)).sum(-1)
    return places


def _width(m: int) -> int:
    """Bits of an index."""
    return (m - 1).bit_length()


def _bytes(count: int, m: int) -> int:
    return -(-count * _width(m) // 8)


def _check(n: int, m: int) -> None:
    if not 1 <= n <= m <= MOST or m < 2:
        raise ValueError(f"expected 1 <= n <= m and 2 <= m <= {MOST}, got {n}:{m}")
