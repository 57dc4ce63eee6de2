"""Traces: what a run leaves for its page beside its report and its history. A few numbers an epoch."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsity import shards

COUNTED = 1 << 24  # up to which floats of 32 bits count
BINS = 41  # odd, so that zero is in the middle of one
ROWS = 1024  # more measurements than this are put together, two and two

Histogram = dict[str, Any]
Row = dict[str, Any]


class Traces:
    """Metrics over training, and the weights of each target before and after it as histograms.

    rows: what was measured when, `{"step": 10, "metrics": {"val/acc": 0.9}}`. before, after: by the target's name.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.before: dict[str, Histogram] = {}
        self.after: dict[str, Histogram] = {}

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds what was measured at a step, whose earlier measurements are gone on with; only finite numbers count."""
        found = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1]["metrics"] |= found
        elif found:
            self.rows.append({"step": step, "metrics": found})
        if len(self.rows) > ROWS:
            self.rows = [_joined(*self.rows[i : i + 2]) for i in range(0, len(self.rows), 2)]

    def series(self) -> dict[str, list[tuple[float, float]]]:
        """Each metric by name as (step, value)."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            for name, value in row["metrics"].items():
                found.setdefault(name, []).append((row["step"], value))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        rows = [{"step": row["step"], "metrics": dict(row["metrics"])} for row in self.rows]
        return {"rows": rows, "before": dict(self.before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what a run has left so far."""
        self.rows, self.before = list(state["rows"]), dict(state["before"])


def histograms(weights: Mapping[str, Tensor]) -> dict[str, Histogram]:
    """Those of the weights that hold values, by name; weights that are spread over processes are gathered."""
    return {name: histogram(shards.whole(weight.detach())) for name, weight in weights.items() if not weight.is_meta}


def _joined(first: Row, *second: Row) -> Row:
    """The later one of two rows, with what only the earlier one has."""
    last = second[-1] if second else first
    return {"step": last["step"], "metrics": first["metrics"] | last["metrics"]}


def histogram(weight: Tensor) -> Histogram:
    """How many values lie in each of 41 equal bins from -edge to edge, the largest magnitude: `{"edge", "counts"}`.

    Zeros and what is not finite are left out.
    """
    values = weight.cpu().float().flatten()  # on CUDA histc may give another result each time
    values = values[values.isfinite() & (values != 0)]
    edge = float(values.abs().max()) if values.numel() else 0.0
    counts = torch.zeros(BINS, dtype=torch.float64)
    for part in torch.split(values, COUNTED) if edge else ():
        counts += torch.histc(part, BINS, -edge, edge)
    return {"edge": edge, "counts": counts}
