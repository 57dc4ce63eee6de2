"""Scaling: first weights and learning rates that make up for what masks take from each layer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import LBFGS, Optimizer

from sparsity import masks, shards
from sparsity.compact import Compact
from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.ops import keep_

WHAT = ("weights", "both")
REMEDY = "take another optimizer, or scale the weights only (scaled('weights'), --scaled=weights)"
OF_A_PART = ("params", "param_names", "lr", "weight_decay")  # what the parts of a group differ in
Weights = Mapping[str, Parameter]
Group = dict[str, Any]


class Scaling:
    """Lets a network that is sparse from its first step on begin, and learn, like the dense one.

    Weights: random masks of density d leave a neuron d of the inputs that its initialisation counts on; what it gives
    is √d times as large as it should be, and signals fade from layer to layer. So the first weights of a layer are
    divided by √d, after Evci et al., "Gradient flow in sparse neural networks and how lottery tickets win" (AAAI 2022,
    arXiv 2010.03533), who draw each neuron's weights by the inputs that it has; here a layer is scaled as a whole,
    whatever its initialisation was.

    Rates: what a step changes in a neuron's output is a sum over the weights that it has left. At the same rate, and
    with these weights, a layer of density d learns d times as fast as a dense one. So its rate is divided by d, and
    its weight decay multiplied by d (with SGD and AdamW weights then decay as before). After Dey, Bergsma & Hestness,
    "Sparse maximal update parameterization" (NeurIPS 2024, arXiv 2405.15743); here relative to the user's own dense
    network.

    That holds where masks do not know the gradients. With masks that are `moving` it is too much: weights that were
    grown because their gradients are large hold more than the part d of these. A step of plain SGD at rate r lowers the
    loss, to first order, by r times the sum of g^2 over the weights that are kept. So at each step a layer's rate is
    divided by the part that this sum is of the one over all of its weights, or by d where that is more; its weight
    decay is multiplied by the same. Weights that have just grown by a gradient do not take a step by it, and are in
    neither sum. This is ours, and so is taking it for momentum and other optimizers. It is measured on one batch:
    batches of a few samples make it noise.

    The optimizer's groups are parted while it takes a step, by the masks that there are, and are whole again
    afterwards: schedules, logs and checkpoints see the rates that were asked for.
    """

    def __init__(self, what: str = "both", moving: bool = False) -> None:
        if what not in WHAT:
            raise InputError(f"expected one of {', '.join(WHAT)} to scale, got {what!r}")
        self.what, self.moving = what, moving
        self._optimizers: tuple[Optimizer, ...] = ()
        self._handles: list[Any] = []
        self._whole: dict[int, list[tuple[Group, dict[float, Group]]]] = {}
        self._seen: tuple[Masks, dict[str, float]] = {}, {}
        self.kept: dict[str, float] = {}  # what part of the squares of a layer's gradient its mask has

    def check(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Raises `InputError` for optimizers that have one rate for all weights."""
        for optimizer in optimizers if self.what == "both" else ():
            one_rate = isinstance(optimizer, Compact | LBFGS) or hasattr(optimizer, "_sync_param_groups")  # ZeRO's
            if one_rate or not all("lr" in group for group in optimizer.param_groups):
                raise InputError(f"{type(optimizer).__name__} takes no rates by layers: {REMEDY}")

    @torch.no_grad()
    def begin(self, weights: Weights, found: Masks, before: Mapping[str, int]) -> None:
        """First weights of a network, for its first masks.

        Layers that had no more weights `before`, other than zero, than their masks keep, have begun already.
        """
        for name, density in self._densities(found).items():
            if before[name] > density * weights[name].numel():
                weights[name].div_(density**0.5)

    @contextmanager
    def measuring(self, weights: Weights, found: Masks, masked: bool = True) -> Iterator[None]:
        """Around the masking of these weights' gradients, if they are `masked`: what moving masks keep of each."""
        if self.what != "both" or not self.moving:
            yield
            return
        whole = {name: _square(each.grad) for name, each in weights.items() if _has_gradient(each)}
        yield
        if whole:
            kept = [_square(weights[name].grad, None if masked else found[name]) for name in whole]
            self._note(list(whole), torch.stack([_together(kept), _together(list(whole.values()))]), weights)

    def follow(self, optimizers: tuple[Optimizer, ...], present: Callable[[], tuple[Weights, Masks]]) -> None:
        """From now on these optimizers take each step at the rates of the present masks."""
        self.leave()
        if self.what != "both":
            return
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before(present)))
            self._handles.append(optimizer.register_step_post_hook(lambda each, *_: self._join(each, strict=True)))

    def whole(self) -> None:
        """Joins the groups of a step that has failed; the next step would, too."""
        for optimizer in self._optimizers:
            self._join(optimizer)

    def leave(self) -> None:
        """Lets the optimizers be."""
        for handle in self._handles:
            handle.remove()
        self.whole()
        self._handles, self._optimizers, self._seen, self.kept = [], (), ({}, {}), {}

    def _note(self, names: list[str], squares: Tensor, weights: Weights) -> None:
        kept, whole = shards.total(squares, weights)
        # Gradients that are zero everywhere, or not finite, say nothing: momentum then goes on at the rate itself.
        parts = torch.where(whole.isfinite() & (whole > 0), kept / whole, 1.0)
        self.kept.update(zip(names, parts.tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other optimizers, or none.
        return {**vars(self), "_optimizers": (), "_handles": [], "_whole": {}}

    def _before(self, present: Callable[[], tuple[Weights, Masks]]) -> Callable[..., Any]:
        def before(optimizer: Optimizer, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            closure = options.get("closure", args[1] if len(args) > 1 else None)
            if closure is None:
                self._part(optimizer, *present())
                return None

            # Lightning computes gradients, and renews masks, in the closure of the step.
            def then_part() -> Any:
                self._join(optimizer)
                loss = closure()
                self._part(optimizer, *present())
                return loss

            by_name = "closure" in options
            return (args, {**options, "closure": then_part}) if by_name else ((args[0], then_part, *args[2:]), options)

        return before

    def _part(self, optimizer: Optimizer, weights: Weights, found: Masks) -> None:
        self._join(optimizer)  # where a step has failed
        least = 1.0 if self.moving else 0.0  # what has not been measured keeps its rate
        densities = self._densities(found)
        divisors = {id(weights[name]): max(each, self.kept.get(name, least)) for name, each in densities.items()}
        whole = [(group, parted(group, divisors)) for group in optimizer.param_groups]
        self._whole[id(optimizer)] = whole
        optimizer.param_groups[:] = [part for _, parts in whole for part in parts.values()]

    def _join(self, optimizer: Optimizer, strict: bool = False) -> None:
        """Puts the groups back, with what a step has counted in them; raises `InputError` if `strict` and they differ.

        A step that has failed may have counted in some; and a step that calls that of its class above joins twice.
        """
        whole = self._whole.pop(id(optimizer), None)
        if whole is None:
            return
        optimizer.param_groups[:] = [group for group, _ in whole]
        for group, parts in whole:
            if strict:
                _check(group, parts)
            group.update({name: each for name, each in parts.popitem()[1].items() if name not in OF_A_PART})

    def _densities(self, found: Masks) -> dict[str, float]:
        """Those of layers that keep any weight; counted once for the same masks."""
        if self._seen[0] is not found:
            counts = masks.counts(found)
            self._seen = found, {name: counts[name] / mask.numel() for name, mask in found.items() if counts[name]}
        return self._seen[1]


def parted(group: Group, divisors: Mapping[int, float]) -> dict[float, Group]:
    """A group of an optimizer in parts by what their rates are divided by, which is given by the weights' ids."""
    places: dict[float, list[int]] = {} if group["params"] else {1.0: []}
    for place, weight in enumerate(group["params"]):
        places.setdefault(divisors.get(id(weight), 1.0), []).append(place)
    return {divisor: _part(group, each, divisor) for divisor, each in places.items()}


def _has_gradient(weight: Parameter) -> bool:
    return weight.grad is not None and weight.grad.layout == torch.strided


def _square(gradient: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """The sum of a gradient's squares, of this process's part; of what the mask keeps, if there is one."""
    assert gradient is not None
    part = shards.local(gradient)
    if mask is not None:
        part = keep_(part.clone(), shards.local_part(mask, gradient))
    norm: Tensor = torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
    return norm.square()


def _together(numbers: list[Tensor]) -> Tensor:
    return torch.stack([each.to(numbers[0].device) for each in numbers])


def _part(group: Group, places: list[int], divisor: float) -> Group:
    found = {**group, **_rates(group, divisor)}
    for name in {"params", "param_names"} & set(group):
        found[name] = [group[name][place] for place in places]
    return found


def _rates(group: Group, divisor: float) -> Group:
    found = {"lr": group["lr"] / divisor}
    return found | ({"weight_decay": group["weight_decay"] * divisor} if "weight_decay" in group else {})


def _check(group: Group, parts: dict[float, Group]) -> None:
    """Raises `InputError` where a step has left other rates, or something in the groups that differs between parts."""
    for divisor, part in parts.items():
        if any(not _same(part[name], rate) for name, rate in _rates(group, divisor).items()):
            raise InputError(f"the optimizer sets rates itself, and layers have their own: {REMEDY}")
    first, *others = parts.values()
    for name in set(first) - set(OF_A_PART):
        if any(not _same(first[name], other.get(name)) for other in others):
            raise InputError(f"the optimizer keeps {name!r} by groups, of which it has seen several: {REMEDY}")


def _same(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other)) if isinstance(one, torch.Tensor) else bool(one == other)
