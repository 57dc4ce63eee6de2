"""Learned masks: dense weights behind sparse ones. Masks follow the weights, or are themselves what is trained."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from sparsity import masks, shards
from sparsity.distributions import Distribution, Uniform
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

    def __init__(
        self, sparsity: float, distribution: Distribution, pattern: str | int, targets: Targets | None = None
    ) -> None:
        super().__init__(sparsity, Magnitude(), distribution, pattern, Constant(), targets)
        self.dense: dict[str, Tensor] = {}  # the part of each dense weight that this process holds
        self.step = 0
        self._hidden: dict[str, Tensor] = {}  # what a saved state has of them: the pruned ones
        self._shown: dict[str, str] = {}  # what stands in the model: "masked", "relaxed" or "dense"
        self._stepping: list[str] = []  # the weights that the optimizer's step is about to move
        self._mover: Optimizer | None = None  # that optimizer, if it is known
        self._next, self._finite = 0, True  # the step after it, and whether its gradients are finite
        self._noted: Masks = {}  # the masks at the last entry of the history
        self._spared: list[tuple[Tensor, Tensor]] = []  # what the optimizer's step must not move, and its values

    @torch.no_grad()
    def attach(self, model: nn.Module, *optimizers: Optimizer, horizon: Horizon | None = None, seed: int = 0) -> None:
        """As of any method; dense weights are taken from the model, or from the state that was loaded before."""
        again, loaded = model is self._model, self._loaded
        if again and not loaded:
            self._place()
            self._absorb(list(self._shown))
            self.step = self._next = 0
        super().attach(model, *optimizers, horizon=horizon, seed=seed)
        if loaded:
            self._unhide()
        else:
            self._renew_masks()

    def detach(self) -> None:
        super().detach()
        self.dense, self._hidden, self._noted, self._shown = {}, {}, {}, {}
        self.step, self._next, self._stepping = 0, 0, []

    def plan(self, horizon: Horizon) -> Plan:
        return {0: self.sparsity}

    def first_masks(self) -> Masks:
        """All weights; the dense ones are those the model has now."""
        self.dense = {name: shards.local(weight.detach()).clone() for name, weight in self.weights().items()}
        self._shown = dict.fromkeys(self.dense, "masked")
        self.step, self._next, self._stepping = 0, 0, []
        return masks.full(self.weights())

    def renew(self, found: Masks, step: int) -> None:
        """Takes over masks; `attach` shows them."""
        self.masks, self.renewed = found, step

    def check_budget(self) -> None:
        """The pattern is the budget."""

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Training goes on at this step."""
        if step != self.step:
            self.step = self._next = step
            self._renew_masks()

    def relax(self) -> None:
        """Before the forward pass of training: what it uses, where that is more than the masks keep."""

    def observe(self, names: list[str]) -> None:
        """The gradients of what is shown of these weights are there: what a method makes of them."""

    @torch.no_grad()
    def update(self, step: int, optimizer: Optimizer | None = None) -> None:
        """After backward and before the optimizer's step: dense weights, unless a gradient is not finite.

        With an optimizer, only of the weights that it holds.
        """
        self._mover = optimizer
        self._stepping = list(self.held(optimizer))
        self._next, self._finite = step + 1, self._gradients_are_finite()
        if self._finite:
            self.observe(self._stepping)
            self._show_dense(self._stepping)
        else:
            self.endure(self._stepping)

    def endure(self, names: list[str]) -> None:
        """Gradients are not finite: no NaN must get into the momentum of pruned weights, which would bring it back."""
        self._show_masked([name for name in names if self._shown[name] != "masked"])
        weights = self.weights()
        self._upkeep.mask_gradients({name: weights[name] for name in names}, self.masks)

    def freeze(self) -> None:
        """No parameter has a gradient, so that the optimizer moves none and needs no state for them."""
        optimizers = self._upkeep.optimizers if self._mover is None else [self._mover]
        every = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        targets = {id(weight) for weight in self.weights().values()}
        for parameter in every:
            parameter.grad = None
        # Torch cannot clip by value where nothing has a gradient, and the checkpoints of FSDP want state for every
        # weight: these have a gradient of zero, and are put back after the step.
        chosen = every if any(map(shards.is_spread, every)) else [min(every, key=torch.Tensor.numel)]
        for parameter in chosen:
            parameter.grad = torch.zeros_like(parameter)
        self._spared = [(each, each.detach().clone()) for each in chosen if id(each) not in targets]

    @torch.no_grad()
    def apply(self) -> None:
        """After the optimizer's step: new masks, and the sparse weights."""
        self._absorb(self._stepping)
        self.step = max(self.step, self._next)
        if self._finite:
            self._renew_masks()
        else:  # weights that may be NaN by now have no order
            self._show_masked(self._stepping)
        self._stepping = []
        for parameter, value in self._spared:
            parameter.copy_(value)
        self._spared = []

    @torch.no_grad()
    def settle(self) -> None:
        """After a batch: the sparse weights, also where the optimizer's step was skipped."""
        self._reshard()
        other = [name for name, shown in self._shown.items() if shown != "masked"]
        self._absorb([name for name in other if self._shown[name] == "dense"])
        self._show_masked(other)

    @torch.no_grad()
    def enforce(self) -> None:
        """At any time, whoever wrote to the weights: exactly the pattern."""
        self.settle()
        super().enforce()

    def explored(self) -> float:
        """All weights are trained."""
        return 1.0

    def stored(self, name: str, value: Tensor) -> Tensor:
        """What a checkpoint has of a weight, also in the middle of a batch: what the masks keep of the dense one."""
        if self._shown.get(name, "masked") == "masked":
            return super().stored(name, value)
        kept = torch.where(self.masks[name], self._passed(name), 0).to(value.dtype)
        return shards.like(shards.local_part(kept, value), value) if shards.is_spread(value) else kept

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
        self._hidden, self.step = dict(state["hidden"]), int(state["step"])
        self._next, self._shown = self.step, dict.fromkeys(self._shown, "masked")
        super().load_state_dict(state)
        if self._model is not None:
            self._unhide()

    @torch.no_grad()
    def _renew_masks(self) -> None:
        made = max(0, self.step - 1)  # the step that was made; before the first, that one
        due = self._due(made)
        self.renewed = self.renewed if due is None else due
        found = self.new_masks(1 - self.target(made), made)
        # Those that another optimizer has yet to move are still in use.
        ready = [name for name, shown in self._shown.items() if shown != "relaxed"]
        self.masks = {**self.masks, **{name: found[name] for name in ready}}
        self._show_masked(ready)
        if due is not None or self.step % NOTED == 0 or not self._noted:
            self.history.record(self.step, self.masks, self._noted or self.masks, self.explored())
            self._noted = self.masks

    def _show_dense(self, names: list[str]) -> None:
        # Someone else may have written to what is kept.
        self._absorb([name for name in names if self._shown[name] == "masked"])
        for name, weight in self._some(names):
            shards.local(weight).copy_(self.dense[name])
            self._shown[name] = "dense"

    def _absorb(self, names: list[str]) -> None:
        """The dense weights become those of the model, or what it shows of them."""
        for name, weight in self._some(names):
            if self._shown[name] == "dense":
                self.dense[name].copy_(shards.local(weight))
            elif self._shown[name] == "masked":
                kept = shards.local_part(self.masks[name], weight)
                torch.where(kept, shards.local(weight), self.dense[name], out=self.dense[name])

    def _show_masked(self, names: list[str]) -> None:
        for name, weight in self._some(names):
            kept, dense = shards.local_part(self.masks[name], weight), self._passed_part(name, weight)
            torch.where(kept, dense, dense.new_zeros(()), out=shards.local(weight))  # a product would let NaN through
            self._shown[name] = "masked"

    def _passed_part(self, name: str, weight: Parameter) -> Tensor:
        """What a mask lets through: the dense weight, of which this process holds a part."""
        return self.dense[name]

    def _passed(self, name: str) -> Tensor:
        weight = self.weights()[name]
        part = self._passed_part(name, weight)
        return shards.whole(shards.like(part, weight)) if shards.is_spread(weight) else part

    def _some(self, names: list[str]) -> list[tuple[str, Parameter]]:
        weights = self.weights()
        return [(name, weights[name]) for name in names]

    def _whole(self, name: str) -> Tensor:
        """The whole dense weight."""
        weight = self.weights()[name]
        return shards.whole(shards.like(self.dense[name], weight)) if shards.is_spread(weight) else self.dense[name]

    def _place(self) -> None:
        """Dense weights and masks on the devices where the model's are now."""
        for name, weight in self.weights().items():
            self.dense[name] = self.dense[name].to(weight.device)
            self.masks[name] = self.masks[name].to(weight.device)

    def _unhide(self) -> None:
        """Dense weights from a saved state: the model has those that the masks keep."""
        for name, weight in self.weights().items():
            pruned, hidden = ~self.masks[name], self._hidden.get(name)
            if hidden is None or hidden.numel() != int(pruned.count_nonzero()):
                raise InputError(f"the saved state lacks the pruned weights of '{name}': it is for another model")
            whole = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            whole[pruned] = hidden.to(whole)
            part = shards.local_part(whole, weight)
            self.dense[name] = torch.where(shards.local_part(pruned, weight), part, shards.local(weight.detach()))
        self._shown = dict.fromkeys(self.dense, "masked")
        self._hidden, self._noted = {}, self.masks


def learnable(pattern: str | int) -> NM:
    """The N:M pattern; raises `InputError` for any other."""
    shape = parse(pattern)
    if not isinstance(shape, NM):
        raise InputError(f'masks are learned for patterns "N:M" and "2:4T", got "{shape.name}"')
    return shape


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
        self.nm = learnable(pattern)
        super().__init__(1 - self.nm.n / self.nm.m, Uniform(), pattern, targets)
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
        names = [name for name, shown in self._shown.items() if shown == "masked"] if share else []
        self._reshard()
        self._absorb(names)
        for name, weight in self._some(names):
            kept = shards.local_part(self.masks[name], weight)
            shards.local(weight).copy_(torch.where(kept, self.dense[name], self.dense[name] * share))
            self._shown[name] = "relaxed"

    def observe(self, names: list[str]) -> None:
        """Adds the decay of pruned weights to their gradients."""
        for name, weight in self._some(names) if self.decay else ():
            if weight.grad is not None:
                kept = shards.local_part(self.masks[name], weight)
                shards.local(weight.grad).add_(self.dense[name].masked_fill(kept, 0), alpha=self.decay)


def _fitting(pattern: NM, final: NM, inputs: int) -> NM:
    """The pattern, or the largest one between it and the final one that the inputs are a multiple of."""
    n, m = pattern.n, pattern.m
    while inputs % m and m > final.m:
        n, m = n // 2, m // 2
    return pattern if m == pattern.m else final if m == final.m else NM(n, m)
