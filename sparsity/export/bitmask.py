"""Bitmasks and values: a bit for every weight, and those weights that are not zero.

The tensors of compressed-tensors' formats "sparse-bitmask" and "sparse-24-bitmask" (up to its version 0.14), which
stands for a weight `layer.weight` by `layer.shape`, `layer.compressed`, `layer.bitmask` and `layer.row_offsets`.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.errors import InputError

from .tensors import State, bits, size

PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def encode(tensors: Mapping[str, Tensor]) -> tuple[State, dict[str, Any], dict[str, str]]:
    """The tensors with those packed that get smaller, what else is to be known, and metadata for compressed-tensors.

    Weights of more than two axes are packed as matrices of a row for each output, because the format has bytes and an
    offset of their own for every row. Their shapes, and names that do not end in `weight`, are what is to be known.
    """
    found: State = {}
    named: dict[str, str] = {}
    shapes: dict[str, list[int]] = {}
    for name, value in tensors.items():
        packed = pack(value.flatten(1)) if value.ndim > 1 and value.numel() and value.element_size() <= 8 else {}
        if not packed or size(packed) >= value.nbytes:
            found[name] = value
            continue
        stem = name.removesuffix(".weight")
        named[stem] = name
        if value.ndim > 2:
            shapes[name] = list(value.shape)
        found |= {f"{stem}.{part}": each for part, each in packed.items()}
    _refuse_clashes(found, tensors, named)
    others = {stem: name for stem, name in named.items() if name != f"{stem}.weight"}
    weights = [tensors[name] for name in named.values()]
    kept = sum(int((each != 0).count_nonzero()) for each in weights)
    config = {
        "format": "sparse-bitmask", "targets": sorted(named), "ignore": [], "sparsity_structure": "unstructured",
        "global_sparsity": 1 - kept / max(1, sum(each.numel() for each in weights)),
    }  # fmt: skip
    return found, {"names": others, "shapes": shapes}, {"sparsity_config": json.dumps(config)}


def decode(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> State:
    """The tensors with their packed ones unpacked; raises `InputError` where a part contradicts another."""
    names, shapes = about.get("names", {}), about.get("shapes", {})
    if not isinstance(names, dict) or not isinstance(shapes, dict):
        raise InputError("the names and shapes of the packed weights are damaged: export again")
    stems = [name.removesuffix(".bitmask") for name in tensors if is_packed(name, tensors)]
    used = {f"{stem}.{part}" for stem in stems for part in PARTS}
    found = {name: value for name, value in tensors.items() if name not in used}
    for stem in stems:
        name = str(names.get(stem, f"{stem}.weight"))
        if name in found:
            raise InputError(f"'{name}' is there twice: packed, and as it is")
        matrix = unpack({part: tensors[f"{stem}.{part}"] for part in PARTS if f"{stem}.{part}" in tensors}, stem)
        found[name] = _shaped(matrix, shapes[name], name) if name in shapes else matrix
    return found


def is_packed(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the name is that of a packed weight's bitmask."""
    stem = name.removesuffix(".bitmask")
    return stem != name and f"{stem}.compressed" in tensors and f"{stem}.shape" in tensors


def pack(weight: Tensor) -> State:
    """The parts of a weight: int64 `shape`, `compressed` values in order, uint8 `bitmask`, int64 `row_offsets`.

    Bits go along the last axis, the first weight in the lowest bit, each row in bytes of its own. -0.0 is a zero, and
    comes back as 0.0.
    """
    weight = weight.detach().cpu()
    kept = weight != 0
    counts = kept.sum(-1)
    packed = np.packbits(kept.numpy(), axis=-1, bitorder="little")
    return {
        "shape": torch.tensor(weight.shape), "compressed": bits(weight)[kept].view(weight.dtype),
        "bitmask": torch.from_numpy(packed), "row_offsets": counts.cumsum(0) - counts,
    }  # fmt: skip


def unpack(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight that `pack` made parts of; raises `InputError`, naming it, where they contradict each other."""
    shape, mask, values = parts["shape"].flatten(), parts["bitmask"], parts["compressed"].flatten()
    if shape.dtype != torch.int64 or not 1 <= len(shape) <= 8 or bool((shape < 0).any()):
        raise InputError(f"the shape of '{name}' is no shape: {shape[:8].tolist()}")
    *rows, width = shape.tolist()
    # The bitmask is as large as its part of the file, so a shape that fits it is no empty claim.
    if mask.dtype != torch.uint8 or mask.shape != (*rows, -(-width // 8)):
        raise InputError(
            f"'{name}' says its shape is {[*rows, width]}, but its bitmask is {list(mask.shape)} of {mask.dtype}"
        )
    kept = torch.from_numpy(np.unpackbits(mask.numpy(), axis=-1, bitorder="little")).view(torch.bool)
    counts = kept.sum(-1)
    if bool(kept[..., width:].any()):
        raise InputError(f"the bitmask of '{name}' goes on after the last weight of a row of {width}")
    if int(counts.sum()) != values.numel():
        raise InputError(f"the bitmask of '{name}' keeps {int(counts.sum())} weights, the file has {values.numel()}")
    offsets = parts.get("row_offsets")
    if offsets is not None and not torch.equal(offsets, counts.cumsum(0) - counts):
        raise InputError(f"the row offsets of '{name}' are not those of its bitmask")
    words = torch.zeros([*rows, width], dtype=bits(values).dtype)
    words[kept[..., :width]] = bits(values)
    return words.view(values.dtype)


def _shaped(matrix: Tensor, shape: object, name: str) -> Tensor:
    try:
        return torch.reshape(matrix, shape)  # type: ignore[arg-type]  # from a file: whatever it is, it has to fit
    except (RuntimeError, TypeError, OverflowError) as error:
        raise InputError(f"'{name}' of {list(matrix.shape)} cannot have the shape {shape!r:.80}") from error


def _refuse_clashes(packed: State, tensors: Mapping[str, Tensor], named: Mapping[str, str]) -> None:
    both = {f"{stem}.{part}" for stem in named for part in PARTS} & tensors.keys()
    if both:
        raise InputError(f"'{sorted(both)[0]}' is a tensor of the model and a part of a packed weight: export dense")
