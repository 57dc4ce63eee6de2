"""Learned masks: dense weights behind sparse ones. Masks follow the weights, or are themselves what is trained."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsity import masks, shards
from sparsity.distributions import Uniform
from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.patterns import NM, parse
from sparsity.relaxation import Relaxation
from sparsity.schedules import Constant, Horizon, Plan
from sparsity.scores import Magnitude
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets

NOTED = 100  # steps between two entries of the history


class Learned(Sparsifier):
    """Trains dense weights through sparse ones. Families override `new_masks`, `relax` and `observe`.

    The model holds the sparse weights, so its forward pass is the plain dense one, whoever looks at it sees the
    pattern, and a checkpoint of it is sparse. The dense weights stand in `dense`, and in this sparsifier's state, and
    are put in their place for the optimizer's step only:

        for step, batch in enumerate(batches):
            sparsifier.relax()        # where training uses more than the masks keep
            loss(model, batch).backward()
            sparsifier.update(step)   # the dense weights; their gradients are those of the sparse ones
            optimizer.step()
            sparsifier.apply()        # new masks, and the sparse weights
            optimizer.zero_grad()

    One copy of the weights is the price. Masks stay the same over an accumulation window. A step that is skipped leaves
    masks and dense weights as they were; one that is taken with a gradient that is not finite moves only what is kept.
    """

    needs_training = True
    keeps_state = True  # the state of all weights is dense, as they are

    def __init__(self, pattern: str | int, targets: Targets | None = None) -> None:
        shape = parse(pattern)
        if not isinstance(shape, NM):
            raise InputError(f'masks are learned for patterns "N:M" and "2:4T", got "{shape.name}"')
        super().__init__(1 - shape.n / shape.m, Magnitude(), Uniform(), pattern, Constant(), targets)
        self.nm = shape
        self.dense: dict[str, Tensor] = {}  # the part of each dense weight that this process holds
        self.step = 0
        self._hidden: dict[str, Tensor] = {}  # what a saved state has of them: the pruned ones
        self._shown = "masked"  # what stands in the model: "masked", "relaxed" or "dense"
        self._next, self._finite = 0, True  # the step after the optimizer's, and whether its gradients are finite
        self._noted: Masks = {}  # the masks at the last entry of the history

    @torch.no_grad()
    def attach(self, model: nn.Module, *optimizers: Optimizer, horizon: Horizon | None = None, seed: int = 0) -> None:
        """As of any method; dense weights are taken from the model, or from the state that was loaded before."""
        again, loaded = model is self._model, self._loaded
        if again and not loaded:
            self._absorb()
            self.step = self._next = 0
        super().attach(model, *optimizers, horizon=horizon, seed=seed)
        if loaded:
            self._unhide()
        else:
            self._renew_masks()

    def detach(self) -> None:
        super().detach()
        self.dense, self._hidden, self._noted = {}, {}, {}
        self.step, self._next, self._shown = 0, 0, "masked"

    def plan(self, horizon: Horizon) -> Plan:
        return {0: self.sparsity}

    def first_masks(self) -> Masks:
        """All weights; the dense ones are those the model has now."""
        self.dense = {name: shards.local(weight.detach()).clone() for name, weight in self.weights().items()}
        self.step, self._next, self._shown = 0, 0, "masked"
        return masks.full(self.weights())

    def renew(self, found: Masks, step: int) -> None:
        """Takes over masks; `attach` shows them."""
        self.masks, self.renewed = found, step

    def check_budget(self) -> None:
        """The pattern is the budget."""

    def relax(self) -> None:
        """Before the forward pass of training: what it uses, where that is more than the masks keep."""

    def observe(self) -> None:
        """Dense weights and the gradients of the sparse ones are there: what a method makes of them."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After backward and before the optimizer's step: dense weights, unless a gradient is not finite."""
        self._next, self._finite = step + 1, self._gradients_are_finite()
        if self._finite:
            self.observe()
            self._show_dense()
        else:  # no NaN must get into the momentum of pruned weights, which would bring it back
            self.settle()
            self._upkeep.mask_gradients(self.weights(), self.masks)

    @torch.no_grad()
    def apply(self) -> None:
        """After the optimizer's step: new masks, and the sparse weights."""
        self._absorb()
        self.step = self._next
        if self._finite:
            self._renew_masks()
        else:  # weights that may be NaN by now have no order
            self._show_masked()

    @torch.no_grad()
    def settle(self) -> None:
        """After a batch: the sparse weights, also where the optimizer's step was skipped."""
        if self._shown == "dense":
            self._absorb()
        if self._shown != "masked":
            self._show_masked()

    @torch.no_grad()
    def enforce(self) -> None:
        """At any time, whoever wrote to the weights: exactly the pattern."""
        self.settle()
        super().enforce()

    def explored(self) -> float:
        """All weights are trained."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Masks, counters, and the dense weights that the masks hide."""
        hidden = {name: self._whole(name)[~self.masks[name]].cpu() for name in self.weights()}
        return {**super().state_dict(), "hidden": hidden, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "hidden" not in state:
            raise InputError(
                f"the saved state has no dense weights, which {type(self).__name__} trains: it is of another method. "
                "Load the checkpoint's weights (--weights) and start anew"
            )
        self._hidden, self.step, self._shown = dict(state["hidden"]), int(state["step"]), "masked"
        self._next = self.step
        super().load_state_dict(state)
        if self._model is not None:
            self._unhide()

    @torch.no_grad()
    def _renew_masks(self) -> None:
        made = max(0, self.step - 1)  # the step that was made; before the first, that one
        due = self._due(made)
        self.renewed = self.renewed if due is None else due
        self.masks = self.new_masks(1 - self.target(made), made)
        self._show_masked()
        if due is not None or self.step % NOTED == 0 or not self._noted:
            self.history.record(self.step, self.masks, self._noted or self.masks, self.explored())
            self._noted = self.masks

    def _show_dense(self) -> None:
        if self._shown == "masked":  # someone else may have written to what is kept
            self._absorb()
        for name, weight in self.weights().items():
            shards.local(weight).copy_(self.dense[name])
        self._shown = "dense"

    def _absorb(self) -> None:
        """The dense weights become those of the model, or what it shows of them."""
        for name, weight in self.weights().items():
            if self._shown == "dense":
                self.dense[name].copy_(shards.local(weight))
            elif self._shown == "masked":
                kept = shards.local_part(self.masks[name], weight)
                torch.where(kept, shards.local(weight), self.dense[name], out=self.dense[name])

    def _show_masked(self) -> None:
        for name, weight in self.weights().items():
            kept, dense = shards.local_part(self.masks[name], weight), self.dense[name]
            torch.where(kept, dense, dense.new_zeros(()), out=shards.local(weight))  # a product would let NaN through
        self._shown = "masked"

    def _whole(self, name: str) -> Tensor:
        """The whole dense weight."""
        weight = self.weights()[name]
        return shards.whole(shards.like(self.dense[name], weight)) if shards.is_spread(weight) else self.dense[name]

    def _unhide(self) -> None:
        """Dense weights from a saved state: the model has those that the masks keep."""
        for name, weight in self.weights().items():
            pruned, hidden = ~self.masks[name], self._hidden.get(name)
            if hidden is None or hidden.numel() != int(pruned.count_nonzero()):
                raise InputError(f"the saved state lacks the pruned weights of '{name}': it is for another model")
            whole = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            whole[pruned] = hidden.to(whole)
            self.dense[name] = shards.local(weight.detach()) + shards.local_part(whole, weight)
        self._hidden, self._noted = {}, self.masks


class StraightThrough(Learned):
    """The largest magnitudes of each group, found anew after every step; gradients go straight through to all weights.

    With `decay`, pruned weights are drawn to zero by decay * w, added to their gradients: SR-STE, Zhou et al.,
    "Learning N:M fine-grained structured sparse neural networks from scratch" (ICLR 2021, arXiv 2102.04010). With a
    `relaxation`, pruned weights take part less and less, or the pattern gets there in frames.
    """

    def __init__(
        self,
        pattern: str | int,
        decay: float = 0.0,
        relaxation: Relaxation | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(pattern, targets)
        if decay < 0:
            raise InputError(f"decay must be 0 or more, got {decay}")
        self.decay, self.relaxation = decay, relaxation or Relaxation()
        self._end = 0

    def plan(self, horizon: Horizon) -> Plan:
        self._end = self.relaxation.resolve(horizon)
        found: Plan = {}
        for step in range(self._end + 1):
            pattern = self.relaxation.pattern(self.nm, step, self._end)
            sparsity = 1 - pattern.n / pattern.m
            if not found or sparsity != found[max(found)]:
                found[step] = sparsity
        return found

    def new_masks(self, density: float, step: int) -> Masks:
        """The best of each group by the dense weights."""
        found = self.relaxation.pattern(self.nm, step, self._end)
        result = {}
        for name, weight in self.weights().items():
            whole = self._whole(name)
            best = _fitting(found, self.nm, self.facing(name, weight).shape[1])
            result[name] = self.facing(name, best.best(self.facing(name, whole).abs())).contiguous()
        return result

    @torch.no_grad()
    def relax(self) -> None:
        """Pruned weights take part by the relaxation's share."""
        share = self.relaxation.share(self.step, self._end)
        if share == 0 or self._shown != "masked":
            return
        self._absorb()
        for name, weight in self.weights().items():
            kept = shards.local_part(self.masks[name], weight)
            shards.local(weight).copy_(torch.where(kept, self.dense[name], self.dense[name] * share))
        self._shown = "relaxed"

    def observe(self) -> None:
        """Adds the decay of pruned weights to their gradients."""
        for name, weight in self.weights().items() if self.decay else ():
            if weight.grad is not None:
                kept = shards.local_part(self.masks[name], weight)
                shards.local(weight.grad).add_(self.dense[name].masked_fill(kept, 0), alpha=self.decay)


def _fitting(pattern: NM, final: NM, inputs: int) -> NM:
    """The pattern, or the largest one between it and the final one that the inputs are a multiple of."""
    n, m = pattern.n, pattern.m
    while inputs % m and m > final.m:
        n, m = n // 2, m // 2
    return pattern if m == pattern.m else final if m == final.m else NM(n, m)
