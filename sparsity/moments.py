"""Moments: the whole state of a network at one time of training, to come back to."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsity import shards
from sparsity.errors import InputError
from sparsity.targets import clean


class Moment:
    """A copy of all parameters and buffers of a model: of the parts that this process holds, on its devices.

    `number` is the caller's, an epoch or a count. Saved states are whole and on the CPU.
    """

    def __init__(self, model: nn.Module | None = None, number: int = 0) -> None:
        self.number = number
        self.tensors = {} if model is None else {n: shards.local(t).detach().clone() for n, t in tensors(model)}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Writes the state back into the model."""
        for name, tensor in tensors(model):
            shards.local(tensor).copy_(self.tensors[name])

    @torch.no_grad()
    def average(self, model: nn.Module) -> None:
        """Takes the model as the next sample of a mean, `number` counting them; what is not floating is the last's."""
        self.number += 1
        for name, tensor in tensors(model):
            mine, new = self.tensors[name], shards.local(tensor)
            if mine.is_floating_point():
                wide = mine.to(torch.promote_types(mine.dtype, torch.float32))
                self.tensors[name] = wide + (new.to(wide.dtype) - wide) / self.number
            else:
                mine.copy_(new)

    def state_dict(self, model: nn.Module | None) -> dict[str, Any]:
        """Tensors and primitives; the model says what is spread over processes, None where it was never placed."""
        found = dict(self.tensors)
        for name, tensor in tensors(model) if model else ():
            if shards.is_spread(tensor):
                found[name] = shards.whole(shards.like(found[name], tensor))
        return {"number": self.number, "tensors": {name: each.cpu().clone() for name, each in found.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Moment":
        """The moment that `state_dict` described; `place` it before use."""
        moment = cls(number=state["number"])
        moment.tensors = dict(state["tensors"])
        return moment

    def place(self, model: nn.Module) -> None:
        """Each tensor on its device; raises `InputError` where they are not this model's."""
        for name, tensor in tensors(model):
            mine = self.tensors.get(name)
            if mine is None or mine.shape != tensor.shape:
                found = "nothing" if mine is None else f"a tensor of shape {tuple(mine.shape)}"
                raise InputError(f"the saved network is another model's: it has {found} for '{name}'")
            self.tensors[name] = shards.local_part(mine.to(tensor.device), tensor).clone()


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name, those that are tied once."""
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            yield clean(name), tensor
