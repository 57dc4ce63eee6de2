"""Difference: two runs, checkpoints or mask files beside each other. What both keep, and what else they ended with."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsity import checkpoints, masks
from sparsity.errors import InputError
from sparsity.report import size, state_sizes
from sparsity.targets import clean

if TYPE_CHECKING:
    from rich.console import Group

Row = dict[str, Any]


class Side:
    """One of the two: masks where there are any, all weights where there are any, metrics and bytes where known.

    A run is its log folder: masks and weights are those of `masks.safetensors` and of the newest checkpoint below it,
    metrics and bytes those of `report.json`. A checkpoint is that of a trainer or a plain `state_dict`; where it holds
    no masks, what is exactly zero is pruned. Raises `InputError` for anything else, and for what cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.masks: masks.Masks = {}
        self.weights: dict[str, Tensor] = {}
        self.metrics: dict[str, float | None] = {}
        self.bytes: dict[str, int] | None = None
        if self.path.is_dir():
            self._read_run()
        elif self.path.suffix == ".safetensors":
            self.masks = masks.load(self.path)
        else:
            self._read_checkpoint(self.path)

    def mask(self, name: str) -> Tensor:
        """What is kept of a weight; raises `InputError` where there is neither a mask of it nor the weight."""
        if name in self.masks:
            return self.masks[name]
        if name not in self.weights:
            raise InputError(f"'{self.path}' has no '{name}': it is of another model, or of other targets")
        return self.weights[name] != 0

    def matrices(self) -> list[str]:
        """Every matrix and filter."""
        return [name for name, value in self.weights.items() if value.ndim > 1 and value.is_floating_point()]

    def sizes(self, names: Iterable[str]) -> dict[str, int] | None:
        """Bytes dense and stored, those of the report where there is one; None of masks alone."""
        if self.bytes is not None or not self.weights:
            return self.bytes
        kept = {name: int(self.mask(name).count_nonzero()) for name in names}
        return state_sizes(self.weights, kept, {name: self.weights[name] for name in names if name in self.weights})

    def _read_run(self) -> None:
        report, found = self.path / "report.json", self.path / "masks.safetensors"
        # That of a federation is its server's state.
        saved = [each for each in self.path.rglob("*.ckpt") if each.name != "federation.ckpt"]
        if not report.is_file():
            below = sorted(str(each.parent) for each in self.path.rglob("report.json"))
            hint = (
                f"its runs are {', '.join(below)}" if below else "give the log folder of a run, a checkpoint or masks"
            )
            raise InputError(f"there is no report.json in '{self.path}': {hint}")
        if not saved and not found.is_file():
            raise InputError(
                f"there is neither a checkpoint nor masks.safetensors in '{self.path}': save one in training"
            )
        if saved:
            self._read_checkpoint(max(saved, key=lambda each: (each.stat().st_mtime_ns, each.name)))
        if found.is_file():
            self.masks = masks.load(found)
        self._read_report(report)

    def _read_report(self, path: Path) -> None:
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            self.metrics = {name: value if value is None else float(value) for name, value in known["metrics"].items()}
            self.bytes = {name: int(known["bytes"][name]) for name in ("dense", "stored")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"'{path}' is damaged or no report of a run ({error!r})") from error

    def _read_checkpoint(self, path: Path) -> None:
        contents = checkpoints.read(path)
        state = contents.get("state_dict", contents)
        if isinstance(state, dict):
            state, self.masks = checkpoints.without_masks(state)
            self.weights = {clean(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
        if not self.weights:
            raise InputError(f"'{path}' holds no weights: give a trainer's checkpoint, a state_dict or masks")
        saved = (contents.get("callbacks") or {}).get("Sparsify")
        if saved:
            try:
                self.masks = masks.from_state(saved["sparsifier"]["masks"])
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise InputError(f"the masks in '{path}' are damaged ({error!r}): save them again") from error


def compare(first: str | Path, second: str | Path) -> Row:
    """Both of these beside each other, as a dictionary that JSON can write.

    `layers`: for each target of either, its `weights`, the density of `a` and of `b`, `jaccard` (kept by both over kept
    by any, 1 where neither keeps any), `kept` (the part of what a keeps that b keeps, None where a keeps none) and
    `chance`, what that would be on average if b had chosen at random as many of each layer. `all`: the same over all of
    them. `metrics` and `bytes`: of each, and of metrics the difference, b minus a.

    Raises `InputError` for models that differ, by the name of the first weight that does.
    """
    a, b = Side(first), Side(second)
    masked = [*a.masks, *b.masks]
    names = list(dict.fromkeys(masked or [*a.matrices(), *b.matrices()]))
    counts = {name: _counts(name, a, b) for name in names}
    total = [sum(each) for each in zip(*counts.values(), strict=True)]
    if not total:
        raise InputError(f"neither '{a.path}' nor '{b.path}' has a weight that could be pruned")
    return {
        "a": str(a.path), "b": str(b.path),
        "layers": {name: _row(*each) for name, each in counts.items()}, "all": _row(*total),
        "metrics": _metrics(a.metrics, b.metrics), "bytes": {"a": a.sizes(names), "b": b.sizes(names)},
    }  # fmt: skip


def summary(found: Row) -> "Group":
    """The comparison for a terminal: a table of the layers, one of the metrics, the bytes."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    view = Table(title=escape(f"a: {found['a']}\nb: {found['b']}"), title_justify="left", show_footer=True)
    view.add_column("layer", "all", overflow="fold")
    columns = {"weights": "weights", "a": "a keeps", "b": "b keeps", "jaccard": "Jaccard", "kept": "of a's, b keeps",
               "chance": "by chance"}  # fmt: skip
    for key, name in columns.items():
        view.add_column(name, _text(found["all"][key]), justify="right")
    for name, row in found["layers"].items():
        view.add_row(escape(name), *map(_text, row.values()))
    parts: list[Any] = [view]
    if found["metrics"]:
        metrics = Table("metric")
        for each in ("a", "b", "b - a"):
            metrics.add_column(each, justify="right")
        for name, row in found["metrics"].items():
            metrics.add_row(escape(name), *map(_text, row.values()))
        parts.append(metrics)
    for side, known in found["bytes"].items():
        if known:
            parts.append(
                f"bytes of {side}: {size(known['dense'])} dense, {size(known['stored'])} as bitmasks and values"
            )
    return Group(*parts)


def _counts(name: str, a: Side, b: Side) -> tuple[int, int, int, int, float]:
    """Weights, those a keeps, those b keeps, those both keep, and those both would keep by chance."""
    one, other = a.mask(name), b.mask(name)
    if one.shape != other.shape:
        raise InputError(
            f"'{name}' has shape {tuple(one.shape)} in '{a.path}' and {tuple(other.shape)} in '{b.path}': "
            "these are different models"
        )
    weights, kept = one.numel(), masks.counts({"a": one, "b": other, "both": one & other})
    return weights, kept["a"], kept["b"], kept["both"], kept["a"] * kept["b"] / max(1, weights)


def _row(weights: int, a: int, b: int, both: int, chance: float) -> Row:
    return {
        "weights": weights, "a": a / max(1, weights), "b": b / max(1, weights),
        "jaccard": both / (a + b - both) if a + b else 1.0,
        "kept": both / a if a else None, "chance": chance / a if a else None,
    }  # fmt: skip


def _metrics(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> dict[str, Row]:
    found = {}
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name), b.get(name)
        found[name] = {"a": one, "b": other, "difference": None if one is None or other is None else other - one}
    return found


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
