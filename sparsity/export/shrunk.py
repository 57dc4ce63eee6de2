"""A smaller model: its weights, and the manifest by which a copy of the large one is made as small."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsity.errors import InputError
from sparsity.shrink import manifest, shrink, shrunk_like

from .program import Inputs
from .tensors import State, state


def encode(model: nn.Module, inputs: Inputs | None = None) -> tuple[State, dict[str, Any]]:
    """The state of the model that `shrink` makes, and its manifest. All but plain chains need inputs to be followed."""
    small = shrink(model, *(inputs or ()))
    return state(small), {"manifest": manifest(small)}


def like(model: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> nn.Module:
    """A copy of the large model as small as the manifest says, with any weights.

    Raises `InputError` for a manifest that is not that of the tensors, or does not come from this model.
    """
    found = about.get("manifest")
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise InputError("the file of a shrunk model has no manifest: export again")
    for name, value in tensors.items():
        module, _, key = name.rpartition(".")
        if found.get(module, {}).get(key) != list(value.shape):
            raise InputError(f"the manifest does not have '{name}' as it is in the file: export again")
    return shrunk_like(model, found)
