"""Linear layers whose weights keep two of four (2:4), by torch's semi-structured kernels on CUDA."""

import logging
import warnings
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from sparsity.ops import product

log = logging.getLogger(__name__)


def semi_sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` for ``x [..., in]`` and a weight ``[out, in]``: ``[..., out]``; by 2:4 kernels where it can be.

    W is the weight where the mask is True; without a mask, all of it, and its gradient is that of all of it. Kernels
    run on CUDA, in float16 and bfloat16 (by autocast, too), where no four consecutive inputs have more than two weights
    that are not zero: cuSPARSELt's, or else CUTLASS's. The gradient of x is by kernels, too, where the transpose of W
    is 2:4. Everything else is the product of the dense matrix; one line of the log says where a device has no kernels.

    W is packed when it is first used and after each change, except for changes through `.data` or numpy, which are not
    seen. Raises `ValueError` for tensors that do not fit one another.
    """
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected x [..., in] and a weight [out, in], got {tuple(x.shape)}, {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected a bias of {len(weight)}, got {tuple(bias.shape)}")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"expected a bool mask of {tuple(weight.shape)}, got {mask.dtype} of {tuple(mask.shape)}")
    given = [x, weight, *(each for each in (bias, mask) if each is not None)]
    if len({each.device for each in given}) > 1:
        raise ValueError(f"expected tensors on one device, got {', '.join(str(each.device) for each in given)}")
    # Only what the weight would be cast to is looked at: a cast of it for each call would be packed anew for each.
    x, like, bias = product.autocasted(x, weight[:0], bias)
    if any(each.dtype != x.dtype for each in (like, bias) if each is not None):
        raise ValueError(f"expected x, a weight and a bias of one dtype, got {x.dtype} and {weight.dtype}")
    y: Tensor = torch.ops.sparsity.semi(x, weight, bias, mask)
    return y


def is_semi_sparse(matrix: Tensor) -> bool:
    """Whether no four consecutive columns of a matrix have more than two values that are not zero, in any row."""
    rows, columns = matrix.shape
    groups = (matrix != 0).reshape(rows, columns // 4, 4) if columns % 4 == 0 else None
    return groups is not None and bool((groups.sum(2, dtype=torch.uint8) <= 2).all())


def has_kernels(weight: Tensor) -> bool:
    """Whether its device has kernels for a weight ``[out, in]`` of this shape and dtype, if it is 2:4."""
    return _fitting(weight.shape, weight.device, weight.dtype) is not None


@torch.library.custom_op("sparsity::semi", mutates_args=())
def _semi(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    packed = _packed(weight, mask, x.dtype, transposed=False)
    with torch.autocast(x.device.type, enabled=False):
        if packed is None or not x.numel():
            return F.linear(x, _kept(weight, mask, x.dtype), bias)
        return F.linear(product.flattened(x).contiguous(), packed, bias).view(*x.shape[:-1], len(weight))


@torch.library.custom_op("sparsity::semi_input", mutates_args=())
def _semi_input(y: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """``y W`` for ``y [..., out]``: ``[..., in]``."""
    packed = _packed(weight, mask, y.dtype, transposed=True)
    with torch.autocast(y.device.type, enabled=False):
        if packed is None or not y.numel():
            return y @ _kept(weight, mask, y.dtype)
        return F.linear(product.flattened(y).contiguous(), packed).view(*y.shape[:-1], weight.shape[1])


@_semi.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_semi_input.register_fake
def _(y: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    return y.new_empty(*y.shape[:-1], weight.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], inputs[-1])


def _slope(y: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """``y^T x``, the gradient of the weight, where the mask is True."""
    with torch.autocast(y.device.type, enabled=False):
        found = (product.flattened(y).t() @ product.flattened(x)).to(weight.dtype)
    return found if mask is None else torch.where(mask, found, 0)


def _semi_backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        torch.ops.sparsity.semi_input(y, weight, mask) if wanted[0] else None,
        _slope(y, x, weight, mask) if wanted[1] else None,
        product.flattened(y).sum(0) if wanted[2] else None, None,
    )  # fmt: skip


def _semi_input_backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    y, weight, mask = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        torch.ops.sparsity.semi(x, weight, None, mask) if wanted[0] else None,
        _slope(y, x, weight, mask) if wanted[1] else None,
        None,
    )  # fmt: skip


_semi.register_autograd(_semi_backward, setup_context=_save)
_semi_input.register_autograd(_semi_input_backward, setup_context=_save)


def _kept(weight: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = weight.detach()
    return (weight if mask is None else torch.where(mask, weight, 0)).to(dtype)


_PACKED: Any = WeakIdKeyDictionary()  # weights, and what they were packed to, in which state of theirs


def _packed(weight: Tensor, mask: Tensor | None, dtype: torch.dtype, transposed: bool) -> Tensor | None:
    """W, or its transpose, as the kernels take it; None where they do not."""
    shape = weight.shape[::-1] if transposed else weight.shape
    kind = _fitting(shape, weight.device, dtype)
    if kind is None:
        return None
    state = _state(weight, mask, dtype)
    known = _PACKED.setdefault(weight, {}) if state else {}
    if state and transposed in known and known[transposed][0] is mask and known[transposed][1] == state:
        found: Tensor | None = known[transposed][2]
        return found
    _watch_fused_steps()
    kept = _kept(weight, mask, dtype)
    kept = (kept.t() if transposed else kept).contiguous()
    found = kind.from_dense(kept) if is_semi_sparse(kept) else None
    known[transposed] = mask, state, found
    return found


@cache
def _watch_fused_steps() -> None:
    """Fused optimizers change weights without counting it: what they have stepped is packed anew."""

    def forget(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                for weight in group["params"]:
                    _PACKED.pop(weight, None)

    register_optimizer_step_post_hook(forget)


def _state(weight: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Hashable, ...] | None:
    """What is different after a change of weight or mask; None where tensors do not tell."""
    given = [weight] if mask is None else [weight, mask]
    if any(each.is_inference() for each in given):
        return None
    return dtype, *((each._version, each.data_ptr(), each.device) for each in given)


def _fitting(shape: torch.Size | tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
    """torch's class of packed matrices for this one, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    for kind in _kinds(device, dtype):
        least = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
        rows, columns = shape
        if rows and columns and rows % least.sparse_min_rows == columns % least.sparse_min_cols == 0:
            return kind
    return None


@cache
def _kinds(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """torch's classes whose kernels give the right product on this device, the faster one first."""
    found: tuple[Any, ...] = ()
    if device.type == "cuda":
        names = ("SparseSemiStructuredTensorCUSPARSELT", "SparseSemiStructuredTensorCUTLASS")
        kinds = [getattr(torch.sparse, name, None) for name in names]
        found = tuple(kind for kind in kinds if kind is not None and _works(kind, device, dtype))
    if not found:
        log.info("%s has no 2:4 kernels for %s: such layers are computed by their dense matrix", device, dtype)
    return found


def _works(kind: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels pack and multiply a small matrix right."""
    weight = (torch.arange(64 * 64, device=device).view(64, 64) % 7 - 3).to(dtype)
    weight.view(64, 16, 4)[..., 1::2] = 0
    x = (torch.arange(8 * 64, device=device).view(8, 64) % 5 - 2).to(dtype)
    try:
        with warnings.catch_warnings():  # once, torch says that this interface is a prototype
            warnings.simplefilter("ignore", UserWarning)
            y = F.linear(x, kind.from_dense(weight))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        log.info("%s does not run on %s: %s", kind.__name__, device, error)
        return False
    return bool(torch.equal(y, F.linear(x, weight)))  # whole numbers, so there is no rounding
