"""Tensors of safetensors files: read without running anything, written in one piece or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsity import shards
from sparsity.errors import InputError
from sparsity.files import written
from sparsity.targets import clean

State = dict[str, Tensor]
About = dict[str, Any]
KEY, VERSION = "sparsity", 1
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state(model: nn.Module) -> State:
    """The model's state by the names it has before compiling; raises `InputError` where a file cannot hold it."""
    found = {clean(name): value for name, value in model.state_dict().items()}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise InputError(f"'{name}' is a {type(value).__name__}: only tensors are exported")
        if value.is_meta or value.layout != torch.strided or shards.is_spread(value):
            raise InputError(f"'{name}' is no plain tensor: give all weights their values, whole and dense, first")
    return found


def distinct(tensors: Mapping[str, Tensor]) -> tuple[State, dict[str, str]]:
    """Each tensor once, under the first of its names, and for every other name that first one."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, value in tensors.items():
        # Empty tensors have no address.
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if first.setdefault(place, name) != name:
            ties[name] = first[place]
    return {name: tensors[name] for name in first.values()}, ties


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers as wide as its elements, by which all types can be indexed."""
    if tensor.element_size() not in WORDS:
        raise InputError(f"elements of 1, 2, 4 or 8 bytes can be packed, got {tensor.dtype}")
    return tensor.contiguous().view(WORDS[tensor.element_size()])


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all of them."""
    return sum(value.nbytes for value in tensors.values())


def write(path: Path, tensors: Mapping[str, Tensor], about: About, more: Mapping[str, str] | None = None) -> None:
    """A safetensors file, with what it is about in its metadata, and `more` entries there."""
    whole = {name: _alone(value.detach().cpu()) for name, value in tensors.items()}
    # transformers asks for the format "pt".
    metadata = {"format": "pt", KEY: json.dumps({"version": VERSION, **about}), **(more or {})}
    with written(path) as partial:
        save_file(whole, partial, metadata=metadata)


def opened(path: Path) -> tuple[State, About]:
    """The tensors of a safetensors file, or of all of a folder's, and what it says it is about: empty if nothing.

    Tensors are mapped, not read: nothing here takes memory by what the file says. Raises `InputError` for a file that
    is missing, truncated or of another kind.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"no exported file at '{path}': give a .safetensors file, or a folder of them")
    tensors: State = {}
    about: About = {}
    for file in files:
        found, said = _opened(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise InputError(f"'{path}' has two of '{twice[0]}', in different files: leave one file out")
        tensors |= found
        about |= said
    return tensors, about


def _opened(path: Path) -> tuple[State, About]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata.get(KEY, "{}"))
            if not isinstance(about, dict) or about.get("version", VERSION) != VERSION:
                raise InputError(
                    f"'{path}' was written by another version of this format than {VERSION}: {about!r:.60}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118  # it is no mapping
    except InputError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        if _start(path) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise InputError(
                f"'{path}' is a zip file or a pickle, such as torch.save and torch.export write: only safetensors "
                "files are loaded here"
            ) from error
        raise InputError(f"'{path}' is truncated, damaged or no safetensors file ({error}): export it again") from error


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(2)
    except OSError:
        return b""


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory that holds nothing else."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
