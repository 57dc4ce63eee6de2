"""Congruity: dynamic sparse training of a federation's clients, guided by where the whole federation moves."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsity.distributions import ERK, Distribution
from sparsity.dynamic import Dynamic, Regrowth
from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.ops import largest
from sparsity.redistribution import Elsewhere
from sparsity.schedules import ConstantDrop, CosineDrop, Horizon
from sparsity.scores import Gradient
from sparsity.targets import Targets

Directions = dict[str, Tensor]


class Congruity:
    """What part of an update goes by the federation's directions first.

    A direction is the sign of a weight's change, int8: -1, 0 or 1. The federation's is that of the last round's global
    step, the client's that of its own training so far in this round.

    Args:
        prune: the part of the drops that take the smallest weights whose two directions are opposite, in [0, 1].
        grow: the same of the growth among weights where both agree; as `prune` if not given.
    """

    remembers = False  # whether directions of earlier rounds count where the last one has none

    def __init__(self, prune: float = 0.01, grow: float | None = None) -> None:
        grow = prune if grow is None else grow
        for name, part in (("prune", prune), ("grow", grow)):
            if not 0 <= part <= 1:
                raise InputError(f"{name} is a part of the weights that move and must lie in [0, 1], got {part}")
        self.prune, self.grow = prune, grow

    def agrees(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """Where a weight that is not kept moves as the federation's: here, where neither does.

        As in the authors' code, where the weight of a client does not move as long as it is pruned. So only those that
        the server has pruned in the last round come last, and growth is RigL's otherwise.
        """
        return direction == 0


class GradientCongruity(Congruity):
    """Weights grow first where a step against the client's gradient goes the way the federation last moved them.

    Our own reading of "gradient congruity" where the published rule has no content. The server remembers the last
    direction of every weight, and sends those of pruned weights as well.
    """

    remembers = True

    def agrees(self, direction: Tensor, gradient: Tensor) -> Tensor:
        return direction * -gradient.sign() > 0


class Congruent(Dynamic):
    """Drops the smallest magnitudes and grows by the largest gradients, first where the federation agrees.

    FedSGC, Tian et al. (arXiv 2405.01189), reconstructed: the paper's tables were not available, and its rule is taken
    from its abstract and from public code of its first author. Of k weights that a layer moves, part goes by
    congruity; without any, or before the first directions came, this is FedDST (Bibikar et al., AAAI 2022, arXiv
    2112.09824). What is dropped does not grow again at once, and the number of weights is exact, where public
    implementations lose some.

    `receive` takes over the server's masks and directions, after its weights.
    """

    def __init__(
        self,
        sparsity: float,
        congruity: Congruity | None = None,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        rule = Regrowth(Gradient(), drops or CosineDrop(0.1, 20, 2 / 3), Elsewhere())
        super().__init__(sparsity, rule, distribution or ERK(), targets=targets)
        self.congruity = congruity or Congruity()
        self.directions: Directions = {}
        self._begun: dict[str, Tensor] = {}  # the weights as they came
        self._received = False  # whether they may still come

    def attach(self, model: nn.Module, *optimizers: Optimizer, horizon: Horizon | None = None, seed: int = 0) -> None:
        """As of any method; directions that came before it go with the weights that the model has now."""
        super().attach(model, *optimizers, horizon=horizon, seed=seed)
        if self._received:
            self._begun, self._received = self._now(), False

    def receive(self, found: Masks, renewed: int = 0, directions: Directions | None = None) -> None:
        """A server's masks, as those of the renewal at a step, and directions; none are FedDST's rule.

        In a trainer of one's own the step is 0: its steps begin anew in each fit. The weights come before, or, where
        the method has not been attached yet, until it is.
        """
        self.adopt(found, renewed)
        self.directions, self._received = dict(directions or {}), True
        self._begun = self._now()

    def stays(self, name: str, scores: Tensor, count: int) -> Tensor:
        """Keeps what would be dropped, for as many as are dropped for a conflict instead."""
        kept = scores > -torch.inf
        opposed = kept & (self._direction(name, scores) * self._change(name, scores) < 0)
        first = min(int(self.congruity.prune * (int(kept.count_nonzero()) - count)), int(opposed.count_nonzero()))
        conflicts = largest((-scores).masked_fill(~opposed, -torch.inf), first)
        return largest(scores.masked_fill(conflicts, -torch.inf), count)

    def free(self, stays: Tensor, before: Tensor) -> Tensor:
        """What was not kept before the update."""
        return ~before

    def grown(self, name: str, scores: Tensor, count: int) -> Tensor:
        gradient = self.weights()[name].grad
        if gradient is None or name not in self.directions:
            return largest(scores, count)
        agreed = (scores > -torch.inf) & self.congruity.agrees(self._direction(name, scores), gradient)
        number = min(int(self.congruity.grow * count), int(agreed.count_nonzero()))
        first = largest(scores.masked_fill(~agreed, -torch.inf), number)
        return first | largest(scores.masked_fill(first, -torch.inf), count - number)

    def state_dict(self) -> dict[str, Any]:
        """Also the directions, and the weights as they came."""
        return {**super().state_dict(), "directions": dict(self.directions), "begun": dict(self._begun)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.directions, self._begun = dict(state.get("directions", {})), dict(state.get("begun", {}))

    def _now(self) -> dict[str, Tensor]:
        weights = self.weights() if self.directions else {}
        return {name: weight.detach().clone() for name, weight in weights.items()}

    def _direction(self, name: str, like: Tensor) -> Tensor:
        found = self.directions.get(name)
        return torch.zeros_like(like) if found is None else found.to(like.device)

    def _change(self, name: str, like: Tensor) -> Tensor:
        if name not in self._begun:
            return torch.zeros_like(like)
        return (self.weights()[name].detach() - self._begun[name].to(like.device)).sign()
