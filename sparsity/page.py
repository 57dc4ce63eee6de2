"""The page of a report: one HTML file for a browser, which loads nothing and runs nothing."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from sparsity.drawing import bars, chart, mosaic, picture, short, smaller
from sparsity.files import written
from sparsity.history import History
from sparsity.report import Report, is_urgent, size
from sparsity.traces import Traces

COLUMNS = 240  # moments of the heat-map
SHOWN = 12  # layers whose histograms are shown
PICTURED = 3  # layers whose masks are shown
SPLITS = r"^(train|training|val|valid|validation|test)[/_]"

Lines = dict[str, list[tuple[float, float]]]


def render(
    report: Report, traces: Traces, masks: Mapping[str, Tensor], history: History, asked: Sequence[float] = ()
) -> str:
    """The page as HTML, all of whose text is escaped. What a run did not leave has no section.

    `asked` is the sparsity that was asked for at each renewal of the `history`.
    """
    layers, rounds = report["sparsity"]["layers"], report.get("rounds", [])
    heat = len(history.steps) > 1 and history.names == list(layers)  # a test may be of another model
    last = float(max([*history.steps[-1:], *(row["step"] for row in traces.rows[-1:])], default=0))
    charts = [*_metrics(traces, last), *(_moves(layers, history, asked, last) if heat else [])]
    if "federated" in report:
        charts += _federated(rounds)
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    pages.filters |= {"short": short, "size": size, "percent": percent, "words": words}
    return pages.get_template("page.html").render(
        report=report, layers=layers, headline=headline(report["metrics"]), charts=charts,
        urgent=[each for each in report["warnings"] if is_urgent(each)],
        remarks=[each for each in report["warnings"] if not is_urgent(each)],
        heat=_heat(history) if heat else [], steps=history.steps, legend=_legend(),
        weights=_weights(traces), before=bool(traces.before), left_out=max(0, len(traces.after) - SHOWN),
        pictures=_pictures(masks), prod=math.prod,
    )  # fmt: skip


def save(page: str, path: Path) -> None:
    """Writes the page in one piece or not at all."""
    with written(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # the name of a file may be no Unicode


def headline(metrics: Mapping[str, float | None]) -> list[str]:
    """Up to two metrics by which people know a run: those of training last, accuracies first."""

    def order(name: str) -> tuple[bool, bool, bool]:
        return name.startswith("train"), "acc" not in name, not name.startswith("test")

    return sorted((name for name, value in metrics.items() if value is not None), key=order)[:2]


def percent(part: float, whole: float = 1.0) -> str:
    """A part of a whole, to a tenth of a per cent; to a hundredth at the ends."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2f} %" if min(share, 100 - share) < 1 and share not in (0, 100) else f"{share:.1f} %"


def words(value: Any) -> str:
    """A value of any kind in a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _metrics(traces: Traces, last: float) -> list[Any]:
    """A chart for each kind of metric, with training, validation and test in one."""
    kinds: dict[str, Lines] = {}
    for name, points in traces.series().items():
        kinds.setdefault(re.sub(SPLITS, "", name), {})[name] = points
    order = sorted(kinds, key=lambda kind: "acc" not in kind)
    found = [(kind, kinds[kind]) for kind in order if max(map(len, kinds[kind].values())) > 1]
    return [chart(kind, lines, "optimizer step", _span(lines, last)) for kind, lines in found]


def _span(lines: Lines, last: float) -> list[tuple[float, float]]:
    """Points that make an axis reach from the first step of training to the last."""
    value = next(iter(lines.values()))[0][1]
    return [(0.0, value), (last, value)]


def _moves(layers: Mapping[str, Any], history: History, asked: Sequence[float], last: float) -> list[Any]:
    """Charts of what the masks did: sparsity, churn, dead neurons."""
    sizes = torch.tensor([float(math.prod(layers[name]["shape"])) for name in history.names])
    kept = (history.densities().double() * sizes[:, None]).sum(0) / max(1.0, float(sizes.sum()))
    achieved = [(float(step), 1 - density) for step, density in zip(history.steps, kept.tolist(), strict=True)]
    lines = {"achieved": achieved}
    if asked:
        lines["asked for"] = [(step, level) for (step, _), level in zip(achieved, asked, strict=True)]

    def row(place: int) -> list[tuple[float, float]]:
        return [(float(step), row[place]) for step, row in zip(history.steps, history.rows, strict=True)]

    whole = [(0.0, 0.0), (last, 1.0)]
    # The first masks replace none.
    moved = {"churn": row(0)[1:], "ever kept (R_s)": row(1)}
    found = [
        chart("sparsity", lines, "optimizer step", whole, stairs=True),
        chart("mask churn", moved, "optimizer step", whole),
    ]
    if any(dead for _, dead in row(2)):
        found.append(chart("neurons without a weight", {"dead": row(2)}, "optimizer step", whole, stairs=True))
    return found


def _federated(rounds: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Accuracy against rounds and against bytes; density and bytes of each round."""
    sent, by_round, by_bytes = 0, [], []
    for row in rounds:
        sent += row["bytes_up"] + row["bytes_down"]
        if row["accuracy"] is not None:
            by_round.append((row["round"] + 1.0, row["accuracy"]))
            by_bytes.append((sent / 1e6, row["accuracy"]))
    lines = {
        name: [(row["round"] + 1.0, row[key] / 1e6) for row in rounds]
        for name, key in (("up", "bytes_up"), ("down", "bytes_down"))
    }
    found = [chart("MB of each round", lines, "round", [(1.0, 0.0)])] if rounds else []
    if by_round:
        title = "accuracy on the validation split"
        found.insert(0, chart(title, {"by round": by_round}, "round", [(1.0, by_round[0][1])]))
        found.insert(1, chart(title, {"by MB": by_bytes}, "MB sent, both ways", [(0.0, by_round[0][1])]))
    return found


def _heat(history: History) -> list[dict[str, Any]]:
    """Each layer's density over training as a picture of one row, its moments as far apart as they were."""
    first, last = history.steps[0], history.steps[-1]
    moments = torch.linspace(first, last, COLUMNS, dtype=torch.float64)
    at = torch.searchsorted(torch.tensor(history.steps, dtype=torch.float64), moments, right=True) - 1
    densities = history.densities()
    return [
        {"name": name, "start": row[0].item(), "end": row[-1].item(), "image": picture(row[at][None])}
        for name, row in zip(history.names, densities, strict=True)
    ]


def _legend() -> list[tuple[str, str]]:
    return [(f"{shade:g}", picture(torch.tensor([[shade]]))) for shade in (0.01, 0.05, 0.2, 0.5, 1.0)]


def _weights(traces: Traces) -> list[dict[str, Any]]:
    """Histograms of the first layers: before and after on the same axes, drawn to the same area."""
    found = []
    for name, after in list(traces.after.items())[:SHOWN]:
        pair = {"before": traces.before.get(name), "after": after}
        drawn = {when: each for when, each in pair.items() if each and each["edge"]}
        if drawn:
            heights = {when: each["counts"] / (each["counts"].sum() * each["edge"]) for when, each in drawn.items()}
            widest = max(each["edge"] for each in drawn.values())
            highest = max(float(each.max()) for each in heights.values())
            found.append({
                "name": name, "edge": widest,
                "paths": {when: bars(heights[when], drawn[when]["edge"], widest, highest) for when in drawn},
                "counts": {when: int(each["counts"].sum()) for when, each in drawn.items()},
            })  # fmt: skip
    return found


def _pictures(masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The masks of the first layers, and what the first keeps of each pixel where its inputs are those of a square."""
    found = []
    for name, mask in [(name, mask) for name, mask in masks.items() if not mask.all()][:PICTURED]:
        kept = mask.cpu().float()
        if kept.ndim == 4 and kept[0, 0].numel() > 1:
            shades = mosaic(kept.mean(1))
            about = f"the {len(kept)} filters of {kept.shape[2]} x {kept.shape[3]}, averaged over their inputs"
        else:
            shades = kept.reshape(len(kept), -1)
            about = f"{shades.shape[0]} rows (axis 0) by {shades.shape[1]} columns"
        found.append(_picture(name, about, shades))
    first, mask = next(iter(masks.items()), ("", torch.empty(0)))
    side = math.isqrt(mask.shape[1]) if mask.ndim == 2 else 0
    if side >= 8 and side**2 == mask.shape[1] and found and found[0]["name"] == first:
        kept = mask.cpu().float().mean(0).view(side, side)
        about = f"the kept part of each input's weights, the {side**2} inputs as a square; the most is {kept.max():.3f}"
        found.append(_picture(first, about, kept / kept.max().clamp(min=1e-9)))
    return found


def _picture(name: str, about: str, shades: Tensor) -> dict[str, Any]:
    drawn = smaller(shades)
    if drawn.shape != shades.shape:
        about += f", drawn as {drawn.shape[0]} by {drawn.shape[1]}"
    zoom = max(1, round(240 / max(drawn.shape)))
    return {
        "name": name, "about": about, "image": picture(drawn),
        "width": zoom * drawn.shape[1], "height": zoom * drawn.shape[0],
    }  # fmt: skip
