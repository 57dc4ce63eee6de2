"""Export: a sparse model as a file that others read, and back, exactly.

| format | what is written | read by |
|---|---|---|
| dense | all weights, zeros among them, as safetensors | safetensors, transformers, `load` |
| compressed | a bit for each weight and those that are not zero | compressed-tensors up to 0.14, `load` |
| nm | of each M weights the N kept, and their places | `load` |
| shrunk | a physically smaller dense model and its shapes | `load` |
| torch | the program of `torch.export` (.pt2) | torch |
| onnx | an ONNX program | any ONNX runtime |

The first four are storage: `load` gives back every weight bit for bit (-0.0, where packed, as 0.0), and takes no file
on trust.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from sparsity.errors import InputError
from sparsity.targets import clean, is_transposed

from . import bitmask, nm, program, shrunk
from .program import Inputs
from .tensors import About, State, distinct, opened, size, state, write

__all__ = ["ENDINGS", "load", "read", "save", "summary"]

ENDINGS = {
    "dense": ".safetensors", "compressed": ".safetensors", "nm": ".safetensors", "shrunk": ".safetensors",
    "torch": ".pt2", "onnx": ".onnx",
}  # fmt: skip


def save(
    model: nn.Module, path: str | Path, format: str = "compressed", pattern: str = "2:4", inputs: Inputs | None = None
) -> dict[str, Any]:
    """Writes the model in one of the formats, in one piece or not at all; returns what it is in bytes.

    Tied weights are written once. `pattern` is that of "nm", `inputs` are those of the forward pass, for
    the programs, and for "shrunk" where the model is no plain chain.
    The result has the bytes of the distinct weights (`dense`) and of the file (`written`). Raises `InputError` where
    the model cannot be written so.
    """
    path = Path(path)
    if format not in ENDINGS:
        raise InputError(f"no format is called {format!r}: take one of {', '.join(ENDINGS)}")
    if format in ("torch", "onnx"):
        if inputs is None:
            raise InputError(f'the format "{format}" is traced: give inputs of the forward pass')
        dense = size(distinct({n: v for n, v in model.state_dict().items() if isinstance(v, Tensor)})[0])
        (program.save_torch if format == "torch" else program.save_onnx)(model, path, inputs)
    else:
        tensors, ties = distinct(state(model))
        dense = size(tensors)
        about: About = {"format": format, "ties": ties}
        more: dict[str, str] = {}
        if format == "compressed":
            tensors, parts, more = bitmask.encode(tensors)
        elif format == "nm":
            tensors, parts = nm.encode(tensors, pattern, _turned(model))
        else:
            small, parts = shrunk.encode(model, inputs) if format == "shrunk" else (tensors, {})
            tensors, about["ties"] = distinct(small) if format == "shrunk" else (small, ties)
        write(path, tensors, about | parts, more)
    files = [each for each in (path, path.with_name(f"{path.name}.data")) if each.is_file()]
    length = sum(each.stat().st_size for each in files)
    return {"format": format, "file": str(path), "bytes": {"dense": dense, "written": length}}


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """The model with the weights of a file of `save`'s, or a smaller copy of it where the file is of a shrunk one.

    Plain safetensors files, and files and folders of compressed-tensors' bitmask formats, are loaded, too. Names,
    shapes and types have to be those of the model, but for names that the model ties to others. Raises `InputError` and
    leaves the model as it is where they are not, or where the file is truncated, damaged or contradicts itself.
    """
    tensors, about = opened(Path(path))
    if about.get("format") == "shrunk":
        model = shrunk.like(model, tensors, about)
    own = state(model)
    found = _with_ties(_decoded(tensors, about), own)
    _check(found, own, str(path))
    model.load_state_dict({name: found[clean(name)] for name in model.state_dict()})
    return model


def read(path: str | Path) -> State:
    """The plain state dict in a file that `load` would load; that of the smaller model where it is of a shrunk one."""
    tensors, about = opened(Path(path))
    return _decoded(tensors, about)


def summary(result: Mapping[str, Any]) -> Table:
    """What `save` wrote, in bytes, for the terminal."""
    dense, written = result["bytes"]["dense"], result["bytes"]["written"]
    view = Table(title=f"exported: {result['format']}")
    for name in ("", "bytes", "of dense"):
        view.add_column(name, justify="right" if name else "left")
    view.add_row("dense weights", f"{dense:,}", "1.000")
    view.add_row("file", f"{written:,}", f"{written / max(1, dense):.3f}")
    return view


def _decoded(tensors: State, about: About) -> State:
    format, ties = about.get("format"), about.get("ties", {})
    if format not in (None, *ENDINGS) or not isinstance(ties, dict):
        raise InputError(f"a file of the format {format!r:.40} is not known here: export again")
    found = nm.decode(tensors, about) if format == "nm" else dict(tensors)
    if format in ("compressed", None) and any(bitmask.is_packed(name, tensors) for name in tensors):
        found = bitmask.decode(tensors, about)
    for name, first in ties.items():
        if not isinstance(first, str) or first not in found or name in found:
            raise InputError(f"'{name}' is tied to {first!r:.80}, which is not there: export again")
        found[name] = found[first]
    return found


def _with_ties(found: State, own: State) -> State:
    """What was found, and for names that are missing and tied in the model what is there under another of theirs."""
    _, ties = distinct(own)
    groups: dict[str, list[str]] = {}
    for name in own:
        groups.setdefault(ties.get(name, name), []).append(name)
    values = {first: next((found[name] for name in group if name in found), None) for first, group in groups.items()}
    more = {name: values[ties.get(name, name)] for name in own.keys() - found.keys()}
    return found | {name: value for name, value in more.items() if value is not None}


def _check(found: State, own: State, path: str) -> None:
    """Raises `InputError` unless the tensors are the model's by name, shape and type, and equal where it ties them."""
    missing, unknown = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing or unknown:
        raise InputError(
            f"'{path}' is of another model: it lacks {len(missing)} of its tensors ({', '.join(missing[:3]) or 'none'})"
            f" and has {len(unknown)} that it does not know ({', '.join(unknown[:3]) or 'none'})"
        )
    for name, value in own.items():
        if found[name].shape != value.shape or found[name].dtype != value.dtype:
            raise InputError(
                f"'{path}' is of another model: its '{name}' is {list(found[name].shape)} of {found[name].dtype}, the "
                f"model's is {list(value.shape)} of {value.dtype}"
            )
    for name, first in distinct(own)[1].items():
        if found[name] is not found[first] and not found[name].equal(found[first]):
            raise InputError(f"the model ties '{name}' to '{first}', which differ in '{path}': untie them first")


def _turned(model: nn.Module) -> frozenset[str]:
    """The weights whose first axis is the input's."""
    modules = {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}
    return frozenset(
        f"{name}.{leaf}" if name else leaf
        for name, module in modules.items()
        for leaf, _ in module.named_parameters(recurse=False)
        if is_transposed(module)
    )
