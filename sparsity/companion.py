"""Companion: an optimizer for tensors that belong to weights, such as scores of them, and are no parameters."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from sparsity.errors import InputError

Tensors = Mapping[str, Parameter]


class Companion:
    """Trains the tensor of each weight by an optimizer of the class and the settings of the one that has the weight.

    Args:
        rate: times the learning rate that the weight has at each step.
        weight_decay: of the tensors.
    """

    def __init__(self, rate: float, weight_decay: float) -> None:
        self.rate, self.weight_decay = rate, weight_decay
        self.names: list[str] = []  # the weight of each group
        self._optimizer: Optimizer | None = None
        self._saved: dict[str, Any] = {}  # state that waits for its tensor

    def make(self, tensors: Tensors, weights: Tensors, optimizers: Sequence[Optimizer]) -> None:
        """A new optimizer, with one group per weight that is held and requires a gradient.

        Raises `InputError` where there is none.
        """
        held = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
        self.names = [name for name, each in weights.items() if id(each) in held and each.requires_grad]
        if not self.names:
            raise InputError(
                "no optimizer holds a target weight that requires a gradient, by which its masks are learned: attach "
                "the optimizer too, attach(model, optimizer), and leave requires_grad on; `frozen` keeps the weights"
            )
        owner = held[id(weights[self.names[0]])]
        accepted = inspect.signature(type(owner).__init__).parameters
        settings = {key: value for key, value in owner.defaults.items() if key in accepted}
        settings |= {"weight_decay": self.weight_decay} if "weight_decay" in accepted else {}
        self._optimizer = type(owner)([{"params": [tensors[name]]} for name in self.names], **settings)
        self._restore(tensors, self.names)

    def step(self, tensors: Tensors, weights: Tensors, optimizers: Sequence[Optimizer]) -> None:
        """One step by the learning rates of now, also of weights that the optimizers have been given since."""
        assert self._optimizer is not None
        groups = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
        for name in weights:
            if name not in self.names and id(weights[name]) in groups and weights[name].requires_grad:
                self._optimizer.add_param_group({"params": [tensors[name]]})
                self.names.append(name)
                self._restore(tensors, [name])
        for mine, name in zip(self._optimizer.param_groups, self.names, strict=True):
            if id(weights[name]) in groups:
                mine["lr"] = groups[id(weights[name])]["lr"] * self.rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def skip(self) -> None:
        """Forgets the gradients of a step that was not made."""
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def forget(self) -> None:
        """Neither tensors nor state."""
        self.names, self._optimizer, self._saved = [], None, {}

    def state_dict(self, tensors: Tensors) -> dict[str, Any]:
        """The state of each tensor that has one, by name."""
        states = self._optimizer.state if self._optimizer else {}
        return {name: dict(states[each]) for name, each in tensors.items() if each in states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved state, when next an optimizer is made."""
        self._saved = dict(state)

    def _restore(self, tensors: Tensors, names: list[str]) -> None:
        for name in names:
            saved = self._saved.pop(name, None)
            if saved is not None and self._optimizer is not None:
                settings = self._optimizer.param_groups[0]
                moves = settings.get("fused") or settings.get("capturable")  # the step count too, then
                self._optimizer.state[tensors[name]] = {
                    key: value.to(tensors[name].device if value.ndim or moves else "cpu", copy=True)
                    if torch.is_tensor(value)
                    else value
                    for key, value in saved.items()
                }
