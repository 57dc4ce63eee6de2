"""Convert: masked layers into layers that hold their kept weights only, and back."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.ops import block_sparse_linear, sparse_linear
from sparsity.ops.blocks import SIDES, compressed_blocks, decompressed_blocks, in_blocks, kept_blocks
from sparsity.ops.linear import Rows, compressed, decompressed

DENSITY = 0.2  # up to which a layer of kept weights is taken to pay


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


def kept_linear(layer: nn.Linear, mask: Tensor) -> KeptLinear:
    """The layer by what its mask keeps: by the largest blocks that the mask is made of, or else by single weights."""
    side = block_side(mask)
    if side is None:
        return SparseLinear(layer.weight, layer.bias, mask)
    return BlockSparseLinear(layer.weight, layer.bias, mask, side)


def block_side(mask: Tensor) -> int | None:
    """The side of the largest blocks that a mask is made of, None where single weights are what it keeps.

    Blocks that mostly lie beyond the weight are not taken: what they hold may exceed what is kept by a quarter.
    """
    for side in reversed(SIDES):
        if in_blocks(mask, side) and kept_blocks(mask, side) * side**2 <= 1.25 * int(mask.count_nonzero()):
            return side
    return None


def kernels(module: nn.Module, masks: Mapping[str, Tensor], density: float = DENSITY) -> dict[str, str]:
    """What would run each masked weight after `to_sparse`, by name: "dense", "rows", or "blocks of 32" and their kin.

    The rule is that of `to_sparse`; nothing is measured.
    """
    linear = {f"{name}.weight" if name else "weight" for name in linear_layers(module)}

    def kernel(name: str, mask: Tensor) -> str:
        if name not in linear or not _pays(mask, density):
            return "dense"
        side = block_side(mask)
        return "rows" if side is None else f"blocks of {side}"

    return {name: kernel(name, mask) for name, mask in masks.items()}


def mask_of(name: str, layer: nn.Linear, masks: Masks | None) -> Tensor:
    """What is kept of a layer: by its mask, or else what is not zero."""
    found = (masks or {}).get(f"{name}.weight" if name else "weight", layer.weight != 0)
    return found.to(layer.weight.device)


def to_sparse(
    module: nn.Module, masks: Masks | None = None, density: float = DENSITY, only: Collection[str] | None = None
) -> nn.Module:
    """A copy of the module whose linear layers of at most this density hold kept weights, or `only` these, by name.

    They become `BlockSparseLinear` where a mask is made of blocks, and `SparseLinear` where it is not.

    Kept is what the masks keep, by the weight's name, or else what is not zero. Layers above the density stay as they
    are, because there a dense product is faster on most processors; `train.py advise` measures it. Only those of
    `linear_layers` are exchanged, and their hooks stay behind. Raises `InputError` for a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise InputError(f"density={density} is the kept part of a layer's weights, up to which it pays, in (0, 1]")
    names = linear_layers(module)

    def sparse(name: str, layer: nn.Module) -> nn.Module:
        if name not in names or (only is not None and name not in only):
            return layer
        layer = names[name]
        mask = mask_of(name, layer, masks)
        if only is None and not _pays(mask, density):
            return layer
        found = kept_linear(layer, mask)
        found.values.requires_grad_(layer.weight.requires_grad)
        if found.bias is not None:
            found.bias.requires_grad_(layer.bias.requires_grad)
        return found.train(layer.training)

    return _replaced(module, sparse)


def _pays(mask: Tensor, density: float) -> bool:
    return int(mask.count_nonzero()) <= density * mask.numel()


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that have a sparse form, by name.

    Not subclasses of `nn.Linear`, which may compute something else, nor those whose weight another layer has, too.
    """
    owners = Counter(id(weight) for layer in module.modules() for weight in layer.parameters(recurse=False))
    plain = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    return {name: layer for name, layer in plain.items() if owners[id(layer.weight)] == 1}


def to_dense(module: nn.Module) -> nn.Module:
    """A copy of the module with `nn.Linear` in place of layers of kept weights: the same weights to the bit (-0: 0)."""

    def dense(name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, KeptLinear):
            return layer
        found = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        found.weight = nn.Parameter(layer.weight.detach(), layer.values.requires_grad)
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
