"""`rescaled` and `scaled_rates` give a sparse network the signals and the steps that the dense one was made for."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsity import InputError, Sparsifier, Targets, rescaled, scaled_rates
from sparsity.distributions import ERK, Uniform
from sparsity.scores import Random


def chain(width: int = 400, depth: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=width**-0.5)
    return nn.Sequential(*layers)


def spread(net: nn.Module) -> float:
    torch.manual_seed(1)
    with torch.no_grad():
        return float(net(torch.randn(200, 400)).std())


def test_signals_stay_as_large_as_in_the_dense_network() -> None:
    dense, plain = chain(), chain()
    ours = rescaled(copy.deepcopy(dense), 0.8, Uniform())
    for net in (plain, ours):
        Sparsifier(0.8, Random(), Uniform()).attach(net)
    assert spread(dense) == pytest.approx(1.0, abs=0.1)
    assert spread(plain) == pytest.approx(0.2**3, rel=0.15)  # six layers, each of √0.2
    assert spread(ours) == pytest.approx(1.0, abs=0.15)


def test_each_layer_is_divided_by_the_root_of_its_own_density() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(200, 10))
    before = copy.deepcopy(net.state_dict())
    assert rescaled(net, 0.7) is net
    sparsifier = Sparsifier(0.7, Random(), ERK())
    pruned = copy.deepcopy(net)
    sparsifier.attach(pruned)
    densities = {name: float(mask.double().mean()) for name, mask in sparsifier.masks.items()}
    assert set(densities) == {"0.weight", "2.weight"}
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name] / densities.get(name, 1.0) ** 0.5)


def test_only_targets_are_scaled() -> None:
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    before = copy.deepcopy(net.state_dict())
    rescaled(net, 0.5, targets=Targets(exclude=["1.weight"]))
    after = net.state_dict()
    assert torch.equal(after["1.weight"], before["1.weight"])
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * 2**0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_that_cannot_be_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match="density must lie in"):
        rescaled(chain(8, 1), sparsity)


def step(make: Callable[..., torch.optim.Optimizer], sparsity: float, scaled: bool) -> float:
    """How far one step moves the outputs of a chain, as a root of the mean square."""
    net = chain()
    optimizer = make(net.parameters())
    if sparsity:
        rescaled(net, sparsity, Uniform())
        Sparsifier(sparsity, Random(), Uniform()).attach(net)
    if scaled:
        scaled_rates(optimizer, net, sparsity, Uniform())
    torch.manual_seed(2)
    inputs, wanted = torch.randn(100, 400), torch.randn(100, 400)
    before = net(inputs)
    (before - wanted).square().mean().backward()
    for weight in net.parameters():
        assert weight.grad is not None
        weight.grad *= weight != 0
    optimizer.step()
    with torch.no_grad():
        return float((net(inputs) - before).square().mean().sqrt())


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, 1e-2), "Adam": lambda weights: torch.optim.Adam(weights, 1e-6)
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_moves_outputs_as_far_as_in_the_dense_network(name: str) -> None:
    dense = step(OPTIMIZERS[name], 0.0, False)
    assert step(OPTIMIZERS[name], 0.8, False) == pytest.approx(0.2 * dense, rel=0.15)
    assert step(OPTIMIZERS[name], 0.8, True) == pytest.approx(dense, rel=0.15)


def test_groups_say_their_densities_and_keep_everything_else() -> None:
    net = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 10))
    named = [(name, weight) for name, weight in net.named_parameters() if name != "2.bias"]
    optimizer = torch.optim.SGD(named, 0.1, momentum=0.9, weight_decay=0.01)
    optimizer.add_param_group({"params": [("2.bias", net[2].bias)], "lr": 0.5})
    assert scaled_rates(optimizer, net, 0.8, Uniform()) is optimizer
    found = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert {name: group["density"] for name, group in found.items()} == {
        "0.weight": 0.2, "0.bias": 1.0, "1.weight": 1.0, "1.bias": 1.0, "2.weight": 0.2, "2.bias": 1.0
    }  # fmt: skip
    assert found["0.weight"]["lr"] == pytest.approx(0.5)
    assert found["0.weight"]["weight_decay"] == pytest.approx(0.002)
    assert (found["2.bias"]["lr"], found["0.bias"]["lr"], found["0.bias"]["weight_decay"]) == (0.5, 0.1, 0.01)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    for name, weight in net.named_parameters():
        place = found[name]["param_names"].index(name)
        assert found[name]["params"][place] is weight
    assert len(optimizer.param_groups) == 3


def test_a_second_call_changes_nothing() -> None:
    net = nn.Linear(40, 30)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(2):
        scaled_rates(optimizer, net, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.1, 0.2]


def test_a_schedule_comes_after() -> None:
    net = nn.Linear(40, 30)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(InputError, match="SGD has a schedule already"):
        scaled_rates(optimizer, net, 0.5)
    fresh = scaled_rates(torch.optim.SGD(net.parameters(), 0.1), net, 0.5)
    schedule = torch.optim.lr_scheduler.StepLR(fresh, 1)
    fresh.step()
    schedule.step()
    assert sorted(group["lr"] for group in fresh.param_groups) == pytest.approx([0.01, 0.02])
