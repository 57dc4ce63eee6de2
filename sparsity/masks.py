"""Masks: plain dictionaries of bool tensors, True where a weight is kept, keyed by parameter name.

In memory a mask is one bool per weight. On disk and in checkpoints it is one bit per weight.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsity import shards
from sparsity.errors import InputError

Masks = dict[str, Tensor]
FORMAT = "sparsity-masks-1"


def full(weights: Mapping[str, Tensor]) -> Masks:
    """Masks that keep everything: bool tensors of the weights' shapes and devices, all True."""
    return {n: torch.ones(w.shape, dtype=torch.bool, device=w.device) for n, w in weights.items()}


def from_zeros(weights: Mapping[str, Tensor]) -> Masks:
    """Masks that keep what is not exactly zero, which is how a pruned checkpoint stores its own masks.

    A kept weight that happens to be exactly zero is taken for a pruned one.
    """
    return {name: shards.whole(weight.detach()) != 0 for name, weight in weights.items()}


def counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights each mask keeps."""
    return {name: int(mask.count_nonzero()) for name, mask in masks.items()}


def density(masks: Mapping[str, Tensor]) -> float:
    """Kept weights over all weights of all masks, in [0, 1]; 1 where there are none."""
    total = sum(mask.numel() for mask in masks.values())
    return sum(counts(masks).values()) / total if total else 1.0


def fingerprint(masks: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and bits: equal exactly where the masks are equal, on any device and rank."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name}{tuple(masks[name].shape)}".encode())
        digest.update(pack(masks[name]).numpy().tobytes())
    return digest.hexdigest()


def pack(mask: Tensor) -> Tensor:
    """The mask as bits: uint8 of ceil(numel / 8) elements on the CPU, row-major, first weight in the high bit."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy()))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask of `shape` that `pack` turned into `bits`; raises `InputError` if their sizes disagree."""
    size = int(np.prod(shape, dtype=np.int64))
    if bits.numel() != (size + 7) // 8:
        raise InputError(f"a mask of shape {shape} takes {(size + 7) // 8} bytes, got {bits.numel()}")
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=size).astype(bool)).view(shape)


def to_state(masks: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Masks for a checkpoint: tensors and primitives only, so that `weights_only=True` loads them."""
    return {name: {"bits": pack(mask), "shape": list(mask.shape)} for name, mask in masks.items()}


def from_state(state: Mapping[str, Mapping[str, Any]]) -> Masks:
    """The masks that `to_state` stored, on the CPU."""
    return {name: unpack(entry["bits"], tuple(entry["shape"])) for name, entry in state.items()}


def save(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes the masks to a safetensors file: one uint8 tensor of bits per mask, the shapes in the metadata."""
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    bits = {name: pack(mask) for name, mask in masks.items()}
    save_file(bits, path, metadata={"format": FORMAT, "shapes": shapes})


def load(path: str | Path) -> Masks:
    """The masks in a file written by `save`, on the CPU.

    Raises `InputError` where the file is missing, is damaged, or holds something other than masks.
    """
    if not Path(path).is_file():
        raise InputError(f"no mask file at '{path}': give the path of a file written by sparsity.masks.save")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise InputError(f"'{path}' holds no masks: its format is {about.get('format')!r}, not '{FORMAT}'")
            shapes = json.loads(about["shapes"])
            return {name: unpack(file.get_tensor(name), tuple(shape)) for name, shape in shapes.items()}
    except InputError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"'{path}' is damaged or not a safetensors file ({error}): restore it or save it again"
        ) from error


def check(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raises `InputError` unless the masks are for just these weights, by name and by shape."""
    missing, unknown = sorted(weights.keys() - masks.keys()), sorted(masks.keys() - weights.keys())
    if missing or unknown:
        raise InputError(
            f"{source} is for another model or other targets: "
            f"it lacks {_some(missing)} and has {_some(unknown)}, which is no target here"
        )
    for name, weight in weights.items():
        if masks[name].shape != weight.shape:
            raise InputError(
                f"{source} is for another model: its '{name}' has shape {tuple(masks[name].shape)}, "
                f"the model's has {tuple(weight.shape)}"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3]) or "nothing"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
