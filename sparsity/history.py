"""History: what the masks did over training, one row for each renewal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsity.masks import counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 1024  # more renewals than this are thinned out to every second one
NUMBERS = ("churn", "explored", "dead")


class History:
    """The density of every layer after each renewal, with churn, explored weights and dead neurons.

    churn: the part of the kept weights that the renewal dropped, in [0, 1]. explored: the part of all target weights
    that have been kept at any time, the in-time over-parameterization rate R_s of Liu et al. (arXiv 2102.02887). dead:
    how many neurons, rows or channels of a target, have no weight left on their inputs.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[int] = []
        self.rows: list[list[float]] = []

    def record(self, step: int, masks: Mapping[str, Tensor], before: Mapping[str, Tensor], explored: float) -> None:
        """Adds a row; the first one has no churn."""
        self.names = list(masks)
        kept = counts(masks)
        earlier = sum(counts(before).values())
        dropped = sum(int((before[name] & ~mask).count_nonzero()) for name, mask in masks.items())
        churn = dropped / earlier if self.steps and earlier else 0.0
        densities = [kept[name] / mask.numel() for name, mask in masks.items()]
        self.steps.append(step)
        self.rows.append([churn, explored, float(dead_neurons(masks)), *densities])
        if len(self.rows) > ROWS:
            # The last row stays.
            self.steps, self.rows = self.steps[::-2][::-1], self.rows[::-2][::-1]

    def last(self) -> dict[str, float]:
        """The numbers of the last renewal by name; none before the first."""
        return dict(zip(NUMBERS, self.rows[-1], strict=False)) if self.rows else {}

    def densities(self) -> Tensor:
        """Density of each layer after each renewal: [layers, renewals]."""
        return torch.tensor(self.rows).reshape(len(self.rows), -1)[:, len(NUMBERS) :].T

    def state_dict(self) -> dict[str, Any]:
        """Tensors and names."""
        rows = torch.tensor(self.rows, dtype=torch.float64)
        return {"names": self.names, "steps": torch.tensor(self.steps, dtype=torch.int64), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved history."""
        self.names, self.steps, self.rows = list(state["names"]), state["steps"].tolist(), state["rows"].tolist()

    def figure(self) -> "Figure":
        """The density of each layer over training as a heat-map, with churn and explored weights below it.

        Needs matplotlib (the `viz` extra).
        """
        from matplotlib.figure import Figure

        picture = Figure(figsize=(9, 2.8 + 0.3 * len(self.names)), layout="constrained")
        above, below = picture.subplots(2, 1, sharex=True, height_ratios=[max(2.0, 0.35 * len(self.names)), 1.6])
        edges = [*self.steps, self.steps[-1] + max(1, self.steps[-1] - self.steps[-2])]
        places = list(range(len(self.names) + 1))
        heat = above.pcolormesh(edges, places, self.densities().numpy(), vmin=0, vmax=1, cmap="viridis")
        above.set_yticks([row + 0.5 for row in range(len(self.names))], labels=self.names, fontsize=8)
        above.invert_yaxis()
        above.set_title("Density of each layer over training", loc="left")
        picture.colorbar(heat, ax=above, label="density")
        for place, (label, color) in enumerate((("churn", "#cc6677"), ("explored (R_s)", "#4477aa"))):
            below.step(self.steps, [row[place] for row in self.rows], where="post", label=label, color=color)
        below.set(xlabel="optimizer step", ylim=(0, 1.05))
        below.legend(frameon=False, loc="center right")
        below.spines[["top", "right"]].set_visible(False)
        return picture


def dead_neurons(masks: Mapping[str, Tensor]) -> int:
    """How many rows (axis 0: neurons, output channels) of all masks keep nothing."""
    return sum(int((mask.flatten(1).sum(1) == 0).count_nonzero()) for mask in masks.values() if mask.ndim > 1)
