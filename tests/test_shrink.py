"""What is taken out of a chain was not needed: the function is the same, the layers are smaller."""

import json
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsity import InputError, Sparsifier
from sparsity.shrink import manifest, shrink, shrunk_like


def same(chain: nn.Sequential, x: Tensor) -> nn.Sequential:
    before = [each.clone() for each in chain.state_dict().values()]
    found = shrink(chain)
    assert isinstance(found, nn.Sequential)
    assert torch.allclose(found.eval()(x), chain.eval()(x), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip(before, chain.state_dict().values(), strict=True))
    assert not {each.data_ptr() for each in found.parameters()} & {each.data_ptr() for each in chain.parameters()}
    return found


def mlp(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self[0](x)
        return found


TWICE = nn.Linear(3, 3)


def masked(layer: nn.Linear) -> nn.Linear:
    prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]  # torch's
    return layer


def weight(chain: nn.Sequential, place: int) -> Tensor:
    return chain.get_parameter(f"{place}.weight")


def widths(chain: nn.Sequential) -> list[int]:
    return [len(layer.weight) for layer in chain.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("middle", [(nn.ReLU(),), (nn.Sigmoid(), nn.BatchNorm1d(8)), (nn.BatchNorm1d(8), nn.GELU())])
def test_neurons_without_inputs_become_biases(middle: tuple[nn.Module, ...]) -> None:
    chain = mlp(*middle)
    for each in middle:
        if isinstance(each, nn.BatchNorm1d):
            for value in (each.running_mean, each.running_var, each.weight, each.bias):
                nn.init.uniform_(value, 0.5, 2)  # type: ignore[arg-type]  # it has them
    with torch.no_grad():
        weight(chain, 0)[[1, 4]] = 0
    assert widths(same(chain, torch.randn(7, 6).double())) == [6, 5, 3]


def test_neurons_that_nobody_looks_at_go_and_those_before_them() -> None:
    chain = mlp(nn.ReLU())
    with torch.no_grad():
        weight(chain, 4)[:, [0, 2]] = 0  # two of five are not looked at
        weight(chain, 2)[[1, 3, 4], :3] = 0  # and of those before, three only by them
    assert widths(same(chain, torch.randn(7, 6).double())) == [5, 3, 3]


def test_dropout_keeps_constants_that_it_would_drop() -> None:
    chain = mlp(nn.Sigmoid(), nn.Dropout())
    with torch.no_grad():
        weight(chain, 0)[[1, 4]] = 0
    assert widths(same(chain, torch.randn(7, 6).double())) == [8, 5, 3]
    with torch.no_grad():
        weight(chain, 3)[:, 4] = 0
    assert widths(same(chain, torch.randn(7, 6).double())) == [7, 5, 3]


def convolutions(padding: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=padding), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(6 * (4 if padding else 1), 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("padding", [0, 1])
def test_channels(padding: int) -> None:
    chain = convolutions(padding)
    norm = chain[1]
    assert isinstance(norm, nn.BatchNorm2d)
    for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        nn.init.uniform_(value, 0.5, 2)  # type: ignore[arg-type]  # it has them
    with torch.no_grad():
        norm.bias[2], norm.bias[5] = -5, 5  # behind ReLU a constant of zero, and one that is not
        weight(chain, 0)[[2, 5]] = 0
        weight(chain, 4)[[0, 1]] = 0
        weight(chain, 8).view(4, 6, -1)[:, 3] = 0
    found = same(chain, torch.randn(3, 2, 12, 12).double())
    # With padding, a constant that is not zero ends at the border, so its channel stays.
    assert widths(found) == [7 if padding else 6, 3, 4]


@pytest.mark.parametrize(("between", "bias"), [
    ([nn.AvgPool2d(2, divisor_override=1)], 1.0), ([nn.AvgPool2d(3, 1, 1), nn.Hardswish()], -4.0),
    ([nn.AvgPool2d(2, ceil_mode=True)], 1.0), ([nn.MaxPool2d(3, 1, 1)], 1.0),
])  # fmt: skip
def test_averages_at_a_border_are_no_constants(between: list[nn.Module], bias: float) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(1, 4, 3), *between, nn.Conv2d(4, 3, 3)).double()
    with torch.no_grad():
        weight(chain, 0)[1] = 0
        chain.get_parameter("0.bias")[1] = bias
    found = same(chain, torch.randn(2, 1, 11, 11).double())
    assert widths(found)[0] == (3 if isinstance(between[0], nn.MaxPool2d) else 4)


def test_a_pruned_network_shrinks() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    chain = chain.double()
    Sparsifier(0.99).attach(chain)
    found = same(chain, torch.randn(5, 1, 8, 8).double())
    assert widths(found)[0] < 300
    assert widths(found)[-1] == 10


def test_a_chain_of_chains_and_one_without_use() -> None:
    chain = nn.Sequential(mlp(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.Linear(3, 2).double()))
    with torch.no_grad():
        chain.get_parameter("1.1.weight").zero_()
    assert widths(same(chain, torch.randn(7, 6).double())) == [1, 1, 1, 2]


def test_what_is_needed_stays() -> None:
    chain = mlp(nn.ReLU())
    assert widths(same(chain, torch.randn(7, 6).double())) == [8, 5, 3]


@pytest.mark.parametrize(("chain", "message"), [
    (nn.Linear(3, 3), "an nn.Sequential is shrunk by itself, got Linear"),
    (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1), nn.Linear(3, 3)), "Softmax is none of them"),
    (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "groups"),
    (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(6, 2)), "not those of the 4 outputs"),
    (nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 2)), "not those of the 4 outputs"),
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 2)), "there is one Flatten"),
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(4, 2)), "other dimensions"),
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2)), "other features than"),
    (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)), "running stat"),
    (nn.Sequential(masked(nn.Linear(3, 4)), nn.Linear(4, 2)), "the weight of '0' is no parameter of its own"),
    (Residual(nn.Linear(3, 3)), "got Residual, which may do more"),
    (nn.Sequential(TWICE, nn.ReLU(), TWICE), "share their weight"),
])  # fmt: skip
def test_what_cannot_be_shrunk_is_refused(chain: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shrink(chain)


def test_what_needs_a_package_that_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r'pip install "lightning-sparsity\[structured\]"'):
        shrink(Residual(nn.Linear(3, 3)), torch.randn(2, 3))


def smaller() -> tuple[nn.Sequential, nn.Module]:
    """A chain of chains, and what it shrinks to, with a bias that was not there before."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    chain = nn.Sequential(inner, nn.Conv2d(8, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        chain.get_parameter("0.0.weight")[[1, 4, 5]] = 0
        chain.get_parameter("0.1.bias").fill_(0.5)
    return chain, same(chain, torch.randn(3, 2, 6, 6).double())


def test_a_manifest_brings_a_dense_model_into_shape() -> None:
    chain, found = smaller()
    shapes = json.loads(json.dumps(manifest(found)))
    rebuilt = shrunk_like(chain, shapes)
    before = {name: each.clone() for name, each in chain.state_dict().items()}
    rebuilt.load_state_dict(found.state_dict())
    assert str(rebuilt) == str(found)
    x = torch.randn(3, 2, 6, 6).double()
    assert torch.equal(rebuilt.eval()(x), found(x))
    assert all(torch.equal(value, before[name]) for name, value in chain.state_dict().items())
    assert all(each.requires_grad for each in rebuilt.parameters())
    assert manifest(rebuilt) == shapes
    assert manifest(shrunk_like(chain, manifest(chain))) == manifest(chain)


@pytest.mark.parametrize(("change", "message"), [
    ({"4": {"weight": [3, 3]}}, r"\['4'\], which Sequential does not"),
    ({"1": {}}, r"'1.weight' has the shape None in the manifest, in the model \[4, 8, 3, 3\]"),
    ({"3": {"weight": [3, 17], "bias": [3], "in_features": 17}}, r"\[3, 17\] in the manifest"),
    ({"3": {"weight": [10**12, 16], "bias": [3]}}, "1000000000000, 16"),
    ({"3": {"weight": [3, -1], "bias": [3]}}, r"\[3, -1\]"), ({"3": {"weight": "x", "bias": [3]}}, "shape x"),
    ({"3": {"weight": [3, 16, 1], "bias": [3]}}, "3, 16, 1"), ({"3": {"weight": [3, True], "bias": [3]}}, "True"),
    ({"3": {"weight": [3, 9], "bias": [3], "in_features": 20, "out_features": 3}}, "in_features=16 in the model"),
    ({"3": {"weight": [3, 9], "bias": [3], "in_features": 9.0, "out_features": 3}}, "in_features=16 in the model"),
    ({"1": {"weight": [4, 5, 3, 3], "bias": [5]}}, r"'1.bias' has the shape \[5\]"), ({"1": [4]}, "a dict of dicts"),
])  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    chain, found = smaller()
    with pytest.raises(InputError, match=message):
        shrunk_like(chain, {**manifest(found), **change})  # type: ignore[dict-item]  # on purpose
