"""Dynamic sparse training: at every update some kept weights are dropped and as many others grown."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from sparsity import masks
from sparsity.distributions import ERK, Distribution, Global
from sparsity.errors import InputError
from sparsity.history import History
from sparsity.masks import Masks
from sparsity.ops import largest
from sparsity.redistribution import InPlace
from sparsity.schedules import Constant, ConstantDrop, CosineDrop, Horizon, Plan, Schedule
from sparsity.scores import Magnitude, Random, Score, Scores
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets


class Regrowth:
    """What a method drops, what it grows, where, how much and when.

    Args:
        grow: the highest of these among the weights that are not kept are grown.
        drops: what fraction of the kept weights is dropped at which steps; RigL's `CosineDrop()` if not given.
        redistribution: how many weights each layer drops and grows; as many as each other (`InPlace()`) if not given.
        drop: the lowest of these among the kept weights are dropped; `Magnitude()` if not given.
    """

    def __init__(
        self,
        grow: Score,
        drops: ConstantDrop | None = None,
        redistribution: InPlace | None = None,
        drop: Score | None = None,
    ) -> None:
        self.grow, self.drop = grow, drop or Magnitude()
        self.drops = drops or CosineDrop()
        self.redistribution = redistribution or InPlace()


class Dynamic(Sparsifier):
    """Trains sparse from the first step, and moves the kept weights to where they do most good.

    Starts from random masks with the counts of `distribution`. An update drops some kept weights of each layer and
    grows as many weights, in all, from those that are then free; just dropped ones are free too, and one that is grown
    at once has never left: it keeps its value. A newly grown weight starts at exactly zero, with optimizer state of
    zero. One that was grown because its gradient was the largest does not take a step by that gradient, which chance
    has had a part in, but by the next one. The number of kept weights is exact at all times.

    A `schedule` that asks for more sparsity as training goes on is met at each of its steps first, by dropping the
    smallest magnitudes of the whole model, but not all of any layer (gradual pruning with regrowth, GraNet).

    Layers that training does not move keep their masks: frozen ones, those that no optimizer holds, and those without a
    gradient, or without momentum where weights grow by it.
    """

    def __init__(
        self,
        sparsity: float,
        regrowth: Regrowth,
        distribution: Distribution | None = None,
        schedule: Schedule | None = None,
        targets: Targets | None = None,
    ) -> None:
        # A layer that a schedule emptied could not grow again: it has nothing to drop.
        super().__init__(sparsity, Magnitude(), Global(minimum=1e-6), schedule=schedule, targets=targets)
        if self.sparsity == 0:
            raise InputError("sparsity=0 prunes nothing, so there is no free slot to grow into: ask for more, say 0.5")
        self.regrowth = regrowth
        self.first = distribution or ERK()
        self.needs_training = True
        self.keeps_state = regrowth.grow.needs_momentum
        self.ever: Masks = {}  # what has been kept at any time
        self._drops: Plan = {}

    def attach(self, model: nn.Module, *optimizers: Optimizer, horizon: Horizon | None = None, seed: int = 0) -> None:
        """As of any method; where this very model trains a second time, its masks move on from where they are."""
        if model is self._model:
            self.renewed, self.history = 0, History()
        super().attach(model, *optimizers, horizon=horizon, seed=seed)

    @property
    def begins_at_random(self) -> bool:
        return type(self.schedule) is Constant or getattr(self.schedule, "initial", 0.0) > 0

    def explored(self) -> float:
        """The fraction of target weights that have been kept at any time, R_s."""
        return masks.density(self.ever)

    def plan(self, horizon: Horizon) -> Plan:
        """The sparsity from each step of renewal on, those included that only move weights."""
        levels = super().plan(horizon)
        self._drops = self.regrowth.drops.plan(horizon)
        found: Plan = {}
        level = 0.0
        for step in sorted(levels | self._drops):
            level = found[step] = levels.get(step, level)
        return found

    def check_budget(self) -> None:
        """Raises `InputError` if the first masks leave nothing free, or the optimizers give no signal to grow by."""
        weights, optimizers = self.weights(), self._upkeep.optimizers
        for score in (self.regrowth.grow, self.regrowth.redistribution.score):
            if score:
                score.check(weights, optimizers)
        if 0 in self._plan and self._plan[0] > 0:
            self.first(self._scores(self.score, self.masks, "check"), 1 - self._plan[0])
        if round(self.sparsity * self._size()) < 1:
            raise InputError(
                f"sparsity={self.sparsity} of {self._size()} target weights leaves no free slot to grow into: "
                f"ask for at least {1 / self._size():.2g}"
            )

    def new_masks(self, density: float, step: int) -> Masks:
        """Random masks at step 0; later those that the update at this step leaves."""
        if step == 0:
            return self._random(density)
        pruned = super().new_masks(density, step)
        fraction = self._drops.get(step)
        return pruned if fraction is None else self._moved(pruned, fraction, step)

    def renew(self, found: Masks, step: int) -> None:
        """Takes over new masks; what they newly keep starts at zero, with optimizer state of zero."""
        by_gradient = self.regrowth.grow.needs_gradient and not self.keeps_state
        ever, self.ever = (self.ever or self.masks) if step else found, {}
        for name, weight in self.weights().items():
            grown = found[name] & ~self.masks[name]
            self._upkeep.restart(weight, grown, gradient=by_gradient)
            self.ever[name] = ever[name].to(grown.device) | found[name]
        super().renew(found, step)

    def adopt(self, found: Masks, renewed: int) -> None:
        self.ever = found
        super().adopt(found, renewed)

    def state_dict(self) -> dict[str, Any]:
        """Masks, counters, and one more bit per target weight: whether it has ever been kept."""
        return {**super().state_dict(), "ever": masks.to_state(self.ever)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ever = masks.from_state(state.get("ever", state["masks"]))

    def _random(self, density: float) -> Masks:
        scores = Scores(Random(), self.weights(), masks.full(self.weights()), seed=f"{self.seed}/0")
        if density == 1:
            return masks.full(self.weights())
        counts = self.first(scores, density)
        return {name: largest(scores[name], count) for name, count in counts.items()}

    def _moved(self, before: Masks, fraction: float, step: int) -> Masks:
        """The masks after dropping this fraction of the kept weights and growing as many."""
        rule = self.regrowth
        learning = [name for name, weight in self.weights().items() if self._learns(weight)]
        if not learning:
            raise InputError(
                f"no target has what {type(rule.grow).__name__} grows by at step {step}: every target is frozen or "
                "unused, or the optimizer keeps its state elsewhere, as ZeRO does"
            )
        kept = {name: int(before[name].count_nonzero()) for name in learning}
        sizes = {name: before[name].numel() for name in learning}
        dropped, grown = rule.redistribution(self._means(before, kept), kept, sizes, fraction)
        _check(dropped, grown, kept, sizes)
        found, free = dict(before), dict[str, Tensor]()
        lowest = self._scores(rule.drop, before, f"{step}/drop")
        highest = self._scores(rule.grow, free, f"{step}/grow")
        for name in learning:
            stays = self.stays(name, lowest[name], kept[name] - dropped[name])
            free[name] = self.free(stays, before[name])
            found[name] = stays | self.grown(name, highest[name], grown[name])
            del free[name]  # one layer's at a time
        return found

    def stays(self, name: str, scores: Tensor, count: int) -> Tensor:
        """Which weights of a layer an update keeps, so many of those with the highest scores."""
        return largest(scores, count)

    def free(self, stays: Tensor, before: Tensor) -> Tensor:
        """Which weights of a layer may grow, after and before the drop: those just dropped, too."""
        return ~stays

    def grown(self, name: str, scores: Tensor, count: int) -> Tensor:
        """Which weights of a layer grow, so many of those with the highest scores; what is not free has -inf."""
        return largest(scores, count)

    def _means(self, before: Masks, kept: dict[str, int]) -> dict[str, float]:
        """The mean score by which layers are compared, over the kept weights of each."""
        score = self.regrowth.redistribution.score
        if score is None:
            return dict.fromkeys(kept, 0.0)
        scores = self._scores(score, before, "means")
        found = {}
        for name, count in kept.items():
            total = float(scores[name].masked_fill(~before[name], 0).sum(dtype=torch.float64))
            found[name] = total / count if count else 0.0
        return found

    def _scores(self, score: Score, among: Masks, seed: str) -> Scores:
        return Scores(score, self.weights(), among, f"{self.seed}/{seed}", self._upkeep.optimizers)

    def _learns(self, weight: Parameter) -> bool:
        scores = (self.regrowth.grow, self.regrowth.drop, self.regrowth.redistribution.score)
        signals = (
            each.signal(weight, self._upkeep.optimizers) is not None
            for each in scores
            if each is not None and each.needs_gradient
        )
        return weight.requires_grad and weight.grad is not None and self._upkeep.steps(weight) and all(signals)


def _check(dropped: dict[str, int], grown: dict[str, int], kept: dict[str, int], sizes: dict[str, int]) -> None:
    """Raises `InputError` for a redistribution that drops or grows more than there is."""
    for name, count in kept.items():
        free = sizes[name] - count + dropped[name]
        if not 0 <= dropped[name] <= count or not 0 <= grown[name] <= free:
            raise InputError(
                f"the redistribution drops {dropped[name]} of {count} kept weights of '{name}' and grows "
                f"{grown[name]}, but {free} are free: both must fit"
            )
    if sum(dropped.values()) != sum(grown.values()):
        raise InputError(
            f"the redistribution drops {sum(dropped.values())} weights and grows {sum(grown.values())}: as many must be"
        )
