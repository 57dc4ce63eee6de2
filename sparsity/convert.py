"""Convert: masked layers into layers that hold their kept weights only, and back."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.ops import bitmap_linear, block_sparse_linear, semi_sparse_linear, sparse_linear
from sparsity.ops.bitmap import compressed_bitmap, decompressed_bitmap
from sparsity.ops.blocks import SIDES, compressed_blocks, decompressed_blocks, in_blocks
from sparsity.ops.linear import compressed, decompressed
from sparsity.ops.semi import has_kernels, is_semi_sparse
from sparsity.targets import clean

DENSITY = 0.2  # up to which a layer of kept weights is taken to pay


class KeptLinear(nn.Module):
    """A linear layer of ``[in]`` to ``[out]`` that holds, and trains, its kept weights only: for fixed masks.

    `values` is the parameter, so any optimizer's state is as small as it is.
    """

    values: nn.Parameter

    def __init__(self, weight: Tensor, values: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
        super().__init__()
        self.kept = int((weight if mask is None else mask).count_nonzero())
        self.out_features, self.in_features = weight.shape
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

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

    columns: Tensor
    starts: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> None:
        values, columns, starts = compressed(weight.detach(), mask)
        super().__init__(weight, values, bias, mask)
        self.register_buffer("columns", columns)
        self.register_buffer("starts", starts)

    @property
    def weight(self) -> Tensor:
        return decompressed(self.values, self.columns, self.starts, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return sparse_linear(x, self.values, self.columns, self.starts, self.bias)


class BitmapLinear(KeptLinear):
    """Single weights with a bit for each place, by `ops.bitmap_linear`: for serving where more are kept."""

    bits: Tensor
    starts: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> None:
        values, bits, starts = compressed_bitmap(weight.detach(), mask)
        super().__init__(weight, values, bias, mask)
        self.register_buffer("bits", bits)
        self.register_buffer("starts", starts)

    @property
    def weight(self) -> Tensor:
        return decompressed_bitmap(self.values, self.bits, self.starts, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return bitmap_linear(x, self.values, self.bits, self.starts, self.bias)


class BlockSparseLinear(KeptLinear):
    """Square blocks of weights, by `ops.block_sparse_linear`: the largest that the mask is made of, or of this side."""

    columns: Tensor
    starts: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, side: int | None = None
    ) -> None:
        side = side or side_of(weight != 0 if mask is None else mask) or SIDES[0]
        values, columns, starts = compressed_blocks(weight.detach(), mask, side)
        super().__init__(weight, values, bias, mask)
        self.register_buffer("columns", columns)
        self.register_buffer("starts", starts)

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


class ShrunkLinear(KeptLinear):
    """A dense matrix of the outputs and inputs that keep anything: what is left of pruned neurons.

    Weights that are pruned within it are masked in training, and stay zero. Beside the smaller product it costs to pick
    its inputs and to put its outputs in their places, which `shrink` saves where the layers around it can shrink, too.
    """

    rows: Tensor
    columns: Tensor
    inside: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> None:
        kept = weight != 0 if mask is None else mask
        rows, columns = kept.any(1).nonzero().squeeze(1), kept.any(0).nonzero().squeeze(1)
        inside = kept[rows][:, columns]
        super().__init__(weight, weight.detach()[rows][:, columns].where(inside, 0), bias, mask)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.register_buffer("inside", None if inside.all() else inside)

    @property
    def weight(self) -> Tensor:
        empty = self.values.new_zeros(self.out_features, self.in_features)
        return empty.index_put((self.rows[:, None], self.columns), self._values())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if len(self.columns) < self.in_features:
            x = x.index_select(-1, self.columns)
        if len(self.rows) == self.out_features:
            return F.linear(x, self._values(), self.bias)
        y = F.linear(x, self._values(), None if self.bias is None else self.bias[self.rows])
        out = y.new_zeros(*y.shape[:-1], self.out_features) if self.bias is None else self.bias.to(y.dtype)
        return out.expand(*y.shape[:-1], -1).index_copy(-1, self.rows, y)

    def _values(self) -> Tensor:
        """The matrix, of which gradients reach what is kept only."""
        return self.values if self.inside is None or not torch.is_grad_enabled() else self.values * self.inside


Kept = KeptLinear | SemiSparseLinear
Form = Callable[[Tensor, Tensor | None, Tensor | None], Kept]  # a layer of weight, bias and mask


def side_of(mask: Tensor) -> int | None:
    """The side of the largest blocks that a mask is made of; None where it is not made of any.

    Blocks that mostly lie beyond the weight are not taken: what they hold may exceed what is kept by a quarter.
    """
    for side in reversed(SIDES):
        blocks = mask[::side, ::side].count_nonzero() if in_blocks(mask, side) else None
        if blocks is not None and int(blocks) * side**2 <= 1.25 * int(mask.count_nonzero()):
            return side
    return None


def form_of(weight: Tensor, mask: Tensor, density: float) -> Form | None:
    """The layer that `to_sparse` takes for a weight; None where that stays dense."""
    if int(mask.count_nonzero()) <= density * mask.numel():
        return BlockSparseLinear if side_of(mask) else SparseLinear
    return SemiSparseLinear if has_kernels(weight) and is_semi_sparse(mask) else None


def forms_of(weight: Tensor, mask: Tensor) -> list[Form]:
    """The layers that can hold what a mask keeps."""
    found: list[Form] = [SparseLinear, BitmapLinear]
    if side_of(mask):
        found.append(BlockSparseLinear)
    if has_kernels(weight) and is_semi_sparse(mask):
        found.append(SemiSparseLinear)
    if not bool(mask.any(0).all() and mask.any(1).all()):
        found.append(ShrunkLinear)
    return found


def kernels(module: nn.Module, masks: Mapping[str, Tensor], density: float = DENSITY) -> dict[str, str]:
    """What would run each masked weight after `to_sparse`: "dense", "rows", "blocks of 32" and their kin, or "2:4".

    The rule is that of `to_sparse`; nothing is measured.
    """
    layers = {clean(f"{name}.weight" if name else "weight"): layer for name, layer in linear_layers(module).items()}

    def kernel(name: str, mask: Tensor) -> str:
        form = form_of(layers[name].weight, mask, density) if name in layers else None
        names = {None: "dense", SparseLinear: "rows", SemiSparseLinear: "2:4"}
        return names[form] if form in names else f"blocks of {side_of(mask)}"

    return {name: kernel(name, mask) for name, mask in masks.items()}


def mask_of(name: str, layer: nn.Linear, masks: Masks | None) -> Tensor:
    """What is kept of a layer: by its mask, or else what is not zero."""
    found = (masks or {}).get(clean(f"{name}.weight" if name else "weight"), layer.weight != 0)
    return found.to(layer.weight.device)


def to_sparse(
    module: nn.Module,
    masks: Masks | None = None,
    density: float = DENSITY,
    forms: Mapping[str, Form] | None = None,
) -> nn.Module:
    """A copy of the module whose linear layers of at most this density hold kept weights.

    They become `BlockSparseLinear` where a mask is made of blocks, and `SparseLinear` where it is not. With `forms`
    these layers, by name, and no others, take the form that it says: `{"fc1": BitmapLinear}`.

    Kept is what the masks keep, by the weight's name, or else what is not zero. Layers above the density become
    `SemiSparseLinear` where masks are 2:4 and the device has kernels for that; else they stay as they are, because
    there a dense product is faster on most processors; `train.py advise` measures it. Only those of `linear_layers` are
    exchanged, and their hooks stay behind. Raises `InputError` for a density outside (0, 1] and for forms of what is no
    such layer.
    """
    if not 0 < density <= 1:
        raise InputError(f"density={density} is the kept part of a layer's weights, up to which it pays, in (0, 1]")
    names = linear_layers(module)
    for name in forms or ():
        if name not in names:
            raise InputError(f"forms name {name!r}, which is none of the linear layers: {', '.join(names) or 'none'}")

    def sparse(name: str, layer: nn.Module) -> nn.Module:
        if name not in names or (forms is not None and name not in forms):
            return layer
        layer = names[name]
        mask = mask_of(name, layer, masks)
        form = form_of(layer.weight, mask, density) if forms is None else forms[name]
        return layer if form is None else kept_linear(layer, mask, form)

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
        layer = names[name]
        return _trained_as(layer, SemiSparseLinear(layer.weight, layer.bias))

    return _replaced(module, semi)


def kept_linear(layer: nn.Linear, mask: Tensor, form: Form) -> Kept:
    """The layer by what its mask keeps, in this form; what is frozen stays so."""
    return _trained_as(layer, form(layer.weight, layer.bias, mask))


def _trained_as(layer: nn.Linear, found: Kept) -> Kept:
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
