"""Advice: which layers are faster by their kept weights, measured on this machine, at this batch."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsity.convert import KeptLinear, SparseLinear, kept_linear, linear_layers, mask_of, to_sparse
from sparsity.errors import InputError
from sparsity.masks import Masks

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
MARGIN = 1.05  # how much faster sparse has to be: less is the machine's noise
if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

Row = dict[str, Any]
Call = Callable[[], object]


def advise(model: nn.Module, inputs: Sequence[Any], masks: Masks | None = None, seconds: float = 0.2) -> Row:
    """What each linear layer takes, dense and by its kept weights, at the shapes that it meets; and the whole model.

    `layers`: for each, by name, the form of its kept weights, its shape, its density, the rows of its inputs,
    milliseconds of the forward pass and of forward and backward, the density from which on random masks of single
    weights pay there (None where none tried did), and the verdict: "sparse" or "stay dense". `model`: the same for the
    whole model, with the layers that are worth it exchanged: its forward pass, and `step`, forward and backward from
    the sum of its outputs. Where nothing is trained `step` is None.

    Kept is what the masks keep, or what is not zero. Times are medians of calls in turn, `seconds` for each.
    """
    model = copy.deepcopy(model)  # its statistics and gradients are not to be touched
    seen = _shapes(model, inputs)
    known: dict[Any, float | None] = {}
    rows = []
    for name, (layer, x) in seen.items():
        mask = mask_of(name, layer, masks)
        density = float(mask.float().mean())
        key = (layer.weight.shape, x.shape)
        if key not in known:
            known[key] = break_even(layer, x, seconds)
        kept = kept_linear(layer, mask)
        found = _beside(layer, kept, x, seconds)
        rows.append({
            "layer": name, "form": type(kept).__name__, "shape": list(layer.weight.shape), "density": density,
            "rows": x.numel() // max(1, x.shape[-1]), **found, "pays_from": known[key],
            "verdict": "sparse" if min(found["forward"], found["step"] or MARGIN) >= MARGIN else "stay dense",
        })  # fmt: skip
    worth = [row["layer"] for row in rows if row["verdict"] == "sparse"]
    whole = _whole(model, to_sparse(model, masks, only=worth), inputs, seconds)
    return {
        "device": str(next(model.parameters()).device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "layers": rows, "model": whole, "others": _others(model, seen),
    }  # fmt: skip


def break_even(layer: nn.Linear, x: Tensor, seconds: float = 0.2) -> float | None:
    """The density at which random masks begin to pay in training, between those tried; None where none did."""
    last: tuple[float, float] | None = None
    for density in DENSITIES:
        mask = torch.rand_like(layer.weight, dtype=torch.float32) < density
        found = _beside(layer, SparseLinear(layer.weight, layer.bias, mask), x, seconds)
        ratio = found["step"] or found["forward"]
        if ratio >= 1:
            if last is None:
                return density
            share = (1 - last[1]) / (ratio - last[1])
            return float(last[0] * (density / last[0]) ** share)
        last = density, ratio
    return None


def summary(advice: Row) -> "Group":
    """A table of the layers, and what it comes to, for a terminal."""
    from rich.console import Group
    from rich.table import Table

    table = Table("layer", "weight, inputs", "density", "dense, ms", "forward", "step", "pays from", "verdict")
    table.columns[0].overflow, table.columns[-1].no_wrap = "fold", True
    for row in advice["layers"]:
        pays = "-" if row["pays_from"] is None else f"{row['pays_from']:.3f}"
        table.add_row(
            row["layer"], f"{row['shape'][0]} x {row['shape'][1]}, {row['rows']}", f"{row['density']:.3f}",
            f"{row['ms'].get('dense_step', row['ms']['dense']):.2f}", f"{row['forward']:.2f}x",
            "-" if row["step"] is None else f"{row['step']:.2f}x", pays, row["verdict"],
        )  # fmt: skip
    whole = advice["model"]
    step = "" if whole["step"] is None else f", forward and backward {whole['step']:.2f}x"
    worth = sum(row["verdict"] == "sparse" for row in advice["layers"])
    lines = [
        f"the whole model with {worth} sparse layers: forward {whole['forward']:.2f}x{step} as fast as dense",
        f"on {advice['device']}, {advice['threads']} threads, torch {advice['torch']}",
    ]
    if advice["others"]:
        lines.append(f"dense in any case: {', '.join(advice['others'])}")
    return Group(table, *lines)


def figure(advice: Row) -> "Figure":
    """How much faster each layer is by its kept weights, beside 1 for dense. Needs matplotlib (the `viz` extra)."""
    from matplotlib.figure import Figure

    rows = advice["layers"]
    picture = Figure(figsize=(8, 1.5 + 0.45 * len(rows)), layout="constrained")
    axes = picture.add_subplot()
    places = range(len(rows))
    for offset, what, colour in ((-0.2, "forward", "#4477aa"), (0.2, "step", "#cc6677")):
        lengths = [row[what] or 0 for row in rows]
        bars = axes.barh([p + offset for p in places], lengths, 0.38, color=colour, label=what)
        axes.bar_label(bars, [f"{each:.2f}" if each else "" for each in lengths], padding=3, fontsize=8)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(list(places), [f"{row['layer']} ({row['density']:.2f})" for row in rows])
    axes.set(
        xlabel="times as fast as dense", xlim=(0, 1.15 * max(max(row["forward"], row["step"] or 0, 1) for row in rows))
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return picture


def _beside(dense: nn.Linear, sparse: KeptLinear, x: Tensor, seconds: float) -> Row:
    calls = {"dense": _forward(dense, x), "sparse": _forward(sparse, x)}
    trains = x.requires_grad or dense.weight.requires_grad
    if trains:
        sparse.values.requires_grad_(dense.weight.requires_grad)
        calls |= {"dense_step": _step(dense, x), "sparse_step": _step(sparse, x)}
    ms = medians(calls, x.device, seconds)
    step = ms["dense_step"] / ms["sparse_step"] if trains else None
    return {"ms": ms, "forward": ms["dense"] / ms["sparse"], "step": step}


def _whole(dense: nn.Module, sparse: nn.Module, inputs: Sequence[Any], seconds: float) -> Row:
    device = next(dense.parameters()).device
    calls = {"dense": _all(dense, inputs), "sparse": _all(sparse, inputs)}
    ms = medians(calls, device, 5 * seconds)
    step = None
    if any(each.requires_grad for each in _tensors(dense(*inputs))):
        ms |= medians(
            {"dense_step": _all_back(dense, inputs), "sparse_step": _all_back(sparse, inputs)}, device, 5 * seconds
        )
        step = ms["dense_step"] / ms["sparse_step"]
    return {"ms": ms, "forward": ms["dense"] / ms["sparse"], "step": step}


def medians(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds of each call, all of them in turn, so that what disturbs one disturbs the others."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = None
    while end is None or time.perf_counter() < end or len(times[next(iter(times))]) < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if end is not None:  # the first time warms up
                times[name].append(time.perf_counter() - start)
        end = end or time.perf_counter() + seconds * len(calls)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def _forward(layer: nn.Module, x: Tensor) -> Call:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def _step(layer: nn.Module, x: Tensor) -> Call:
    x = x.detach().clone().requires_grad_(x.requires_grad)
    with torch.no_grad():
        slope = torch.ones_like(layer(x))

    def run() -> None:
        torch.autograd.backward(layer(x), slope)
        for each in (x, *layer.parameters()):
            if each.grad is not None:
                each.grad.zero_()  # gradients stay where they are: kinder to large dense ones

    return run


def _all(model: nn.Module, inputs: Sequence[Any]) -> Call:
    def run() -> None:
        with torch.no_grad():
            model(*inputs)

    return run


def _all_back(model: nn.Module, inputs: Sequence[Any]) -> Call:
    def run() -> None:
        torch.autograd.backward([each.sum() for each in _tensors(model(*inputs)) if each.requires_grad])
        for each in model.parameters():
            if each.grad is not None:
                each.grad.zero_()

    return run


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _shapes(model: nn.Module, inputs: Sequence[Any]) -> dict[str, tuple[nn.Linear, Tensor]]:
    """Each linear layer that the model calls, with the first input that it gets."""
    layers = linear_layers(model)
    names = {id(layer): name for name, layer in layers.items()}
    found: dict[str, tuple[nn.Linear, Tensor]] = {}

    def look(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        name, x = names[id(layer)], given[0] if given else named["input"]
        found.setdefault(name, (layers[name], x.detach().requires_grad_(x.requires_grad)))

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers.values()]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InputError(f"{type(model).__name__} calls no linear layer, the only kind that has a sparse form here")
    return found


def _others(model: nn.Module, seen: dict[str, Any]) -> list[str]:
    """Layers with matrices that have no sparse form."""
    return [
        name for name, layer in model.named_modules()
        if name not in seen and any(weight.ndim > 1 for weight in layer.parameters(recurse=False))
    ]  # fmt: skip
