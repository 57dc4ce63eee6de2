"""Checkpoints: read without running any code from them, or refused in a sentence."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.errors import InputError


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
        if "unsupported global" in str(error).lower():
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
    """Loads a checkpoint's `state_dict` into the model; raises `InputError` where it belongs to another model."""
    state = read(path).get("state_dict")
    if not isinstance(state, dict):
        raise InputError(f"'{path}' has no 'state_dict': give a checkpoint that a Lightning trainer saved")
    own = model.state_dict()
    wrong = own.keys() ^ state.keys()
    wrong |= {name for name in own.keys() & state.keys() if _shape(own[name]) != _shape(state[name])}
    if wrong:
        raise InputError(
            f"'{path}' is for another model: {len(wrong)} of its tensors are missing, unknown or of another shape, "
            f"for example '{sorted(wrong)[0]}'"
        )
    model.load_state_dict(state)


def _shape(value: object) -> object:
    return getattr(value, "shape", None)  # a module's extra state may be anything


def _damaged(path: str | Path) -> str:
    return f"the checkpoint '{path}' is truncated or corrupt: take an earlier one or save it again"
