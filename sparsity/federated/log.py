"""Log: what a Lightning module logs where there is no trainer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

REDUCTIONS = {"mean": None, "max": max, "min": min, "sum": sum}


class Log:
    """Takes the place of a module's `log`, and reduces what it is given over an evaluation: by default to the mean,
    weighted by the sizes of batches. Outside of evaluations nothing is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.size = model, 1
        self.loader: int | None = None  # the present one's number, where there are several
        self._open = False
        self._values: dict[str, list[tuple[float, int]]] = {}
        self._reductions: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        self._computed: dict[str, float] = {}
        model.log, model.log_dict = self.note, self._note_all  # type: ignore[assignment]  # a Lightning module's

    def __enter__(self) -> None:
        self._open, self._values, self._metrics, self._computed = True, {}, {}, {}

    def __exit__(self, *_: object) -> None:
        self._open = False

    def note(self, name: str, value: Any, *_: Any, **settings: Any) -> None:
        """What `log` does."""
        if self.loader is not None and settings.get("add_dataloader_idx", True):
            name = f"{name}/dataloader_idx_{self.loader}"
        if not self._open:
            if hasattr(value, "reset"):
                value.reset()
        elif hasattr(value, "compute"):
            self._metrics[name] = value
        else:
            self._reductions[name] = settings.get("reduce_fx", "mean")
            self._values.setdefault(name, []).append((float(value), settings.get("batch_size") or self.size))

    def compute(self) -> None:
        """The metrics so far are those of one loader, and begin anew for the next."""
        for name, metric in self._metrics.items():
            self._computed[name] = float(metric.compute())
            metric.reset()
        self._metrics = {}

    def results(self) -> dict[str, float]:
        """All that has been logged, by name."""
        self.compute()
        found = {name: self._reduced(self._reductions[name], values) for name, values in self._values.items()}
        return found | self._computed

    def close(self) -> None:
        """The module's own `log` is back."""
        del self.model.log, self.model.log_dict

    def _note_all(self, values: Mapping[str, Any], *positions: Any, **settings: Any) -> None:
        for name, value in values.items():
            self.note(name, value, *positions, **settings)

    def _reduced(self, how: Any, values: list[tuple[float, int]]) -> float:
        by = REDUCTIONS.get(how) if isinstance(how, str) else how
        if by is None or by is torch.mean:
            return sum(value * size for value, size in values) / sum(size for _, size in values)
        numbers = [value for value, _ in values]
        return float(by(numbers) if isinstance(how, str) else by(torch.tensor(numbers)))


def batch_size(batch: Any) -> int:
    """The length of the first tensor in a batch, however it is nested; 1 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((batch_size(part) for part in parts if isinstance(part, Tensor | Mapping | list | tuple)), 1)
