"""A smaller model: its weights, and the shapes by which a copy of the large one is made as small."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.errors import InputError
from sparsity.shrink import LAYERS, NORMS, shrink

from .tensors import State, state


def encode(model: nn.Module) -> tuple[State, dict[str, Any]]:
    """The state of the model that `shrink` makes of a chain, and its manifest: the shape of every tensor."""
    if not isinstance(model, nn.Sequential):
        raise InputError(
            f"an nn.Sequential is shrunk, got {type(model).__name__}: export the part of it that is a chain (`part`)"
        )
    found = state(shrink(model))
    return found, {"manifest": {name: list(value.shape) for name, value in found.items()}}


def like(model: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> nn.Module:
    """A copy of the large model as small as the manifest says, with any weights.

    Raises `InputError` for a manifest that does not come from this model, or is not that of the tensors.
    """
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    if about.get("manifest") != shapes:
        raise InputError("the manifest is not that of the tensors beside it: export again")
    if not isinstance(model, nn.Sequential):
        raise InputError(f"a shrunk chain is loaded like an nn.Sequential, got {type(model).__name__}")
    layers = [copy.deepcopy(layer) for layer in _flat(model)]
    chain = nn.Sequential(*layers)
    own = {name: list(value.shape) for name, value in chain.state_dict().items()}
    biases = {f"{place}.bias" for place, layer in enumerate(layers) if isinstance(layer, LAYERS)}
    unknown = sorted(own.keys() - shapes.keys() | shapes.keys() - own.keys() - biases)
    larger = [name for name, shape in own.items() if name not in unknown and not _fits(shapes[name], shape)]
    if unknown or larger:
        raise InputError(f"'{(unknown + larger)[0]}' of the file is not of a smaller copy of this model")
    fan = {place: _factor(first, second) for (_, first), (place, second) in pairwise(_weighted(layers))}
    for place, layer in enumerate(layers):
        _resize(
            layer, {name.rpartition(".")[2]: shape for name, shape in shapes.items() if name.startswith(f"{place}.")}
        )
    for (_, first), (place, second) in pairwise(_weighted(layers)):
        if second.weight.shape[1] != fan[place] * len(first.weight):
            raise InputError(f"layer {place} of the file has inputs that are not the outputs of the layer before it")
    return chain


def _flat(chain: nn.Sequential) -> list[nn.Module]:
    return [each for layer in chain for each in (_flat(layer) if isinstance(layer, nn.Sequential) else [layer])]


def _weighted(layers: list[nn.Module]) -> list[tuple[int, Any]]:
    return [(place, layer) for place, layer in enumerate(layers) if isinstance(layer, LAYERS)]


def _factor(first: Any, second: Any) -> int:
    """How many inputs of a layer look at one output of the layer before it: places of an image that was flattened."""
    return int(second.weight.shape[1] // len(first.weight))


def _fits(small: list[int], large: list[int]) -> bool:
    return len(small) == len(large) and all(0 < one <= other for one, other in zip(small, large, strict=True))


def _resize(layer: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Gives the layer tensors of other shapes, and says so in its attributes."""
    for name, shape in shapes.items():
        old = getattr(layer, name)
        if isinstance(old, Tensor) and list(old.shape) == shape:
            continue
        like = layer.get_parameter("weight") if old is None else old
        new = torch.empty(shape, dtype=like.dtype, device=like.device)
        setattr(layer, name, new if name in dict(layer.named_buffers()) else nn.Parameter(new, like.requires_grad))
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    elif isinstance(layer, NORMS) and layer.running_mean is not None:
        layer.num_features = len(layer.running_mean)
