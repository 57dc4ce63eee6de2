"""Lottery tickets: rounds of training, pruning and going back to an early moment of training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsity.distributions import Distribution, Global
from sparsity.errors import InputError
from sparsity.moments import Moment
from sparsity.schedules import Constant, Horizon, Plan, rounds
from sparsity.scores import Magnitude
from sparsity.stages import Stages, whole_epochs
from sparsity.targets import Targets

Span = float | str


class Particles:
    """How many networks are trained in each round, and over which part of its end each is averaged.

    Args:
        count: networks that start from the same weights and see other batches.
        averaged: the last part of a round's epochs, as a fraction; at least the last epoch, where count is above 1.
    """

    def __init__(self, count: int = 4, averaged: float = 0.25) -> None:
        if count < 1:
            raise InputError(f"particles are networks that are trained: count must be at least 1, got {count}")
        if not 0 <= averaged <= 1:
            raise InputError(f"averaged is a fraction of a round and must lie in [0, 1], got {averaged}")
        self.count, self.averaged = count, averaged


class Lottery(Stages):
    """Iterative magnitude pruning with rewinding: Frankle & Carbin (ICLR 2019, arXiv 1803.03635), and Frankle et al.,
    "Linear mode connectivity and the lottery ticket hypothesis" (ICML 2020, arXiv 1912.05671).

    The first round is dense. Each round ends with pruning `rate` of what remains, and all weights and buffers go back
    to what they were after the epochs of `rewind` in the first round; the schedule and fresh optimizers, which are the
    caller's, go back with them. The last round trains at the sparsity.

        sparsifier.collect(recompute)  # after the last batch of an epoch, before any validation
        if sparsifier.end_epoch():     # after the epoch: whether the network was rewound, and optimizers should be

    With `particles` each round trains several networks from the same ticket, averages them over their last epochs, and
    prunes what all of that is on average.

    All rounds have the same number of epochs, as many as fit into training: `length`, of which the first `rewound` are
    only trained once.
    """

    def __init__(
        self,
        sparsity: float,
        rate: float = 0.2,
        rewind: Span = 0.0,
        particles: Particles | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(sparsity, Magnitude(), distribution or Global(1e-6), "unstructured", Constant(), targets)
        if not 0 < rate < 1:
            raise InputError(f"rate must lie in (0, 1), a fraction of the remaining weights; got {rate}")
        if sparsity == 0:
            raise InputError("sparsity=0 leaves nothing to prune: it must lie in (0, 1)")
        self.rate, self.rewind, self.particles = rate, rewind, particles or Particles(1, 0)
        self.levels = rounds(sparsity, rate)  # after each pruning
        self._forget()

    def _forget(self) -> None:
        self.length = self.rewound = 0
        self.round = self.particle = self.epoch = 0
        self.ended = False
        self._pruned: Plan = {}  # the sparsity from the step of each pruning on
        self._last: Plan = {}  # the last pruning, as long as it is ahead
        self._ticket: Moment | None = None
        self._mean: Moment | None = None
        self._step = 0

    def lengths(self, total: int) -> tuple[int, int]:
        """The epochs of a round, and to how many of them it is rewound, where all rounds have `total` epochs.

        Raises `InputError` where that is too few.
        """
        if isinstance(self.rewind, int) and self.rewind:
            raise InputError(f'rewind is in epochs ("2ep") or a fraction of a round (0.1), got {self.rewind!r}')
        trainings = self.particles.count * (1 + len(self.levels))
        for length in range(total, 0, -1):
            rewound = Horizon(length, 1).length(self.rewind or 0, "rewind")
            if rewound < length and length + (trainings - 1) * (length - rewound) <= total:
                return length, rewound
        raise InputError(
            f"{len(self.levels)} rounds of pruning to sparsity={self.sparsity} at rate={self.rate} are {trainings} "
            f"trainings from rewind={self.rewind!r} on, which do not fit into {total} epochs: train longer (a training "
            "of n epochs each takes n times as many), rewind to an earlier epoch, or raise the rate"
        )

    @torch.no_grad()
    def attach(self, model: nn.Module, *optimizers: Optimizer, horizon: Horizon | None = None, seed: int = 0) -> None:
        loaded = self._loaded
        fresh = model is not self._model and not loaded
        if fresh:
            self._forget()
        super().attach(model, *optimizers, horizon=horizon, seed=seed)
        if fresh and self.rewound == 0:
            self._ticket = Moment(model)
        if loaded:
            self._place()

    def detach(self) -> None:
        super().detach()
        self._forget()

    def plan(self, horizon: Horizon) -> Plan:
        """What has been pruned so far, and the last pruning."""
        total, per_epoch = whole_epochs(horizon)
        if self.length == 0:  # a run that goes on keeps the lengths it was begun with
            self.length, self.rewound = self.lengths(total)
        before = self.length + (self.particles.count * len(self.levels) - 1) * (self.length - self.rewound)
        self._last = {before * per_epoch: self.sparsity}
        return self._so_far()

    def _so_far(self) -> Plan:
        return self._pruned if self.round == len(self.levels) else {**self._pruned, **self._last}

    def update(self, step: int, optimizer: Optimizer | None = None) -> None:
        """After backward: the gradients of pruned weights are masked. Masks are renewed between epochs only."""
        self._step = max(self._step, step + 1)
        self._upkeep.mask_gradients(self.weights(), self.masks)

    def collect(self, recompute: Callable[[], object] | None = None) -> None:
        """All batches of an epoch are through. Where a round ends, its average becomes the network.

        `recompute` then computes the statistics of batch norms anew, which those of an average are not.
        """
        last = max(1, round(self.particles.averaged * self.length))
        if not self.averages() or self.ended or self.epoch + 1 <= self.length - last:
            return
        assert self.model is not None
        if self._mean is None:
            self._mean = Moment(self.model, 1)
        else:
            self._mean.average(self.model)
        if self.epoch + 1 == self.length and self.particle + 1 == self.particles.count:
            self._mean.restore(self.model)
            self._mean = None
            self.enforce()
            if recompute is not None:
                recompute()

    def averages(self) -> bool:
        """Whether networks are averaged at all."""
        return self.particles.averaged > 0 or self.particles.count > 1

    @torch.no_grad()
    def end_epoch(self) -> bool:
        """An epoch has ended; returns whether the network is now the ticket again."""
        if self.ended:
            return False
        self.epoch += 1
        assert self.model is not None
        if self._ticket is None and self.epoch == self.rewound:
            self._ticket = Moment(self.model)
        if self.epoch < self.length:
            return False
        self.particle = (self.particle + 1) % self.particles.count
        if self.particle == 0:
            self._mean = None
            if self.round == len(self.levels):
                self.ended = True
                return False
            self._prune()
        assert self._ticket is not None
        self._ticket.restore(self.model)
        self.epoch = self.rewound
        self.enforce()
        return True

    def ending(self) -> bool:
        """Whether this epoch is the last one of the last round."""
        last = self.particle + 1 == self.particles.count and self.round == len(self.levels)
        return not self.ended and last and self.epoch + 1 == self.length

    def done(self) -> bool:
        """Whether all rounds have been trained."""
        return self.ended

    def _prune(self) -> None:
        level, step = self.levels[self.round], max(0, self._step - 1)
        self.round += 1
        self._pruned[step] = level
        self._plan = self._so_far()
        self._steps = sorted(self._plan)
        self.renew(self.new_masks(1 - level, step), step)

    def state_dict(self) -> dict[str, Any]:
        """Also where in which round it is, the ticket, and the average so far."""
        moments = {"ticket": self._ticket, "mean": self._mean}
        return {
            **super().state_dict(),
            "round": self.round, "particle": self.particle, "epoch": self.epoch, "ended": self.ended,
            "step": self._step, "pruned": dict(self._pruned), "settings": self._settings(),
            "lengths": [self.length, self.rewound],
            **{name: [each.state_dict(self.model)] if each else [] for name, each in moments.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "ticket" not in state:
            raise InputError(f"the saved state has no rounds, which {type(self).__name__} goes on with: start anew")
        if state["settings"] != self._settings():
            raise InputError(
                f"the saved state is of rounds with {state['settings']}, this run has {self._settings()}: resume with "
                "what it was trained with"
            )
        self.round, self.particle, self.epoch = state["round"], state["particle"], state["epoch"]
        self.ended, self._step, self._pruned = state["ended"], state["step"], dict(state["pruned"])
        self.length, self.rewound = state["lengths"]
        self._ticket, self._mean = (
            next((Moment.from_state(each) for each in state[name]), None) for name in ("ticket", "mean")
        )
        super().load_state_dict(state)
        if self._model is not None:
            self._plan = self._so_far()
            self._steps = sorted(self._plan)
            self._place()

    def _place(self) -> None:
        assert self.model is not None
        for moment in (self._ticket, self._mean):
            if moment is not None:
                moment.place(self.model)

    def _settings(self) -> dict[str, Any]:
        return {
            "rate": self.rate, "rewind": self.rewind,
            "particles": self.particles.count, "averaged": self.particles.averaged,
        }  # fmt: skip
