"""Scaled weights and rates in a federation: the same clients, at other rates."""

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import FedSGC, StaticMask
from sparsity import InputError
from sparsity.congruent import Congruity
from sparsity.distributions import Uniform
from sparsity.federated import IID, SCAFFOLD, Federation, Local, Protocol, Running, simulate
from tests.federated.small import Model, Points, drops, model


def method() -> FedSGC:
    return FedSGC(0.6, Congruity(0.5), drops()).scaled()


def test_any_number_of_workers_comes_to_the_same() -> None:
    federation, protocol = Federation(6, 4, 5, IID()), Protocol(Local(2))
    one, two = (
        simulate(model(), Points(), method(), federation, protocol, Running(workers), seed=3) for workers in (1, 2)
    )
    assert torch.equal(one.state.values, two.state.values)
    plain = method()
    plain.sparsifier.scaling = None
    assert not torch.equal(
        one.state.values, simulate(model(), Points(), plain, federation, protocol, seed=3).state.values
    )


def test_one_step_of_one_client_is_as_far_as_its_rates_say() -> None:
    # All samples in one batch, one step of plain SGD: the step of scaled rates is 1 / density of the other.
    found = {}
    for what in ("weights", "both"):
        begun, net = model(norm=False), model(norm=False)
        fresh, sparse = (StaticMask(0.6, Uniform()).scaled(what) for _ in range(2))
        fresh.sparsifier.attach(begun, seed=3)
        simulate(net, Points(batch_size=240), sparse, Federation(1, 1, 1), Protocol(Local(1)), seed=3)
        pairs = zip(net.named_parameters(), begun.parameters(), strict=True)
        found[what] = {name: (end - start).detach() for (name, end), start in pairs}
    masks = fresh.sparsifier.masks
    assert masks
    for name, change in found["both"].items():
        factor = masks[name].numel() / int(masks[name].count_nonzero()) if name in masks else 1.0
        torch.testing.assert_close(change, found["weights"][name] * factor, rtol=1e-3, atol=1e-6)


def test_a_run_goes_on_with_what_it_began(tmp_path: Path) -> None:
    federation = Federation(6, 4, 3, IID())
    simulate(model(), Points(), method(), federation, running=Running(folder=tmp_path), seed=3)
    plain = method()
    plain.sparsifier.scaling = None
    with pytest.raises(InputError, match=r"'method\.scaled': 'both'.*'method\.scaled': None"):
        simulate(model(), Points(), plain, federation, running=Running(resume=tmp_path), seed=3)


class Once(torch.optim.SGD):
    """One of its steps fails."""

    left = 9

    def step(self, closure: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            raise ArithmeticError("once only")
        return super().step(closure)


class Failing(Model):
    def configure_optimizers(self) -> Any:
        return Once(self.parameters(), 0.1)


def test_a_step_that_fails_costs_one_client() -> None:
    torch.manual_seed(0)
    net = Failing()
    outcome = simulate(net, Points(), StaticMask(0.6).scaled(), Federation(6, 4, 4, IID()), seed=3)
    assert [row["failures"] for row in outcome.rows] == [1, 0, 0, 0]


def test_a_second_federation_goes_on_with_the_weights_of_the_first() -> None:
    net, norms = model(), []
    for _ in range(2):
        simulate(net, Points(), StaticMask(0.6).scaled(), Federation(6, 2, 1, IID()), Protocol(Local(1)), seed=3)
        norms.append(net.middle.weight.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2)  # a second division by √0.4 would be 1.58


def test_scaffold_takes_one_rate() -> None:
    protocol = Protocol(Local(2), SCAFFOLD())
    with pytest.raises(InputError, match="SCAFFOLD takes one rate for all weights"):
        simulate(model(), Points(), method(), Federation(6, 4, 3), protocol)
    weights = FedSGC(0.6, Congruity(0.5), drops()).scaled("weights")
    simulate(model(), Points(), weights, Federation(6, 4, 3), protocol)
