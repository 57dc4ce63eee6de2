"""Compact: an optimizer whose state is as small as the kept weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from sparsity.errors import InputError

Masks = Mapping[str, Tensor]
Weights = Mapping[str, Parameter]
Wanted = Callable[[], tuple[Weights, Masks]]

WORTH = 0.5  # density up to which it pays to gather


class Compact(Optimizer):
    """Any of torch's elementwise optimizers, over kept weights only:

        optimizer = Compact(torch.optim.AdamW(model.parameters(), 1e-3))
        sparsifier.attach(model, optimizer)

    Each step gathers the kept weights and their gradients, lets the optimizer that it was given step them, and puts
    them back: the same trajectory, at a cost in time and memory that goes with the density. Weights without a mask, or
    of which most are kept, are stepped as they are. Where masks move, the state of weights that stay goes with them,
    that of others is dropped, and new ones begin with zeros. Checkpoints are those of the optimizer that it was given,
    dense, in both directions.

    The mean, the norm or the rank of a whole tensor are those of its kept part (LAMB, Adafactor): for those it is
    another optimizer. Schedules, clipping and gradient scalers take this one, and not the one that it was given.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._wanted: dict[int, Wanted] = {}  # by who says it
        self._kept: dict[Parameter, Kept] = {}
        self._seen: dict[Parameter, tuple[Tensor, int]] = {}  # masks, and how often they had been written to
        self._regroup()
        self._share_state()

    def follow(self, wanted: Wanted, by: object = None) -> None:
        """From now on these masks, with their weights, count before each step, in place of others that came `by` it."""
        self._wanted[id(by)] = wanted
        self._refresh()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after the closure where there is one, whose loss is returned."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._refresh()
        for weight, kept in self._kept.items():
            kept.gather(weight)
        _settings(self.param_groups, self.inner.param_groups)
        self.inner.step()
        for weight, kept in self._kept.items():
            kept.scatter(weight)
        _settings(self.inner.param_groups, self.param_groups)  # some count in their groups
        self._share_state()
        return loss

    def restart(self, weight: Parameter, grown: Tensor) -> None:
        """The state of weights that have been dropped and grown again at once becomes zero."""
        if weight in self._kept:
            kept = self._kept[weight]
            again = grown.reshape(-1)[kept.places]
            for value in self.inner.state.get(kept.values, {}).values():
                if _alike(value, kept.values):
                    value.masked_fill_(again, 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if len(self.inner.param_groups) < len(self.param_groups):  # not those that it came with
            self.inner.add_param_group({**param_group, "params": list(self.param_groups[-1]["params"])})

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer that it was given would have it: dense, zero where weights are pruned."""
        self._forget_what_was_cleared()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        found = super().state_dict()
        for place, weight in enumerate(weights):
            if weight in self._kept and place in found["state"]:
                found["state"][place] = self._kept[weight].widened(weight, found["state"][place])
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a dense state, of this class or of the optimizer that it was given."""
        # The masks that belong to it may be loaded later: what they keep is gathered before the next step.
        self._kept, self._seen = {}, {}
        self.inner.state.clear()
        self._regroup()
        self.inner.load_state_dict(state_dict)
        _settings(self.inner.param_groups, self.param_groups)
        self.state.clear()
        self._share_state()

    def __getstate__(self) -> dict[str, Any]:
        raise InputError("a Compact optimizer is not copied or pickled: keep its state_dict")

    def _refresh(self) -> None:
        """Gathers anew what masks keep, where they have changed; what has none any more is dense again."""
        self._forget_what_was_cleared()
        held = {id(weight) for group in self.param_groups for weight in group["params"]}
        masks: dict[Parameter, Tensor] = {}
        for wanted in self._wanted.values():
            weights, found = wanted()
            masks |= {weights[name]: mask for name, mask in found.items() if id(weights[name]) in held}
        changed = [weight for weight, mask in masks.items() if not self._has_seen(weight, mask)]
        changed += [weight for weight in self._kept if weight not in masks]
        for weight in changed:
            state = self._taken(weight)
            self._kept.pop(weight, None)
            mask = masks.get(weight)
            if mask is not None and int(mask.count_nonzero()) <= WORTH * mask.numel():
                self._kept[weight] = Kept(weight, mask)
            self._give(weight, state)
        self._seen = {weight: (mask, mask._version) for weight, mask in masks.items()}
        if changed:
            self._regroup()
            self._share_state()

    def _forget_what_was_cleared(self) -> None:
        """Whoever clears the state of this optimizer clears that of the one that it was given."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight not in self.state:
                    self.inner.state.pop(self._stepped(weight), None)

    def _has_seen(self, weight: Parameter, mask: Tensor) -> bool:
        known, kept = self._seen.get(weight), self._kept.get(weight)
        moved = kept is not None and (kept.values.dtype, kept.values.device) != (weight.dtype, weight.device)
        return known is not None and known[0] is mask and known[1] == mask._version and not moved

    def _stepped(self, weight: Parameter) -> Parameter:
        """What the optimizer that it was given steps for a weight."""
        return self._kept[weight].values if weight in self._kept else weight

    def _taken(self, weight: Parameter) -> dict[str, Any]:
        """The dense state of a weight, out of the optimizer that it was given."""
        state = self.inner.state.pop(self._stepped(weight), {})
        return self._kept[weight].widened(weight, state) if weight in self._kept else state

    def _give(self, weight: Parameter, state: dict[str, Any]) -> None:
        """The state of a weight, dense, to the optimizer that it was given."""
        if state:
            mine = self._kept[weight].narrowed(weight, state) if weight in self._kept else state
            self.inner.state[self._stepped(weight)] = mine

    def _regroup(self) -> None:
        """The optimizer that it was given holds the kept values in place of their weights."""
        self.inner.param_groups = [
            {**group, "params": [self._stepped(weight) for weight in group["params"]]} for group in self.param_groups
        ]

    def _share_state(self) -> None:
        """By weights, as others look for it: their shapes tell that it is compact."""
        for group in self.param_groups:
            for weight in group["params"]:
                if self._stepped(weight) in self.inner.state:
                    self.state[weight] = self.inner.state[self._stepped(weight)]


class Kept:
    """Where a weight's kept values are, and the parameter that is stepped in its place."""

    def __init__(self, weight: Parameter, mask: Tensor) -> None:
        self.mask = mask
        self.places = mask.to(weight.device).reshape(-1).nonzero().squeeze(1)
        self.values = Parameter(weight.detach().reshape(-1)[self.places], weight.requires_grad)

    def gather(self, weight: Parameter) -> None:
        # `take` runs on all cores where `index_select` runs on one.
        torch.take(weight.detach(), self.places, out=self.values.detach())
        if weight.grad is None:
            self.values.grad = None
        elif self.values.grad is None:
            self.values.grad = torch.take(weight.grad, self.places)
        else:
            torch.take(weight.grad, self.places, out=self.values.grad)

    def scatter(self, weight: Parameter) -> None:
        if weight.is_contiguous():
            weight.view(-1).index_copy_(0, self.places, self.values.detach())
        else:
            weight.masked_scatter_(self.mask.to(weight.device), self.values.detach())

    def widened(self, weight: Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state with values for the whole weight."""
        return {name: self._wide(weight, v) if _alike(v, self.values) else v for name, v in state.items()}

    def narrowed(self, weight: Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state with values for what is kept."""
        return {
            name: v.reshape(-1)[self.places].to(self.values.dtype if v.is_floating_point() else v.dtype)
            if _alike(v, weight) else v for name, v in state.items()
        }  # fmt: skip

    def _wide(self, weight: Parameter, value: Tensor) -> Tensor:
        return value.new_zeros(weight.numel()).index_copy_(0, self.places, value).view(weight.shape)


def _alike(value: Any, tensor: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == tensor.shape and value.ndim > 0


def _settings(given: list[dict[str, Any]], taken: list[dict[str, Any]]) -> None:
    """All of the first groups but their weights, into the second."""
    for one, other in zip(given, taken, strict=True):
        other.update({name: value for name, value in one.items() if name != "params"})
