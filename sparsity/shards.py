"""Shards: weights that are spread over processes as DTensors (FSDP2, tensor parallelism).

Masks are whole on every process, chosen from whole weights, so that all processes choose the same; they are applied to
the part that a process holds. Tensors that are not spread are whole and local at once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsity.errors import InputError


def whole(tensor: Tensor) -> Tensor:
    """All of the tensor, gathered from all processes; all of them have to ask for it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds, in the same memory."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor


def like(part: Tensor, weight: Tensor) -> Tensor:
    """A tensor spread as the weight is, of which this process holds this part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())  # type: ignore[attr-defined]  # a DTensor


def local_part(whole: Tensor, weight: Tensor) -> Tensor:
    """The part of a whole tensor, such as a mask, that belongs to the part of the weight that this process holds."""
    if not is_spread(weight):
        return whole
    from torch.distributed.tensor import distribute_tensor  # costs time to import, and few need it

    # Without a source rank each process takes its part of its own, and nothing is sent.
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None).to_local()  # type: ignore[attr-defined]  # a DTensor


def is_spread(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor; told by its methods, because importing the class costs time."""
    return hasattr(tensor, "full_tensor")


def all_agree(holds: bool, weights: list[nn.Parameter]) -> bool:
    """Whether it holds on all processes, where weights are spread over them and each sees its part."""
    if not any(map(is_spread, weights)):
        return holds
    flag = torch.tensor(int(holds), device=weights[0].device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def total(sums: Tensor, weights: Mapping[str, nn.Parameter]) -> Tensor:
    """The sums over all processes, where weights are spread over them and each has those of its part.

    A part that several processes hold counts as often.
    """
    if any(map(is_spread, weights.values())):
        torch.distributed.all_reduce(sums)
    return sums


def refuse_flattened(model: nn.Module) -> None:
    """Raises `InputError` where weights have lost their shapes: FSDP of the first kind, DeepSpeed's third stage."""
    for name, weight in model.named_parameters():
        if hasattr(weight, "_fsdp_flattened") or hasattr(weight, "ds_id"):
            raise InputError(
                f"'{name}' is sharded in a flat form that has no rows and columns (FSDP1 or DeepSpeed ZeRO-3), which "
                "masks need: use FSDP2 (ModelParallelStrategy with fully_shard in configure_model), DDP or ZeRO-1/2"
            )
