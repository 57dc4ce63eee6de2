"""Layout: a model's state as one vector, the weights that have masks first."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsity.errors import InputError
from sparsity.targets import clean

Tensors = dict[str, Tensor]
CONSTANT = 2.0**20  # the largest magnitude that a buffer begins with


class Layout:
    """Which tensors a model shares, and where each lies in a vector of all of them.

    `targets` are the names of the weights that have masks; the rest are all other parameters and the buffers that the
    model's `state_dict` has. `stepped` are what an optimizer holds, all parameters if not given. A parameter that has
    two names is shared once, under its first. Buffers that are not finite to begin with, or beyond `CONSTANT`, such as
    causal masks, stay where they are.

    Raises `InputError` for complex numbers, and where there is nothing to share.
    """

    def __init__(self, model: nn.Module, targets: Iterable[str], stepped: Iterable[Tensor] | None = None) -> None:
        saved = model.state_dict(keep_vars=True).keys()
        found: Tensors = {clean(name): each for name, each in model.named_parameters()}
        found |= {clean(n): buffer for n, buffer in model.named_buffers() if n in saved and not _constant(buffer)}
        if not found:
            raise InputError("the model has no parameters and no buffers: there is nothing to share")
        strange = [name for name, each in found.items() if each.is_complex()]
        if strange:
            raise InputError(f"{strange} are complex, which clients cannot send: keep their parts as two real tensors")
        names = list(targets)
        self.tensors: Tensors = {**{name: found[name] for name in names}}
        self.tensors |= {name: each for name, each in found.items() if name not in self.tensors}
        self.targets = frozenset(names)
        self.sizes = [each.numel() for each in self.tensors.values()]
        self.masked = sum(self.tensors[name].numel() for name in names)  # so many of the first have masks
        self.size = sum(self.sizes)
        self._all = [each.detach() for each in self.tensors.values()]
        alike = all(each.dtype == self._all[0].dtype and each.is_contiguous() for each in self._all)
        self._flat = [each.view(-1) for each in self._all] if alike else []
        self._written: tuple[Tensor, list[Tensor]] | None = None
        # Counters and double precision need a float64 for each; of all else a float32 loses nothing.
        narrow = all(each.is_floating_point() and each.dtype.itemsize <= 4 for each in self.tensors.values())
        self.dtype = torch.float32 if narrow else torch.float64
        trained = {id(each) for each in (model.parameters() if stepped is None else stepped) if each.requires_grad}
        kinds = [torch.full((each.numel(),), id(each) in trained) for each in self.tensors.values()]
        self.learned = torch.cat(kinds)  # bool of [size]: neither buffers nor what is frozen

    @property
    def like(self) -> tuple[Tensors, Tensors]:
        """The model's own tensors: those that have masks, and all others."""
        weights = {name: each for name, each in self.tensors.items() if name in self.targets}
        return weights, {name: each for name, each in self.tensors.items() if name not in weights}

    @property
    def bytes(self) -> int:
        """What all of it takes in the model's dtypes."""
        return sum(each.numel() * each.element_size() for each in self.tensors.values())

    def read(self) -> Tensor:
        """The model's state, of [size] on the CPU, in the layout's dtype."""
        if self._flat:
            return torch.cat(self._flat).cpu().to(self.dtype)
        return self.join(self.tensors)

    def write(self, values: Tensor) -> None:
        """Puts a state into the model, in place; integers are rounded."""
        if self._written is None or self._written[0] is not values:  # all clients of a round begin with the same
            self._written = values, list(self.split(values).values())
        torch._foreach_copy_(self._all, self._written[1])

    def name_at(self, place: int) -> str:
        """The tensor that has this place of the vector."""
        ends = itertools.accumulate(self.sizes)
        return next(name for name, end in zip(self.tensors, ends, strict=True) if place < end)

    def join(self, tensors: Tensors) -> Tensor:
        """Tensors by name as one vector on the CPU; in the layout's order, and only those that it has."""
        parts = [tensors[name].detach().reshape(-1).cpu().to(self.dtype) for name in self.tensors if name in tensors]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype)

    def split(self, values: Tensor) -> Tensors:
        """A vector as tensors of the model's shapes and dtypes, on the CPU."""
        parts = torch.split(values, self.sizes)
        return {name: _as(part, like) for (name, like), part in zip(self.tensors.items(), parts, strict=True)}

    def both(self, values: Tensor) -> tuple[Tensors, Tensors]:
        """A vector as tensors that have masks, and all others."""
        found = self.split(values)
        weights = {name: found.pop(name) for name in list(found)[: len(self.targets)]}
        return weights, found

    def mask(self, masks: Tensors) -> Tensor:
        """Masks as one bool vector of [masked]."""
        parts = [masks[name].reshape(-1).cpu() for name in self.tensors if name in self.targets]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)

    def masks(self, vector: Tensor) -> Tensors:
        """A vector of [masked], of bools or anything else, by name in the weights' shapes."""
        names = [name for name in self.tensors if name in self.targets]
        parts = torch.split(vector, [self.tensors[name].numel() for name in names])
        return {name: part.view(self.tensors[name].shape) for name, part in zip(names, parts, strict=True)}


def _constant(buffer: Tensor) -> bool:
    """Whether a buffer's values are none that anything is counted or averaged in."""
    return buffer.is_floating_point() and not bool((buffer.abs() <= CONSTANT).all())  # NaN compares as False


def _as(part: Tensor, like: Tensor) -> Tensor:
    whole = part if like.is_floating_point() else part.round()
    return whole.to(like.dtype).view(like.shape)
