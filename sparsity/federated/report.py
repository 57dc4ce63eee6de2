"""What a simulation has to show: its bytes, its failures, and accuracy against rounds and bytes."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsity.federated.coordinator import Row
from sparsity.federated.simulation import Outcome
from sparsity.report import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def describe(outcome: Outcome) -> dict[str, Any]:
    """The entries that a simulation adds to a report: `rounds`, and sums over them in `federated`."""
    rows = outcome.rows
    up, down = (sum(row[name] for row in rows) for name in ("bytes_up", "bytes_down"))
    reasons = Counter(reason for row in rows for reason in row["reasons"].values())
    return {
        "rounds": rows,
        "federated": {
            "clients": len(outcome.parts), "samples": [len(part) for part in outcome.parts],
            "bytes_up": up, "bytes_down": down, "bytes_dense": sum(row["bytes_dense"] for row in rows),
            "failures": dict(reasons.most_common()), "per_client": spread(outcome.clients),
            "scouting": outcome.state.scouting or None,
        },
    }  # fmt: skip


def spread(clients: Mapping[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Least, median, mean and largest of what the final model has on each client's held-out samples, by metric."""
    found = {}
    for name in next(iter(clients.values()), {}):
        values = [each[name] for each in clients.values() if math.isfinite(each[name])] or [math.nan]
        found[name] = {
            "least": min(values), "median": statistics.median(values), "mean": statistics.fmean(values),
            "largest": max(values),
        }  # fmt: skip
    return found


def line(row: Row, rounds: int, left: float) -> str:
    """A round for the terminal: accuracy, who answered, bytes, seconds, and how long the others will take."""
    accuracy = "" if row["accuracy"] is None else f"  accuracy {row['accuracy']:.4f}"
    minutes, seconds = divmod(round(left), 60)
    failed = f" ({row['failures']} failed)" if row["failures"] else ""
    return (
        f"round {row['round'] + 1:>{len(str(rounds))}}/{rounds}{accuracy}  density {row['density']:.4f}"
        f"  {row['clients']} clients{failed}  {size(row['bytes_down'])} down  {size(row['bytes_up'])} up"
        f"  {row['seconds']:.1f} s  ETA {minutes}:{seconds:02d}"
    )


def figure(runs: dict[str, Sequence[Row]]) -> "Figure":
    """Accuracy against rounds and against all bytes sent so far, a line for each run. Needs matplotlib (`viz`)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    picture = Figure(figsize=(10, 4), layout="constrained")
    by_round, by_bytes = picture.subplots(1, 2, sharey=True)
    for name, rows in runs.items():
        sent, places, accuracies, totals = 0, [], [], []
        for row in rows:
            sent += row["bytes_up"] + row["bytes_down"]
            if row["accuracy"] is not None:
                places.append(row["round"] + 1)
                accuracies.append(row["accuracy"])
                totals.append(sent / 1e6)
        by_round.plot(places, accuracies, label=name)
        by_bytes.plot(totals, accuracies, label=name)
    by_round.set(xlabel="round", ylabel="accuracy on the validation split")
    by_bytes.set(xlabel="MB sent, both ways", xscale="log")
    by_bytes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    by_bytes.xaxis.set_minor_formatter(NullFormatter())
    for axes in (by_round, by_bytes):
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        by_round.legend(frameon=False, loc="lower right")  # below curves that rise
    return picture
