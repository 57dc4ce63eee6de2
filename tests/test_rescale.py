"""`rescaled` gives a sparse network the signals that its initialisation was made for."""

import copy

import pytest
import torch
from torch import nn

from sparsity import InputError, Sparsifier, Targets, rescaled
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
