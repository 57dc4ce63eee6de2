"""Convert: masked layers into layers that hold their kept weights only, and back."""

import copy
from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.ops import block_sparse_linear, semi_sparse_linear, sparse_linear
from sparsity.ops.blocks import SIDES, compressed_blocks, decompressed_blocks, in_blocks
from sparsity.ops.linear import Rows, compressed, decompressed
from sparsity.ops.semi import has_kernels, is_semi_sparse


class KeptLinear(nn.Module):
    """A linear layer of ``[in]`` to ``[out]`` that holds, and trains, its kept weights only: for fixed masks.

    `values` is the parameter, so any optimizer's state is as small as it is.
    """

    values: nn.Parameter
    columns: Tensor
    starts: Tensor

    def __init__(self, weight: Tensor, rows: Rows, bias: Tensor | None = None, mask: Tensor | None = None) -> None:
        super().__init__()
        self.kept = int((weight if mask is None else mask).count_nonzero())
        self.out_features, self.in_features = weight.shape
        values, columns, starts = rows
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("columns", columns)
        self.register_buffer("starts", starts)

    @property
    def density(self) -> float:
        """The kept part of the weights."""
        return self.kept / max(1, self.in_features * self.out_features)

    @property
    def weight(self) -> Tensor:
        """The matrix ``[out, in]``, made anew."""
        raise NotImplementedError(f"{type(self).__name__} says how its weights lie")

    def extra_repr(self) -> str:
        biased = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={biased}, density={self.density:.4f}"


class SparseLinear(KeptLinear):
    """Single weights, by `ops.sparse_linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> None:
        super().__init__(weight, compressed(weight.detach(), mask), bias, mask)

    @property
    def weight(self) -> Tensor:
        return decompressed(self.values, self.columns, self.starts, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return sparse_linear(x, self.values, self.columns, self.starts, self.bias)


class BlockSparseLinear(KeptLinear):
    """Square blocks of weights, by `ops.block_sparse_linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, side: int = 32) -> None:
        super().__init__(weight, compressed_blocks(weight.detach(), mask, side), bias, mask)

    @property
    def weight(self) -> Tensor:
        return decompressed_blocks(self.values, self.columns, self.starts, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return block_sparse_linear(x, self.values, self.columns, self.starts, self.out_features, self.bias)


class SemiSparseLinear(nn.Linear):
    """A linear layer of `ops.semi_sparse_linear`: by 2:4 kernels while its weight is 2:4, and as any other where not.

    The weight stays dense, under its name, so methods of training, optimizers and checkpoints see a linear layer.
    With a mask only kept weights have a gradient: for fixed masks. Without one all have, for masks that move.
    """

    mask: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.register_buffer("mask", None if mask is None else mask.clone())
        self.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone())
        with torch.no_grad():
            self.weight.copy_(self.kept_weight)

    @property
    def kept_weight(self) -> Tensor:
        """The matrix ``[out, in]`` that the layer computes with."""
        return self.weight if self.mask is None else torch.where(self.mask, self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return semi_sparse_linear(x, self.weight, self.bias, self.mask)


def kept_linear(layer: nn.Linear, mask: Tensor) -> KeptLinear:
    """The layer by what its mask keeps: by the largest blocks that the mask is made of, or else by single weights.

    Blocks that mostly lie beyond the weight are not taken: what they hold may exceed what is kept by a quarter.
    """
    for side in reversed(SIDES):
        if in_blocks(mask, side):
            found = BlockSparseLinear(layer.weight, layer.bias, mask, side)
            if found.values.numel() <= 1.25 * found.kept:
                return found
    return SparseLinear(layer.weight, layer.bias, mask)


def mask_of(name: str, layer: nn.Linear, masks: Masks | None) -> Tensor:
    """What is kept of a layer: by its mask, or else what is not zero."""
    found = (masks or {}).get(f"{name}.weight" if name else "weight", layer.weight != 0)
    return found.to(layer.weight.device)


def to_sparse(
    module: nn.Module, masks: Masks | None = None, density: float = 0.2, only: Collection[str] | None = None
) -> nn.Module:
    """A copy of the module whose linear layers of at most this density hold kept weights, or `only` these, by name.

    They become `BlockSparseLinear` where a mask is made of blocks, and `SparseLinear` where it is not.

    Kept is what the masks keep, by the weight's name, or else what is not zero. Layers above the density become
    `SemiSparseLinear` where masks are 2:4 and the device has kernels for that; else they stay as they are, because
    there a dense product is faster on most processors; `train.py advise` measures it. Only those of `linear_layers` are
    exchanged, and their hooks stay behind. Raises `InputError` for a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise InputError(f"density={density} is the kept part of a layer's weights, up to which it pays, in (0, 1]")
    names = linear_layers(module)

    def sparse(name: str, layer: nn.Module) -> nn.Module:
        if name not in names or (only is not None and name not in only):
            return layer
        layer = names[name]
        mask = mask_of(name, layer, masks)
        found: KeptLinear | SemiSparseLinear
        if int(mask.count_nonzero()) <= density * mask.numel():
            found = kept_linear(layer, mask)
        elif has_kernels(layer.weight) and is_semi_sparse(mask):
            found = SemiSparseLinear(layer.weight, layer.bias, mask)
        elif only is None:
            return layer
        else:
            found = kept_linear(layer, mask)
        return _trained_as(layer, found)

    return _replaced(module, sparse)


def to_semi_sparse(module: nn.Module, only: Collection[str] | None = None) -> nn.Module:
    """A copy of the module with `SemiSparseLinear`, without masks, for its linear layers, or `only` these, by name.

    It computes and trains as before; when a method such as `SRSTE` makes weights 2:4, they are multiplied by kernels
    for that where the device has them. Raises `InputError` for a name in `only` that is none of `linear_layers`.
    """
    names = linear_layers(module)
    if unknown := sorted(set(only or ()) - names.keys()):
        raise InputError(f"only={unknown} are no linear layers of their own here: choose among {list(names)}")

    def semi(name: str, layer: nn.Module) -> nn.Module:
        if name not in names or (only is not None and name not in only):
            return layer
        return _trained_as(names[name], SemiSparseLinear(names[name].weight, names[name].bias))

    return _replaced(module, semi)


def _trained_as(layer: nn.Linear, found: KeptLinear | SemiSparseLinear) -> nn.Module:
    """The layer found, in the other one's mode, and frozen where that is."""
    (found.values if isinstance(found, KeptLinear) else found.weight).requires_grad_(layer.weight.requires_grad)
    if found.bias is not None:
        found.bias.requires_grad_(layer.bias.requires_grad)
    return found.train(layer.training)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that have a sparse form, by name.

    Not subclasses of `nn.Linear`, which may compute something else, nor those whose weight another layer has, too.
    """
    owners = Counter(id(weight) for layer in module.modules() for weight in layer.parameters(recurse=False))
    plain = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    return {name: layer for name, layer in plain.items() if owners[id(layer.weight)] == 1}


def to_dense(module: nn.Module) -> nn.Module:
    """A copy of the module with `nn.Linear` in place of sparse layers: the same weights to the bit (-0: 0)."""

    def dense(name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, KeptLinear | SemiSparseLinear):
            return layer
        found = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        if isinstance(layer, KeptLinear):
            found.weight = nn.Parameter(layer.weight.detach(), layer.values.requires_grad)
        else:
            found.weight = nn.Parameter(layer.kept_weight.detach().clone(), layer.weight.requires_grad)
        if layer.bias is not None:
            found.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
        return found.train(layer.training)

    return _replaced(module, dense)


def _replaced(module: nn.Module, change: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """A copy of the module with other layers where `change` gives others; a layer in two places is changed once."""
    changed = {id(layer): change(name, layer) for name, layer in module.named_modules()}
    kept = {id(layer) for layer in module.modules() if changed[id(layer)] is layer}
    # What a deep copy finds in its memo it takes as the copy: other layers come in without the old ones being copied.
    return copy.deepcopy(module, {place: layer for place, layer in changed.items() if place not in kept})
