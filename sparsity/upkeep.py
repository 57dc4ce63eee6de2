"""Upkeep: pruned weights and their optimizer state stay exactly zero, at the least cost."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.weak import TensorWeakRef

from sparsity import shards
from sparsity.compact import Compact
from sparsity.ops import all_finite, keep_

Weights = Mapping[str, Parameter]
KNOWN = (SGD, Adam, AdamW)


class Upkeep:
    """Zeroes what the masks prune in gradients, weights and optimizer state, where something can have changed.

    Where a weight w, its gradient g and its state are zero, a step of SGD, Adam or AdamW leaves all of them zero:

        SGD      d = g + decay w = 0    b = momentum b + (1 - dampening) d = 0    w - lr d  or  w - lr (d + momentum b)
        Adam(W)  m = b1 m + (1 - b1) g = 0    v = b2 v + (1 - b2) g^2 = 0    w (1 - lr decay) - lr m / (sqrt v + eps)

    for finite settings and an eps above zero in the weight's dtype. So a pass over the gradients, before the step, is
    all that such a step costs. After it, a weight is passed over where that reasoning has a gap: another optimizer
    (also a subclass of these, or one that was not attached), a gradient written after it was masked (clipping does
    that, and makes NaN of zeros where the norm is not finite), a weight, state or mask that someone else wrote since
    the last pass. Who wrote is told by torch's version counters. They do not see writes through `.data`, which stay
    until the next `enforce`.

    With `keeps_state` gradients and state are left dense, for methods that grow weights by their momentum, and only
    the weights are zeroed, after each step. A gradient that is not finite is masked all the same: what a pruned weight
    has of it would stay in its momentum for good.
    """

    def __init__(self, *optimizers: Optimizer, keeps_state: bool = False) -> None:
        self.optimizers, self.keeps_state = optimizers, keeps_state
        self._zero: dict[str, list[Seen]] = {}  # what was there when zeros were last in place
        self._masked: dict[str, list[Seen]] = {}  # the gradients and masks of a step that will leave them there

    def steps(self, weight: Parameter) -> bool:
        """Whether an optimizer holds this weight, where there are any."""
        return not self.optimizers or any(weight is each for group in self._groups() for each in group["params"])

    def mask_gradients(self, weights: Weights, masks: Mapping[str, Tensor]) -> None:
        """Before the step: pruned weights get a gradient of exactly zero."""
        self._masked.clear()
        stepped = {id(weight) for group in self._groups() for weight in group["params"]}
        for name, weight in weights.items():
            strided = weight.grad is None or weight.grad.layout == torch.strided
            if weight.grad is not None and strided:
                if self.keeps_state and all_finite(shards.local(weight.grad)):
                    continue
                self._keep(weight.grad, masks[name])
            trusted = strided and not self.keeps_state and id(weight) in stepped and self._leaves_zeros(weight)
            if trusted and _untouched(self._zero.get(name), [weight, masks[name], *self._states(weight)]):
                self._masked[name] = [Seen(weight.grad), Seen(masks[name])]

    def after_step(self, weights: Weights, masks: Mapping[str, Tensor]) -> None:
        """After the step: pruned weights and their state are exactly zero."""
        for name, weight in weights.items():
            if not _untouched(self._masked.pop(name, None), [weight.grad, masks[name]]):
                for tensor in (weight, *self._states(weight)):
                    self._keep(tensor, masks[name])
            self._zero[name] = [Seen(tensor) for tensor in (weight, masks[name], *self._states(weight))]

    def restart(self, weight: Parameter, grown: Tensor, gradient: bool = False) -> None:
        """Newly grown weights and their state become exactly zero, also where state is kept; the gradient if asked."""
        if not grown.count_nonzero():
            return
        gradients = [weight.grad] if gradient and weight.grad is not None else []
        for tensor in (weight, *self._all_states(weight), *gradients):
            self._keep(tensor, ~grown)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Compact):
                optimizer.restart(weight, grown)

    def enforce(self, weights: Weights, masks: Mapping[str, Tensor]) -> None:
        """At any time, whatever was written: pruned weights and their state are exactly zero."""
        self._masked.clear()
        self.after_step(weights, masks)

    def __getstate__(self) -> dict[str, Any]:
        # For copies and other processes: what was seen are weak references, and of these tensors only.
        return {"optimizers": self.optimizers, "keeps_state": self.keeps_state, "_zero": {}, "_masked": {}}

    def _keep(self, tensor: Tensor, mask: Tensor) -> None:
        keep_(shards.local(tensor), shards.local_part(mask, tensor))

    def _states(self, weight: Parameter) -> Iterator[Tensor]:
        """The state that is zero where the weight is pruned."""
        return iter(()) if self.keeps_state else self._all_states(weight)

    def _all_states(self, weight: Parameter) -> Iterator[Tensor]:
        """Every floating state tensor of the weight's shape: momenta, second moments, whatever they are called."""
        for optimizer in self.optimizers:
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                    yield value

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _leaves_zeros(self, weight: Parameter) -> bool:
        """Whether the steps of all optimizers leave zeros of this weight's dtype alone, and versions tell of others."""
        if shards.is_spread(weight):
            return False
        groups = self._groups()
        # torch 2.13's fused SGD moves momentum to other elements in bfloat16 on a CPU.
        whole = weight.dtype in (torch.float32, torch.float64) or not any(group.get("fused") for group in groups)
        tiny = torch.finfo(weight.dtype).tiny
        return (
            all(type(each.inner if isinstance(each, Compact) else each) in KNOWN for each in self.optimizers)
            and all(group.get("eps", 1.0) > tiny for group in groups)
            and whole
        )


class Seen:
    """A tensor, weakly held, and how often it had been written to."""

    def __init__(self, tensor: Tensor | None) -> None:
        # A parameter that something holds weakly cannot be swapped, which moving a DTensor module does.
        self._weak = None if tensor is None or isinstance(tensor, Parameter) else TensorWeakRef(tensor)
        self._held = tensor if self._weak is None else None
        self._version = 0 if tensor is None else tensor._version

    def is_still(self, tensor: Tensor | None) -> bool:
        """Whether it is this tensor, and has not been written to since."""
        mine = self._held if self._weak is None else self._weak()
        return mine is tensor and (tensor is None or self._version == tensor._version)


def _untouched(seen: list[Seen] | None, tensors: list[Tensor | None]) -> bool:
    return seen is not None and len(seen) == len(tensors) and all(map(Seen.is_still, seen, tensors))
