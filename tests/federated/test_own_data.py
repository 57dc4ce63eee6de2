"""Clients with data of their own: the federation comes to what it comes to where all samples are in one data set."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from callbacks import FedSGC
from sparsity import InputError
from sparsity.congruent import Congruity
from sparsity.federated import Federation, FedLAW, Local, OwnData, Protocol, Running, simulate
from sparsity.federated.client import client_update
from sparsity.federated.coordinator import Coordinator, blank
from sparsity.federated.partition import ById
from sparsity.federated.site import Site
from sparsity.federated.source import Source
from tests.federated.small import Points, drops, model

SIZES = [80, 40, 120]
ROUNDS, SEED = 5, 3


class Own(Points):
    """A client's part of the points; the splits for validation and test are the same everywhere."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def train_dataloader(self) -> Any:
        return self._loader(self.begin, self.end)


def method() -> FedSGC:
    return FedSGC(0.6, Congruity(0.5), drops())


def machine(data: Points) -> Coordinator:
    """What the server and every node make of the same plan, each of its own data."""
    site = Site(model(), method().sparsifier, ROUNDS, SEED)
    federation = Federation(len(SIZES), 2, ROUNDS, OwnData(SIZES))
    return Coordinator(site, Source(data, torch.device("cpu")), federation, Protocol(Local(2)), SEED)


def test_data_apart_and_data_together_come_to_the_same() -> None:
    server = machine(Own(0, 7))
    nodes = [machine(Own(*ends)) for ends in pairwise(accumulate(SIZES, initial=0))]
    while server.number < ROUNDS:
        sums, notes = server.sums(), []
        for client in server.chosen():
            node, seed = nodes[client], server.seed_of(client)
            node.site.reach(server.number)
            messages, task = server.outgoing(client)
            update = client_update(node.site, task, node.source, node.trained[client], seed, node.protocol.local)
            sums.add(server.incoming(client, server.wire.answer(update, task), task))
            notes.append(blank(client, messages))
        server.close(sums, {}, notes)
    owners = [client for client, size in enumerate(SIZES) for _ in range(size)]
    federation = Federation(len(SIZES), 2, ROUNDS, ById(owners))
    together = simulate(model(), Points(), method(), federation, Protocol(Local(2)), Running(), seed=SEED)
    assert torch.equal(server.state.values, together.state.values)
    assert torch.equal(server.state.mask, together.state.mask)


def test_one_machine_does_not_simulate_it() -> None:
    with pytest.raises(InputError, match=r"OwnData: clients have data of their own.*FLOWER.md"):
        simulate(model(), Points(), None, Federation(3, 2, 2, OwnData(SIZES)))


def test_the_server_has_none_of_their_samples() -> None:
    site, source = Site(model(), None, 2, 0), Source(Points(), torch.device("cpu"))
    for federation, protocol in (
        (Federation(3, 2, 2, OwnData(SIZES), held_out=0.1), Protocol()),
        (Federation(3, 2, 2, OwnData(SIZES)), Protocol(server=FedLAW())),
    ):
        with pytest.raises(InputError, match="keep their data to themselves"):
            Coordinator(site, source, federation, protocol, 0)


@pytest.mark.parametrize("samples", [[3, 0], [3.5, 4], [True, 4], 80, "80"])
def test_counts_that_cannot_be(samples: Any) -> None:
    with pytest.raises(InputError, match="a whole number for each client, at least one, got"):
        OwnData(samples)


def test_counts_of_other_clients() -> None:
    with pytest.raises(InputError, match=r"samples=\[3, 4\] are those of 2 clients, there are clients=3"):
        OwnData([3, 4])(torch.zeros(7), 3)
