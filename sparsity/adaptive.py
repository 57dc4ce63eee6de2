"""Adaptive regularisation: a penalty that grows until pruning costs nothing, then pruning, then fine-tuning."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsity import shards
from sparsity.distributions import Distribution, Global
from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.moments import Moment
from sparsity.ops import all_finite
from sparsity.penalties import HyperSparsity, Penalty
from sparsity.schedules import Constant, Horizon, Plan
from sparsity.scores import Magnitude
from sparsity.stages import Stages, whole_epochs
from sparsity.targets import Targets

WARM_UP, ADAPTIVE, FINE_TUNING = "warm-up", "adaptive", "fine-tuning"
Span = float | str


class Phases:
    """How long the phases last, in epochs ("60ep") or as fractions of training (0.2), to the nearest epoch.

    The phase of regularisation ends by itself, and at the latest when only the fine-tuning is left.

    Args:
        warm_up: dense training without a penalty.
        fine_tune: training of the pruned network.
        window: how many epochs on each side of an epoch its quality is averaged over.
    """

    def __init__(self, warm_up: Span = 0.2, fine_tune: Span = 0.5, window: int = 1) -> None:
        if window < 0:
            raise InputError(f"window counts epochs on each side and must be at least 0, got {window}")
        self.warm_up, self.fine_tune, self.window = warm_up, fine_tune, window

    def epochs(self, total: int) -> tuple[int, int]:
        """The epochs of warm-up and of fine-tuning; raises `InputError` where they do not leave enough."""
        # Counted by Horizon as steps of one epoch each.
        horizon = Horizon(total, 1)
        for name in ("warm_up", "fine_tune"):
            if isinstance(getattr(self, name), int):
                raise InputError(f'{name} is in epochs ("60ep") or a fraction (0.2), got {getattr(self, name)!r}')
        warm_up, fine_tune = horizon.length(self.warm_up, "warm_up"), horizon.length(self.fine_tune, "fine_tune")
        left, least = total - warm_up - fine_tune, 2 * self.window + 1
        if left < least:
            raise InputError(
                f"warm_up={self.warm_up!r} and fine_tune={self.fine_tune!r} take {warm_up} and {fine_tune} of {total} "
                f"epochs and leave {left} for regularisation, which needs at least {least} (2 window + 1): train for "
                f"{warm_up + fine_tune + least} epochs or more, or shorten the phases"
            )
        return warm_up, fine_tune


class Adaptive(Stages):
    """Adaptive Regularized Training: Glandorf, Kaiser & Rosenhahn (ICCVW 2023, arXiv 2308.07163).

    Three phases, of whole epochs. Warm-up is dense. Then the penalty, which grows with every epoch, draws small weights
    to zero; at the end of each epoch the network is judged as it would be pruned. The mean over a window of epochs
    tells how good its middle one was, and the best such network so far is kept. When it is as good pruned as the
    network is dense, it is put in place, pruned, and only its kept weights are trained on. The authors want it to be
    better, which it can never be where the dense network makes no mistake.

        with sparsifier.pruned():       # at the end of each epoch of the phase
            quality = accuracy(model)
        sparsifier.end_epoch(quality, dense=accuracy_while_training)

    Masks, and with them the target, are dense until then. `phase` says where it is; `ends` is the epoch after which the
    fine-tuning is over. The networks of the window and the best one are in the state: up to `window` + 2 models.
    """

    def __init__(
        self,
        sparsity: float,
        penalty: Penalty | None = None,
        phases: Phases | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(sparsity, Magnitude(), distribution or Global(1e-6), "unstructured", Constant(), targets)
        if sparsity == 0:
            raise InputError("sparsity=0 leaves nothing to regularise: it must lie in (0, 1)")
        self.penalty, self.phases = penalty or HyperSparsity(), phases or Phases()
        self._forget()

    def _forget(self) -> None:
        self.phase, self.epochs, self.chosen, self.ends = WARM_UP, 0, -1, -1
        self.reason = ""
        self._warm_up = self._fine_tune = self._last = self._step = 0
        self._qualities: list[float] = []  # of the last epochs, as many as a window has
        self._candidates: list[Moment] = []  # the networks of its second half
        self._best: Moment | None = None
        self._quality = -math.inf  # the mean over the best one's window

    @torch.no_grad()
    def attach(self, model: nn.Module, *optimizers: Optimizer, horizon: Horizon | None = None, seed: int = 0) -> None:
        loaded = self._loaded
        if model is not self._model and not loaded:
            self._forget()
        super().attach(model, *optimizers, horizon=horizon, seed=seed)
        if loaded:
            self._place()
        elif self.phase != FINE_TUNING:
            self.penalty.begin()
            self.penalty.prepare(self.weights(), self.sparsity)  # says so where the penalty has no gradient
            self.penalty.begin()

    def detach(self) -> None:
        super().detach()
        self._forget()

    def plan(self, horizon: Horizon) -> Plan:
        """Pruning when the fine-tuning begins, at the latest."""
        total, per_epoch = whole_epochs(horizon)
        if self._last == 0:  # a run that goes on keeps the lengths it was begun with
            self._warm_up, self._fine_tune = self.phases.epochs(total)
            self._last = total - self._fine_tune
        if self.phase == FINE_TUNING:
            return {self.renewed: self.sparsity}
        if self._warm_up == 0 and self.epochs == 0:
            self.phase = ADAPTIVE
        return {self._last * per_epoch: self.sparsity}

    @torch.no_grad()
    def update(self, step: int, optimizer: Optimizer | None = None) -> None:
        """After backward: the gradient of the penalty is added, or those of pruned weights are masked."""
        self._step = max(self._step, step + 1)
        if self.phase == ADAPTIVE:
            self._regularise(optimizer)
        self._upkeep.mask_gradients(self.weights(), self.masks)

    def _regularise(self, optimizer: Optimizer | None) -> None:
        self.penalty.prepare(self.weights(), self.sparsity)
        strength = self.penalty.at(self.epochs - self._warm_up)
        for weight in self.held(optimizer).values():
            if weight.grad is not None:
                self.penalty.add(shards.local(weight.grad), shards.local(weight.detach()), strength)

    @contextmanager
    def pruned(self) -> Iterator[None]:
        """The model as it is when pruned now, to be judged; afterwards it is as it was before."""
        with torch.no_grad():
            found = self._candidate_masks()
            before = {name: shards.local(weight).clone() for name, weight in self.weights().items()}
            for name, weight in self.weights().items():
                shards.local(weight).masked_fill_(~shards.local_part(found[name], weight), 0)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights().items():
                    shards.local(weight).copy_(before[name])

    def end_epoch(self, pruned: float | None = None, dense: float | None = None) -> None:
        """An epoch has ended: in the phase of regularisation with the quality of the pruned and of the dense network.

        A quality is the better the higher. Where that of the dense network is not finite, because the loss was not, the
        phase ends with the best network so far; raises `InputError` where there is none yet.
        """
        self.epochs += 1
        self.penalty.begin()
        if self.phase == WARM_UP and self.epochs >= self._warm_up:
            self.phase = ADAPTIVE
        elif self.phase == ADAPTIVE:
            self._judge(pruned, dense)

    def finite(self) -> bool:
        """Whether all of the model's parameters are, on all processes."""
        assert self.model is not None
        parameters = list(self.model.parameters())
        return shards.all_agree(all(all_finite(shards.local(each.detach())) for each in parameters), parameters)

    def ending(self) -> bool:
        """Whether this epoch is the last one of the fine-tuning."""
        return self.phase == FINE_TUNING and self.epochs + 1 == self.ends

    def done(self) -> bool:
        """Whether the fine-tuning is over."""
        return self.phase == FINE_TUNING and self.epochs >= self.ends

    def _judge(self, pruned: float | None, dense: float | None) -> None:
        if pruned is None or dense is None:
            raise InputError("end_epoch wants the quality of the pruned and of the dense network in this phase")
        if not math.isfinite(dense):
            self._rescue()
            return
        window = self.phases.window
        assert self.model is not None
        self._qualities = [*self._qualities, pruned][-2 * window - 1 :]
        self._candidates = [*self._candidates, Moment(self.model, self.epochs)][-window - 1 :]
        if len(self._qualities) == 2 * window + 1:
            mean = sum(self._qualities) / len(self._qualities)
            if mean > self._quality:
                self._quality, self._best = mean, self._candidates[0]
        if self._quality >= dense:
            self._prune("pruned, the network was as good as dense")
        elif self.epochs >= self._last:
            self._prune("only the fine-tuning was left")

    def _rescue(self) -> None:
        if not self._candidates:
            raise InputError(
                f"the loss became NaN or infinite in epoch {self.epochs - 1}, in which regularisation began, and there "
                "is no network to go back to: lower the learning rate or the penalty's strength"
            )
        warnings.warn(
            f"the loss became NaN or infinite in epoch {self.epochs - 1}: regularisation ends, and the best network "
            "before that is pruned and fine-tuned",
            stacklevel=2,
        )
        self._best = self._best or self._candidates[-1]
        self._prune("the loss was not finite")

    @torch.no_grad()
    def _prune(self, reason: str) -> None:
        """Puts the best network in place, and prunes it."""
        assert self.model is not None
        assert self._best is not None
        self._best.restore(self.model)
        self.chosen, self.reason = self._best.number, reason
        self._qualities, self._candidates, self._best = [], [], None
        self.phase, self.ends = FINE_TUNING, self.epochs + self._fine_tune
        step = max(0, self._step - 1)  # after which this is
        self._plan, self._steps = {step: self.sparsity}, [step]
        self.renew(self._candidate_masks(), step)

    def _candidate_masks(self) -> Masks:
        return self.new_masks(1 - self.sparsity, self.epochs)

    def state_dict(self) -> dict[str, Any]:
        """Also the phase, and the networks that may yet be chosen."""
        best = [] if self._best is None else [self._best]
        return {
            **super().state_dict(),
            "phase": self.phase, "epochs": self.epochs, "chosen": self.chosen, "ends": self.ends,
            "reason": self.reason, "step": self._step, "quality": self._quality, "qualities": self._qualities,
            "settings": self._settings(), "lengths": [self._warm_up, self._fine_tune, self._last],
            "candidates": [each.state_dict(self.model) for each in self._candidates],
            "best": [each.state_dict(self.model) for each in best],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "settings" not in state:
            raise InputError(f"the saved state has no phases, which {type(self).__name__} goes on with: start anew")
        if state["settings"] != self._settings():
            raise InputError(
                f"the saved state is in its {state['phase']} phase with {state['settings']}, this run has "
                f"{self._settings()}: resume with what it was trained with, or start anew from the weights (--weights)"
            )
        self._forget()
        self.phase, self.epochs, self.chosen, self.ends = (state[k] for k in ("phase", "epochs", "chosen", "ends"))
        self.reason, self._step = state["reason"], state["step"]
        self._warm_up, self._fine_tune, self._last = state["lengths"]
        self._quality, self._qualities = state["quality"], list(state["qualities"])
        self._candidates = [Moment.from_state(each) for each in state["candidates"]]
        self._best = next((Moment.from_state(each) for each in state["best"]), None)
        super().load_state_dict(state)
        if self._model is not None:
            self._plan = {self.renewed: self.sparsity} if self.phase == FINE_TUNING else self._plan
            self._steps = sorted(self._plan)
            self._place()

    def _settings(self) -> dict[str, Any]:
        mine = self.phases
        return {
            "warm_up": mine.warm_up, "fine_tune": mine.fine_tune, "window": mine.window,
            "penalty": type(self.penalty).__name__, "strength": self.penalty.strength, "growth": self.penalty.growth,
        }  # fmt: skip

    def _place(self) -> None:
        assert self.model is not None
        for each in [*self._candidates, *([self._best] if self._best else [])]:
            each.place(self.model)

    def story(self) -> dict[str, Any]:
        """What came of the phases, for the report."""
        return {
            "phase": self.phase, "epochs": self.epochs, "network_of_epoch": self.chosen,
            "fine_tuning_from_epoch": self.ends - self._fine_tune if self.ends > 0 else None, "because": self.reason,
        }  # fmt: skip
