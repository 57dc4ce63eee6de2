"""Federation: who takes part, in which round, with which samples."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from sparsity.errors import InputError
from sparsity.federated.partition import IID, Partition, Parts


class Federation:
    """Clients, rounds, and how the training samples are divided.

    Args:
        clients: how many there are.
        per_round: how many take part in a round, drawn anew each time.
        rounds: how many.
        partition: who holds which samples; `IID()` if not given.
        held_out: the part of each client's samples that it does not train on, by which the final model is measured for
            each client, in [0, 1).
    """

    def __init__(
        self, clients: int = 100, per_round: int = 10, rounds: int = 100, partition: Partition | None = None,
        held_out: float = 0.0,
    ) -> None:  # fmt: skip
        if not 1 <= per_round <= clients:
            raise InputError(f"{per_round=} of {clients=} cannot take part: it must lie in [1, clients]")
        if rounds < 1 or not 0 <= held_out < 1:
            raise InputError(f"expected {rounds=} of at least 1 and {held_out=} in [0, 1)")
        self.clients, self.per_round, self.rounds = clients, per_round, rounds
        self.partition, self.held_out = partition or IID(), held_out

    def chosen(self, number: int, seed: int) -> list[int]:
        """Who takes part in a round, in ascending order; it depends on the seed and the round alone."""
        rng = np.random.default_rng([seed, number])
        return sorted(rng.choice(self.clients, self.per_round, replace=False).tolist())

    def reserve(self, parts: Parts, share: float, seed: int) -> tuple[Tensor, Parts]:
        """The samples that a server takes for itself, at random, and what is left to each client.

        Raises `InputError` where that leaves a client without any.
        """
        everything = torch.cat(parts).sort().values
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(everything)))
        own = everything[order[: max(1, round(share * len(everything))) if share else 0]].sort().values
        rest = [part[~torch.isin(part, own)] for part in parts]
        if not all(map(len, rest)):
            raise InputError(f"the server takes {len(own)} samples and leaves a client none: lower its share")
        return own, rest

    def divide(self, parts: Parts, seed: int) -> tuple[Parts, Parts]:
        """What each client trains on, and what it holds out, at random."""
        train, held = [], []
        for client, part in enumerate(parts):
            rng = np.random.default_rng([seed, client])
            order = torch.from_numpy(rng.permutation(len(part)))
            count = min(len(part) - 1, round(self.held_out * len(part)))
            held.append(part[order[:count]].sort().values)
            train.append(part[order[count:]].sort().values)
        return train, held


def share(chosen: list[int], parts: Parts, workers: int) -> list[list[int]]:
    """The clients of each worker: the largest first, to whoever has the fewest samples so far."""
    found: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for client in sorted(chosen, key=lambda each: (-len(parts[each]), each)):
        least = loads.index(min(loads))
        found[least].append(client)
        loads[least] += len(parts[client])
    return found


def seed_of(seed: int, number: int, client: int) -> int:
    """A seed for a client in a round: 63 bits, whoever runs it and in whatever order."""
    digest = hashlib.sha256(f"{seed}/{number}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fingerprint(parts: Parts) -> str:
    """A hash of a partition."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + _raw(part))
    return digest.hexdigest()[:16]


def _raw(part: Tensor) -> bytes:
    found: bytes = part.numpy().tobytes()
    return found
