"""Advice: which layers are faster by their kept weights, measured on this machine, at this batch."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsity.convert import Form, SparseLinear, forms_of, kept_linear, linear_layers, mask_of, to_sparse
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
    """What each linear layer takes, dense and in every form of its kept weights, at the shapes that it meets.

    `layers`: for each, by name, its shape, its density, the rows of its inputs; `forms`, for "dense" and each class of
    `sparsity.convert` that can hold what it keeps, milliseconds and how many times as fast as dense they are, `forward`
    and in a `step`, forward and backward; the `best` form for each of the two, "dense" where none is worth it; the
    verdict: "sparse", "sparse to serve", "sparse to train" or "stay dense"; and the density from which on
    `SparseLinear` pays there for random masks (None where none tried did). `model`: the whole of it with the best form
    of each layer for the forward pass, and with those for the step, which goes back from the sum of its outputs. Where
    nothing is trained `step` is None.

    Kept is what the masks keep, or what is not zero. Times are medians of calls in turn, `seconds` for each.
    """
    model = copy.deepcopy(model)  # its statistics and gradients are not to be touched
    seen = _shapes(model, inputs)
    known: dict[Any, float | None] = {}
    rows = []
    chosen: dict[str, dict[str, Form]] = {"forward": {}, "step": {}}
    for name, (layer, x) in seen.items():
        mask = mask_of(name, layer, masks)
        key = (layer.weight.shape, x.shape)
        if key not in known:
            known[key] = break_even(layer, x, seconds)
        made = {form.__name__: form for form in forms_of(layer.weight, mask)}
        found = _beside(layer, {each: kept_linear(layer, mask, form) for each, form in made.items()}, x, seconds)
        best = {what: _best(found, what) for what in chosen}
        for what, form in best.items():
            if form in made:
                chosen[what][name] = made[form]
        rows.append({
            "layer": name, "shape": list(layer.weight.shape), "density": float(mask.float().mean()),
            "rows": x.numel() // max(1, x.shape[-1]), "forms": found, "best": best, "verdict": _verdict(best),
            "pays_from": known[key],
        })  # fmt: skip
    served, trained = (to_sparse(model, masks, forms=forms) for forms in chosen.values())
    return {
        "device": str(next(model.parameters()).device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "layers": rows, "model": _whole(model, served, trained, inputs, seconds), "others": _others(model, seen),
    }  # fmt: skip


def _best(forms: Row, what: str) -> str | None:
    """The form that is worth it for the forward pass, or a step; None where there is no step."""
    if forms["dense"][what] is None:
        return None
    found = max(forms, key=lambda name: float(forms[name][what]))
    return found if forms[found][what] >= MARGIN else "dense"


def _verdict(best: dict[str, str | None]) -> str:
    serves, trains = best["forward"] != "dense", best["step"] != "dense"
    if best["step"] is None or serves == trains:
        return "sparse" if serves else "stay dense"
    return "sparse to serve" if serves else "sparse to train"


def break_even(layer: nn.Linear, x: Tensor, seconds: float = 0.2) -> float | None:
    """The density at which random masks begin to pay in training, between those tried; None where none did."""
    last: tuple[float, float] | None = None
    for density in DENSITIES:
        mask = torch.rand_like(layer.weight, dtype=torch.float32) < density
        found = _beside(layer, {"sparse": kept_linear(layer, mask, SparseLinear)}, x, seconds)["sparse"]
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
    from rich.markup import escape
    from rich.table import Table

    table = Table("layer", "form", "forward, ms", "step, ms", "verdict", show_lines=True)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:4]:
        column.no_wrap = True
    for row in advice["layers"]:
        pays = "" if row["pays_from"] is None else f"\npays from {row['pays_from']:.3f}"
        about = f"{row['shape'][0]} x {row['shape'][1]}\n{row['rows']} rows\ndensity {row['density']:.3f}{pays}"
        cells = ["\n".join(_cell(row, form, what) for form in row["forms"]) for what in ("forward", "step")]
        table.add_row(f"{escape(row['layer'])}\n{about}", "\n".join(row["forms"]), *cells, row["verdict"])
    whole = advice["model"]
    step = "" if whole["step"] is None else f", forward and backward {whole['step']:.2f}x"
    lines = [
        f"the whole model in the best forms: forward {whole['forward']:.2f}x{step} as fast as dense",
        f"on {advice['device']}, {advice['threads']} threads, torch {advice['torch']}",
        "pays from: the density at which random masks begin to, as SparseLinear",
    ]
    if any("ShrunkLinear" in row["forms"] for row in advice["layers"]):
        lines.append("ShrunkLinear copies its inputs and outputs: in a chain of layers, sparsity.shrink saves that")
    if advice["others"]:
        lines.append(f"dense in any case: {', '.join(advice['others'])}")
    return Group(table, *map(escape, lines))


def _cell(row: Row, form: str, what: str) -> str:
    """A form's milliseconds and ratio; in bold where it is the best."""
    found = row["forms"][form]
    if found[what] is None:
        return "-"
    text = f"{found['ms'][what]:.3f}" + ("" if form == "dense" else f" {found[what]:5.2f}x")
    return f"[bold]{text}[/bold]" if form == row["best"][what] else text


def figure(advice: Row) -> "Figure":
    """How many times as fast as dense each layer is in each form. Needs matplotlib (the `viz` extra)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = advice["layers"]
    names = list(dict.fromkeys(name for row in rows for name in row["forms"] if name != "dense"))
    colours = dict(zip(names, ("#4477aa", "#cc6677", "#ddaa33", "#228833", "#aa3377"), strict=False))
    bars = [
        (layer, row["forms"][name], name) for layer, row in enumerate(rows) for name in names if name in row["forms"]
    ]
    places = [at + layer for at, (layer, *_) in enumerate(bars)]  # one is free between layers
    picture = Figure(figsize=(9, 1.6 + 0.24 * (len(bars) + len(rows))), layout="constrained")
    panels = [what for what in ("forward", "step") if any(row["forms"]["dense"][what] is not None for row in rows)]
    for axes, what in zip(picture.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        lengths = [form[what] or 0 for _, form, _ in bars]
        drawn = axes.barh(places, lengths, 0.85, color=[colours[name] for *_, name in bars])
        axes.bar_label(drawn, [f"{each:.2f}" if each else "" for each in lengths], padding=3, fontsize=8)
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.set(title=what, xlabel="times as fast as dense", xlim=(0, 1.18 * max(1, *lengths)))
        axes.spines[["top", "right"]].set_visible(False)
    centres = [
        statistics.mean(place for place, (layer, *_) in zip(places, bars, strict=True) if layer == mine)
        for mine in range(len(rows))
    ]
    axes = picture.axes[0]
    axes.set_yticks(centres, [f"{row['layer']}\ndensity {row['density']:.2f}" for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    return picture


def _beside(dense: nn.Linear, others: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, Row]:
    """Milliseconds of the dense layer and others, and how many times as fast as it they are."""
    layers = {"dense": dense, **others}
    forward = medians({name: _forward(layer, x) for name, layer in layers.items()}, x.device, seconds)
    if not x.requires_grad and not dense.weight.requires_grad:
        return {
            name: {"ms": {"forward": ms, "step": None}, "forward": forward["dense"] / ms, "step": None}
            for name, ms in forward.items()
        }
    step = medians({name: _step(layer, x) for name, layer in layers.items()}, x.device, seconds)
    return {
        name: {
            "ms": {"forward": forward[name], "step": step[name]}, "forward": forward["dense"] / forward[name],
            "step": step["dense"] / step[name],
        }
        for name in layers
    }  # fmt: skip


def _whole(dense: nn.Module, served: nn.Module, trained: nn.Module, inputs: Sequence[Any], seconds: float) -> Row:
    device = next(dense.parameters()).device
    ms: dict[str, Any] = {
        "forward": medians({"dense": _all(dense, inputs), "sparse": _all(served, inputs)}, device, 5 * seconds),
        "step": None,
    }
    if any(each.requires_grad for each in _tensors(dense(*inputs))):
        calls = {"dense": _all_back(dense, inputs), "sparse": _all_back(trained, inputs)}
        ms["step"] = medians(calls, device, 5 * seconds)
    return {"ms": ms} | {what: each and each["dense"] / each["sparse"] for what, each in ms.items()}


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
