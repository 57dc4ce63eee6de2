"""Checkpoints: read without running any code from them, or refused in a sentence."""

import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.errors import InputError
from sparsity.masks import Masks

PICKLES = 5  # that torch's format before zip files begins with


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU, loaded with `weights_only=True`.

    Raises `InputError` where the file is missing, is truncated or corrupt, or holds objects other than tensors and
    primitives.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at '{path}'")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower() and not _ends_early(path):
            raise InputError(
                f"'{path}' holds pickled objects, which could run code when loaded: save tensors and primitives only"
            ) from error
        raise InputError(_damaged(path)) from error
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        raise InputError(_damaged(path)) from error
    if not isinstance(contents, dict):
        raise InputError(f"'{path}' is no checkpoint: it holds a {type(contents).__name__}, not a dictionary")
    return contents


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint's `state_dict` into the model; raises `InputError` where it belongs to another model.

    One of a network under `torch.nn.utils.prune` is loaded with the weights that it computes with.
    """
    state = read(path).get("state_dict")
    if not isinstance(state, dict):
        raise InputError(f"'{path}' has no 'state_dict': give a checkpoint that a Lightning trainer saved")
    state, _ = without_masks(state)
    own = model.state_dict()
    wrong = own.keys() ^ state.keys()
    wrong |= {name for name in own.keys() & state.keys() if _shape(own[name]) != _shape(state[name])}
    if wrong:
        raise InputError(
            f"'{path}' is for another model: {len(wrong)} of its tensors are missing, unknown or of another shape, "
            f"for example '{sorted(wrong)[0]}'"
        )
    model.load_state_dict(state)


def without_masks(state: Mapping[str, Any]) -> tuple[dict[str, Any], Masks]:
    """The plain state dict of a network under `torch.nn.utils.prune`, and its masks; the same state where it has none.

    Of each pair `weight_orig`, `weight_mask` the weight is made, exactly zero where it is pruned. Raises `InputError`
    for a mask that has another shape, or other values than 0 and 1.
    """
    found, masks = dict(state), {}
    for name in [each for each in state if each.endswith("_mask") and f"{each.removesuffix('_mask')}_orig" in state]:
        weight = name.removesuffix("_mask")
        mask, original = found.pop(name), found.pop(f"{weight}_orig")
        if _shape(mask) is None or _shape(mask) != _shape(original) or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"'{name}' is no mask of '{weight}_orig': give zeros and ones of its shape")
        masks[weight] = mask != 0
        found[weight] = original.masked_fill(~masks[weight], 0)
    return found, masks


def _shape(value: object) -> object:
    return getattr(value, "shape", None)  # a module's extra state may be anything


def _ends_early(path: str | Path) -> bool:
    """Whether a file of torch's format before zip files ends within a pickle: perhaps within the name of a class."""
    if zipfile.is_zipfile(path):
        return False
    with open(path, "rb") as file:
        for _ in range(PICKLES):
            if not file.peek(1):
                return False
            try:
                all(pickletools.genops(file))  # reads what the pickle would do, and does none of it
            except Exception:  # damaged bytes can make it raise anything
                return True
    return False


def _damaged(path: str | Path) -> str:
    return f"the checkpoint '{path}' is truncated or corrupt: take an earlier one or save it again"
