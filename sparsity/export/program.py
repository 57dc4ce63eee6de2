"""Programs: a model's forward pass without its Python code, by `torch.export` or as ONNX; zeros are stored as such."""

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sparsity.errors import InputError
from sparsity.files import written

Inputs = tuple[Any, ...]


def traced(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The program of the model's evaluation on such inputs; their first axis is a batch of any size where it can be.

    Raises `InputError` where torch cannot trace the model.
    """
    axes = tuple({0: Dim.AUTO} if isinstance(each, Tensor) and each.ndim else None for each in inputs)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own parts about each other
            return torch.export.export(model, inputs, dynamic_shapes=axes)
    except Exception as error:  # a user's forward may do anything
        raise InputError(f"torch.export cannot trace {type(model).__name__}: {str(error).strip()[:500]}") from error
    finally:
        model.train(was_training)


def save_torch(model: nn.Module, path: Path, inputs: Inputs) -> None:
    """Writes a .pt2 file, for `torch.export.load`."""
    program = traced(model, inputs)
    with written(path) as partial:
        renamed = partial.with_name(f"{partial.name}.pt2")  # torch warns of other endings
        try:
            torch.export.save(program, renamed)
            os.replace(renamed, partial)
        finally:
            renamed.unlink(missing_ok=True)


def save_onnx(model: nn.Module, path: Path, inputs: Inputs) -> None:
    """Writes an .onnx file, and beside it one of the weights where they are more than such a file can hold (2 GB)."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX export needs {' and '.join(missing)}: pip install 'lightning-sparsity[export]'")
    program = traced(model, inputs)
    with written(path) as partial, TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.onnx.export(program, dynamo=True, verbose=False)
        assert whole is not None
        whole.save(Path(folder) / path.name)
        # The model last, under its own name: the weights that it refers to are there before it.
        for file in Path(folder).iterdir():
            os.replace(file, partial if file.name == path.name else path.with_name(file.name))
