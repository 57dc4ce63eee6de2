"""Importance: masks that follow the squares of gradients, of the whole model at once."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsity.distributions import ERK, Distribution
from sparsity.dynamic import Dynamic, Regrowth
from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.ops import largest
from sparsity.schedules import ConstantDrop, CosineDrop
from sparsity.scores import Gradient
from sparsity.targets import Targets


class Importance(Dynamic):
    """PruneFL's adaptive pruning, Jiang et al. (TNNLS 2022, arXiv 1909.12326), at a fixed sparsity.

    An update frees the smallest magnitudes of each layer, and keeps, of these and of all that were pruned, those whose
    squared gradients since the last update come to most, over the time that a weight of its layer takes: as many as
    were freed, wherever they are. In a federation these are the gradients of the round in which masks move. The authors
    also let the number of weights follow the gain per time; here it stays.

    Gradients are squared at every step, of pruned weights too: another float32 for each weight. Frozen layers keep
    their masks.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        drops: what fraction of the kept weights is freed, and when.
        distribution: the weights each layer starts with; `ERK()` if not given.
        targets: which parameters; all Linear and convolution weights if not given.
        times: how long one weight of a layer takes, by name, in any unit; all the same if not given.
    """

    def __init__(
        self,
        sparsity: float,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
        times: dict[str, float] | None = None,
    ) -> None:
        rule = Regrowth(Gradient(), drops or CosineDrop(0.3, 50, 1.0))
        super().__init__(sparsity, rule, distribution or ERK(), targets=targets)
        wrong = [name for name, time in (times or {}).items() if time <= 0]
        if wrong:
            raise InputError(f"times are above 0, those of {wrong} are not")
        self.times = dict(times or {})
        self.collects = True  # whether gradients are squared
        self.squares: dict[str, Tensor] = {}
        self.steps = 0  # that the squares are of

    def check_budget(self) -> None:
        """Also raises `InputError` for times of what is no target."""
        super().check_budget()
        unknown = [name for name in self.times if name not in self.masks]
        if unknown:
            raise InputError(f"times of {unknown}, which are no targets: those are {list(self.masks)}")

    def update(self, step: int, optimizer: Optimizer | None = None) -> None:
        """As of any method; before it, the gradients of all targets are squared."""
        if self.collects and self._gradients_are_finite():
            self.collect()
        super().update(step, optimizer)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the squares of the present gradients."""
        self.steps += 1
        for name, weight in self.weights().items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
            self.squares[name] = self.squares[name].add_(square) if name in self.squares else square

    def mean_squares(self) -> dict[str, Tensor]:
        """The mean squared gradient of each target since the last update."""
        return {name: square / max(1, self.steps) for name, square in self.squares.items()}

    def adopt(self, found: Masks, renewed: int) -> None:
        super().adopt(found, renewed)
        self.squares, self.steps = {}, 0

    def renew(self, found: Masks, step: int) -> None:
        super().renew(found, step)
        self.squares, self.steps = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Also the squares."""
        return {**super().state_dict(), "squares": dict(self.squares), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.squares, self.steps = dict(state.get("squares", {})), state.get("steps", 0)

    def _moved(self, before: Masks, fraction: float, step: int) -> Masks:
        learning = [
            name for name, weight in self.weights().items() if weight.requires_grad and self._upkeep.steps(weight)
        ]
        kept = {name: int(before[name].count_nonzero()) for name in learning}
        lowest = self._scores(self.regrowth.drop, before, f"{step}/drop")
        stays = {name: largest(lowest[name], count - int(fraction * count)) for name, count in kept.items()}
        freed = sum(kept.values()) - sum(int(mask.count_nonzero()) for mask in stays.values())
        gains = {name: self._gain(name, mask).masked_fill(mask, -torch.inf) for name, mask in stays.items()}
        chosen = largest(torch.cat([gain.flatten() for gain in gains.values()]), freed)
        parts = torch.split(chosen, [mask.numel() for mask in stays.values()])
        found = dict(before)
        for (name, mask), part in zip(stays.items(), parts, strict=True):
            found[name] = mask | part.view(mask.shape)
        return found

    def _gain(self, name: str, like: Tensor) -> Tensor:
        squares = self.squares.get(name)
        if squares is None:
            return torch.zeros(like.shape, device=like.device)
        return squares.to(like.device, torch.float32) / self.times.get(name, 1.0)
