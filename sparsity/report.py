"""The report of a run: what is sparse, by how much, and what that is worth on paper."""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsity import shards
from sparsity.files import written
from sparsity.masks import counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]


def layers(
    masks: Mapping[str, Tensor], pattern: str, turned: Collection[str] = frozenset()
) -> dict[str, dict[str, Any]]:
    """Shape, density and pattern of every target by name, and how many of its outputs and inputs keep no weight.

    Those of `turned` have inputs on their first axis.
    """
    return {name: _layer(mask, pattern, name in turned) for name, mask in masks.items()}


def _layer(mask: Tensor, pattern: str, turned: bool) -> dict[str, Any]:
    face = mask.transpose(0, 1) if turned and mask.ndim > 1 else mask
    found = {
        "shape": list(mask.shape), "density": int(mask.count_nonzero()) / mask.numel(), "pattern": pattern,
        "dead_outputs": 0,
    }  # fmt: skip
    if mask.ndim > 1:
        found["dead_outputs"] = int((face.flatten(1).sum(1) == 0).count_nonzero())
        found["dead_inputs"] = int((face.transpose(0, 1).flatten(1).sum(1) == 0).count_nonzero())
    return found


def warnings(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of these layers should not miss: empty ones first, then those with dead paths."""
    empty = [name for name, row in rows.items() if row["density"] == 0]
    found = [f"no weight is left in {name}" for name in empty]
    for name, row in rows.items():
        if name not in empty and row["dead_outputs"]:
            found.append(f"{row['dead_outputs']} outputs of {name} have no weight left: they are constant")
        if name not in empty and row.get("dead_inputs"):
            found.append(f"{row['dead_inputs']} inputs of {name} have no weight left: what they say is lost")
    return found


def drift(target: float, achieved: float) -> list[str]:
    """A warning where the sparsity is off by more than a thousandth: the run ended early, or a budget was not met."""
    if abs(achieved - target) <= 1e-3:
        return []
    return [f"sparsity is {achieved:.4f}, and {target:.4f} was asked for"]


def sizes(model: nn.Module, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of the model's state dense, and stored with a bitmask and the kept values of each target."""
    return state_sizes(model.state_dict(), counts(masks), weights)


def state_sizes(state: Mapping[str, Any], kept: Mapping[str, int], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of a state dense, and with those of `weights` stored; tensors that share their memory count once."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    distinct = {(shards.local(value).data_ptr(), value.shape): value for value in tensors}
    dense = sum(value.numel() * value.element_size() for value in distinct.values())
    return {"dense": dense, "stored": dense - sum(nbytes(w) - stored(w, kept[name]) for name, w in weights.items())}


def nbytes(weight: Tensor) -> int:
    """Bytes of all its values."""
    return weight.numel() * weight.element_size()


def stored(weight: Tensor, kept: int) -> int:
    """Bytes of a bitmask and so many values, or of all values where these are fewer."""
    return min(nbytes(weight), kept * weight.element_size() + math.ceil(weight.numel() / 8))


def flops(model: nn.Module, inputs: tuple[Any, ...], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Theoretical FLOPs of one forward pass, dense, and with those of pruned weights left out.

    Two per multiply-add, counted by `torch.utils.flop_counter`; each module that owns targets is scaled by its density.
    """
    return total_flops(module_flops(model, inputs), masks)


@torch.no_grad()
def module_flops(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Theoretical FLOPs of one dense forward pass, of each module by its name, and of the whole model under "".

    They are those that `torch.utils.flop_counter` knows; on a CPU it leaves out the scores of fused attention.
    """
    was_training, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no module of a transformer encoder
    try:
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(was_training)
    found = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    root = f"{type(model).__name__}."
    return {name.removeprefix(root): count for name, count in found.items() if name.startswith(root)} | {
        "": found.get("Global", 0)
    }


def layer_flops(by_module: Mapping[str, int], masks: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """The FLOPs of each target, dense and of what is kept; those of a module are shared out by its targets' sizes."""
    called = {name: _called(_owner(name), by_module, {_owner(each) for each in masks}) for name in masks}
    totals = Counter[str]()
    for name, mask in masks.items():
        totals[called[name]] += mask.numel()
    found = {}
    for name, kept in counts(masks).items():
        each = by_module.get(called[name], 0) / max(1, totals[called[name]])
        found[name] = {"dense": each * masks[name].numel(), "sparse": each * kept}
    return found


def _called(owner: str, by_module: Mapping[str, int], owners: Collection[str]) -> str:
    """The module that computes with a target: attention takes the weight of its `out_proj`, which it never calls."""
    above = owner.rpartition(".")[0]
    return above if owner not in by_module and above in by_module and above in owners else owner


def total_flops(by_module: Mapping[str, int], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """The FLOPs of the whole model, dense, and with those of pruned weights left out."""
    skipped = sum(row["dense"] - row["sparse"] for row in layer_flops(by_module, masks).values())
    return {"dense": by_module[""], "sparse": round(by_module[""] - skipped)}


def finite(thing: Any) -> Any:
    """The same with None for numbers that JSON has no way to write."""
    if isinstance(thing, dict):
        return {name: finite(each) for name, each in thing.items()}
    if isinstance(thing, list):
        return [finite(each) for each in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing


def save(report: Report, path: Path) -> None:
    """Writes the report as JSON, in one piece or not at all."""
    with written(path) as partial:
        partial.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def summary(report: Report) -> Group:
    """The report for the terminal: the table of its layers, what it comes to in bytes and FLOPs, and warnings."""
    urgent = [f"[yellow]warning: {each}[/yellow]" for each in report["warnings"] if is_urgent(each)]
    others = len(report["warnings"]) - len(urgent)
    more = [f"{others} remarks on dead inputs and outputs are under `warnings` in the report"] if others else []
    return Group(_table(report), *_worth(report), *urgent, *more)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def is_urgent(warning: str) -> bool:
    """Whether a warning is of an empty layer or a sparsity that is not the one asked for, not of single neurons."""
    return warning.startswith(("no weight", "sparsity"))


def _table(report: Report) -> Table:
    rows = report["sparsity"]["layers"]
    total = sum(math.prod(row["shape"]) for row in rows.values())
    kept = sum(round(math.prod(row["shape"]) * row["density"]) for row in rows.values())
    achieved, target = report["sparsity"]["achieved"], report["sparsity"]["target"]
    view = Table(
        title=f"sparsity {achieved:.4f} of {total:,} target weights (asked for: {target:.4f})", show_footer=True
    )
    view.add_column("layer", "all targets", overflow="fold")  # cut off, names would be the same
    view.add_column("shape")
    view.add_column("weights", f"{total:,}", justify="right")
    view.add_column("kept", f"{kept:,}", justify="right")
    view.add_column("density", f"{1 - achieved:.4f}", justify="right")
    view.add_column("")
    for name, row in rows.items():
        size, density = math.prod(row["shape"]), row["density"]
        bar = "█" * round(20 * density) or "▏"
        shape = " x ".join(map(str, row["shape"]))
        view.add_row(name, shape, f"{size:,}", f"{round(size * density):,}", f"{density:.4f}", bar)
    return view


def figure(report: Report) -> "Figure":
    """The density of every layer as bars, with the overall one as a line. Needs matplotlib (the `viz` extra)."""
    from matplotlib.figure import Figure

    rows = report["sparsity"]["layers"]
    overall = 1 - report["sparsity"]["achieved"]
    picture = Figure(figsize=(8, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = picture.add_subplot()
    bars = axes.barh(list(rows), [row["density"] for row in rows.values()], color="#4477aa")
    numbers = [f"{row['density']:.3f}" for row in rows.values()]
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.axvline(overall, color="#cc6677", linestyle="--", label=f"all targets: {overall:.3f}", zorder=0)
    axes.bar_label(bars, numbers, padding=4, fontsize=8, bbox=white)
    axes.set(xlim=(0, 1.1), xlabel="density (kept / all weights)")
    axes.set_title("Density of each layer", loc="left")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    return picture


def _worth(report: Report) -> list[str]:
    stored = report["bytes"]
    lines = [f"bytes: {stored['dense']:,} dense, {stored['stored']:,} as bitmasks and kept values"]
    if report["flops"]["dense"]:
        lines.append(
            f"FLOPs of one sample, theoretical: {report['flops']['dense']:,} dense, {report['flops']['sparse']:,}"
        )
    lines.append("Masks alone make a network neither faster nor its checkpoint smaller.")
    return lines


def _owner(name: str) -> str:
    """The module that a parameter belongs to, by its name."""
    return name.rpartition(".")[0]
