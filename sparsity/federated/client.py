"""The client: what it does in a round."""

import time
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from sparsity.congruent import Congruent
from sparsity.dynamic import Dynamic
from sparsity.errors import InputError
from sparsity.federated.chance import seed_all
from sparsity.federated.server import Update
from sparsity.federated.site import Site
from sparsity.federated.source import Source
from sparsity.importance import Importance


class Local:
    """How a client trains in a round.

    Args:
        epochs: over its samples.
        adjust_after: epochs until its masks move, where they do in this round; the others train the new masks.
        gradients: batches whose gradients decide what grows; the authors' one.
        proximal: mu of FedProx (Li et al., arXiv 1812.06127): mu / 2 times the squared distance from the weights it
            began with is added to its loss.
        clip: the largest norm of a gradient, none if not given.
    """

    def __init__(
        self, epochs: int = 5, adjust_after: int = 1, gradients: int = 1, proximal: float = 0.0,
        clip: float | None = None,
    ) -> None:  # fmt: skip
        if epochs < 1 or adjust_after < 0 or gradients < 1:
            raise InputError(f"expected {epochs=} and {gradients=} of at least 1 and {adjust_after=} of at least 0")
        if proximal < 0 or (clip is not None and clip <= 0):
            raise InputError(f"expected {proximal=} of at least 0 and {clip=} above 0")
        self.epochs, self.adjust_after, self.gradients = epochs, adjust_after, gradients
        self.proximal, self.clip = proximal, clip


class Task:
    """What the server sends to a client, and what the client has of its own.

    values and mask: of the model. number: the round. moves: whether masks move in it. directions: int8 of [masked], by
    which they do. controls: SCAFFOLD's, the server's and the client's own, float64 of [size].
    """

    def __init__(
        self, values: Tensor, mask: Tensor, number: int, moves: bool = False, directions: Tensor | None = None,
        controls: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.values, self.mask, self.number, self.moves = values, mask, number, moves
        self.directions, self.controls = directions, controls


class Straggler(Exception):
    """A client took too long."""


def client_update(
    site: Site, task: Task, source: Source, indices: Tensor, seed: int, local: Local, timeout: float | None = None
) -> Update:
    """A client's update after its training: its samples are `indices`, its random numbers all come from `seed`.

    Raises `Straggler` where it takes longer than `timeout` seconds.
    """
    end = time.perf_counter() + timeout if timeout is not None else float("inf")
    seed_all(seed)
    order = torch.Generator().manual_seed(seed)
    _receive(site, task)
    pulls = Pulls(site, task, local)
    steps, moved = 0, False
    at_client = isinstance(site.sparsifier, Dynamic) and not isinstance(site.sparsifier, Importance)
    for epoch in range(local.epochs):
        moves = at_client and task.moves and epoch == min(local.adjust_after, local.epochs - 1)
        for batch in source.batches(indices, order):
            if time.perf_counter() > end:
                raise Straggler(f"took longer than {timeout:g} s: {steps} steps, epoch {epoch + 1} of {local.epochs}")
            moved = moved or moves
            others = islice(source.batches(indices, order), local.gradients - 1) if moves else iter(())
            moves = False
            steps += _step(site, chain([batch], others), steps, task.number - (not moved), pulls, local.clip)
    return Update(site.layout.read(), site.mask if moved else task.mask, len(indices), _more(site, task, pulls, steps))


class Pulls:
    """What is added to the gradients of a client: towards the weights it began with, and against its drift."""

    def __init__(self, site: Site, task: Task, local: Local) -> None:
        self.weights, self.begun, self.drift = list[Tensor](), list[Tensor](), list[Tensor]()
        self.proximal = local.proximal
        if not local.proximal and task.controls is None:
            return
        names = [name for name, each in site.layout.tensors.items() if each.requires_grad]
        self.weights = [site.layout.tensors[name] for name in names]
        if local.proximal:
            self.begun = self._of(site, names, task.values)
        if task.controls is not None:
            self.drift = self._of(site, names, within(task.controls[0] - task.controls[1], task.mask))

    @torch.no_grad()
    def add(self) -> None:
        """After backward."""
        if not self.begun and not self.drift:
            return
        for place, weight in enumerate(self.weights):
            if weight.grad is None:
                continue
            if self.begun:
                weight.grad.add_(weight - self.begun[place], alpha=self.proximal)
            if self.drift:
                weight.grad.add_(self.drift[place])

    def _of(self, site: Site, names: list[str], vector: Tensor) -> list[Tensor]:
        found = site.layout.split(vector)
        return [found[name].to(site.layout.tensors[name].device) for name in names]


def _receive(site: Site, task: Task) -> None:
    site.begin()
    site.layout.write(task.values)
    sparsifier = site.sparsifier
    if sparsifier is None:
        return
    masks = {name: mask.to(site.layout.tensors[name].device) for name, mask in site.layout.masks(task.mask).items()}
    if isinstance(sparsifier, Congruent):
        directions = None if task.directions is None else site.layout.masks(task.directions)
        sparsifier.receive(masks, task.number - 1, directions)
    else:
        sparsifier.adopt(masks, task.number - 1)
    if isinstance(sparsifier, Importance):
        sparsifier.collects = task.moves


def _step(site: Site, batches: Iterable[Any], number: int, clock: int, pulls: Pulls, clip: float | None) -> int:
    """One step of the optimizer by the mean of these batches; none, and 0, where `training_step` skips them."""
    taken = 0
    for batch in batches:  # one at a time, as an epoch of graphs may not fit
        loss = site.loss(batch, number)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            taken += 1
    if taken == 0:
        return 0
    if taken > 1:
        gradients = [weight.grad for weight in site.model.parameters() if weight.grad is not None]
        torch._foreach_div_(gradients, taken)
    pulls.add()
    if site.sparsifier is not None:
        site.sparsifier.update(clock)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(site.stepped, clip)
    site.optimizer.step()
    if site.sparsifier is not None:
        site.sparsifier.apply()
    site.clear()
    return 1


def _more(site: Site, task: Task, pulls: Pulls, steps: int) -> dict[str, Tensor]:
    found = {}
    if task.controls is not None:
        found["controls"] = within(_new_control(site, task, steps) - task.controls[1], site.mask)
    if isinstance(site.sparsifier, Importance) and task.moves:
        found["squares"] = site.layout.join(site.sparsifier.mean_squares())
    return found


def _new_control(site: Site, task: Task, steps: int) -> Tensor:
    """SCAFFOLD's option II: the mean gradient that the client went along, without its correction."""
    assert task.controls is not None
    rates = {id(weight): group["lr"] for group in site.optimizer.param_groups for weight in group["params"]}
    lengths = [torch.full((each.numel(),), rates.get(id(each), 0.0)) for each in site.layout.tensors.values()]
    path = torch.cat(lengths).double() * steps
    walked = (task.values - site.layout.read()) / path.clamp_min(1e-30)
    return torch.where(path > 0, walked - task.controls[0] + task.controls[1], task.controls[1])


def within(vector: Tensor, mask: Tensor) -> Tensor:
    """The vector, zero where a weight is pruned."""
    found = vector.clone()
    found[: len(mask)][~mask] = 0.0
    return found
