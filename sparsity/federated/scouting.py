"""Scouting: some clients find out how dense each layer should be, before the first round."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity import masks
from sparsity.distributions import PerLayer
from sparsity.errors import InputError
from sparsity.federated import payload
from sparsity.federated.chance import seed_all
from sparsity.federated.client import Task
from sparsity.federated.crew import Crew
from sparsity.federated.federation import seed_of
from sparsity.federated.partition import Parts
from sparsity.federated.payload import Payload
from sparsity.federated.site import Site
from sparsity.federated.source import Source
from sparsity.federated.wire import Wire
from sparsity.schedules import Constant, Horizon
from sparsity.scores import Random
from sparsity.sensitivity import Sensitivity
from sparsity.sparsifier import Sparsifier

BEFORE = 2**32 - 1  # the round that scouts' random numbers are of


def scouted(site: Site, source: Source, parts: Parts, seed: int, crew: Crew) -> dict[str, Any]:
    """The densities of layers that scouts agree on, and what that took; the model is as it was before.

    Raises `InputError` where no scout gets through.
    """
    method = site.sparsifier
    assert isinstance(method, Sensitivity)
    clients = _scouts(method, len(parts), seed)
    names, sizes = list(method.masks), [mask.numel() for mask in method.masks.values()]
    total, sent = torch.zeros(len(names), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    failures: list[str] = []
    for client in clients[crew.rank :: crew.count]:
        try:
            counts = _counts(site, method, source, parts[client], seed_of(seed, BEFORE, client))
            total += counts
            sent += len(payload.encode(Payload({}, {}, None, dict(zip(names, counts.tolist(), strict=True))), {}))
        except Exception as error:  # whatever it is, the others go on
            failures.append(f"client {client}: {type(error).__name__}: {error}")
    crew.add([total, sent])
    failures = crew.gather(failures)
    if len(failures) == len(clients):
        raise InputError(f"all {len(clients)} scouts failed, the first: {failures[0]}")
    answers = len(clients) - len(failures)
    densities = {n: count / size / answers for n, count, size in zip(names, total.tolist(), sizes, strict=True)}
    site.restart()
    whole = Task(site.layout.read(), torch.ones(site.layout.masked, dtype=torch.bool), 0)
    received = sum(map(len, Wire(site.layout).send(whole, None)))  # scouts draw their first masks themselves
    return {
        "clients": clients, "failures": failures, "densities": densities, "bytes_up": int(sent),
        "bytes_down": received * len(clients),
    }  # fmt: skip


def fixed(method: Sensitivity, densities: dict[str, float]) -> Sparsifier:
    """A method with random masks of these densities, which never move."""
    sparsities = {name: 1 - density for name, density in densities.items()}
    return Sparsifier(method.sparsity, Random(), PerLayer(sparsities), "unstructured", Constant(), method.targets)


def _scouts(method: Sensitivity, clients: int, seed: int) -> list[int]:
    rng = np.random.default_rng([seed, BEFORE])
    return sorted(rng.choice(clients, max(1, round(method.scouts * clients)), replace=False).tolist())


def _counts(site: Site, method: Sensitivity, source: Source, indices: Tensor, seed: int) -> Tensor:
    """How many weights each layer has after a scout's training, int64."""
    seed_all(seed)
    order = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(indices) / source.batch_size)
    site.restart()
    site.begin()
    method.detach()
    method.attach(site.model, site.optimizer, horizon=Horizon(method.epochs * per_epoch, per_epoch), seed=seed)
    step = 0
    for _ in range(method.epochs):
        for batch in source.batches(indices, order):
            loss = site.loss(batch, step)
            if loss is None:
                continue
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            method.update(step)
            site.optimizer.step()
            method.apply()
            site.optimizer.zero_grad()
            step += 1
    return torch.tensor(list(masks.counts(method.masks).values()))
