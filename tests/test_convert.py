"""Layers of kept weights: what they compute, train, save, and what they come back as."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsity import InputError, Sparsifier, convert
from sparsity.convert import (
    BitmapLinear,
    BlockSparseLinear,
    Form,
    SemiSparseLinear,
    ShrunkLinear,
    SparseLinear,
    kernels,
    to_dense,
    to_semi_sparse,
    to_sparse,
)  # fmt: skip
from sparsity.learned import StraightThrough
from sparsity.models import GPT, LeNet300100
from sparsity.patterns import nm_mask


def pruned(sparsity: float = 0.9) -> tuple[nn.Module, Sparsifier]:
    torch.manual_seed(0)
    net = LeNet300100()
    sparsifier = Sparsifier(sparsity)
    sparsifier.attach(net)
    return net, sparsifier


forms = pytest.mark.parametrize("form", [SparseLinear, BitmapLinear, ShrunkLinear])


def layers(module: nn.Module) -> list[SparseLinear]:
    return [layer for layer in module.modules() if isinstance(layer, SparseLinear)]


def test_it_computes_the_same() -> None:
    net, _ = pruned()
    found = to_sparse(net)
    assert layers(found)
    assert isinstance(found.fc3, nn.Linear), "the last layer is denser"
    x = torch.randn(7, 1, 28, 28)
    assert torch.allclose(found(x), net(x), atol=1e-5)


def test_it_comes_back_to_the_bit() -> None:
    net, _ = pruned()
    found = to_dense(to_sparse(net))
    assert [type(layer) for layer in found.modules()] == [type(layer) for layer in net.modules()]
    assert found.state_dict().keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_the_original_stays_as_it_was() -> None:
    net, _ = pruned()
    before = copy.deepcopy(net.state_dict())
    found = to_sparse(net, density=1.0)
    for layer in layers(found):
        nn.init.zeros_(layer.values)
    to_dense(found)
    assert not layers(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not {each.data_ptr() for each in found.parameters()} & {each.data_ptr() for each in net.parameters()}


@forms
def test_training_is_that_of_the_masked_network(form: Form) -> None:
    net, sparsifier = pruned()
    net = net.double()
    found = to_sparse(net, sparsifier.masks, forms={"fc1": form, "fc2": form, "fc3": SparseLinear})
    runs = []
    for model in (net, found):
        torch.manual_seed(1)
        adam = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(20):
            x, y = torch.randn(16, 1, 28, 28, dtype=torch.float64), torch.randint(0, 10, (16,))
            torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
            if model is net:
                for name, weight in sparsifier.weights().items():
                    assert weight.grad is not None
                    weight.grad.mul_(sparsifier.masks[name])
            adam.step()
            adam.zero_grad()
        runs.append(adam)
    assert all(
        torch.allclose(one, other) for one, other in zip(net.parameters(), to_dense(found).parameters(), strict=True)
    )
    sizes = [sum(s["exp_avg"].numel() for s in adam.state.values()) for adam in runs]
    assert sizes[1] < (1 if form is ShrunkLinear else 0.15) * sizes[0]


def test_kept_weights_that_are_zero_train_when_masks_say_so() -> None:
    net = nn.Linear(8, 4, bias=False)
    nn.init.zeros_(net.weight)
    mask = torch.rand(4, 8) < 0.25
    found = to_sparse(net, {"weight": mask}, density=1.0)
    assert isinstance(found, SparseLinear)
    found(torch.ones(2, 8)).sum().backward()
    assert found.values.grad is not None
    assert len(found.values.grad) == int(mask.sum())
    assert found.density == int(mask.sum()) / 32


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_blocks_are_kept_as_blocks(side: int) -> None:
    torch.manual_seed(0)
    net = nn.Linear(384, 256)
    cells = torch.zeros(256 // side, 384 // side, dtype=torch.bool)
    cells[0, 1] = cells[1, 0] = True
    mask = cells.repeat_interleave(side, 0).repeat_interleave(side, 1)
    with torch.no_grad():
        net.weight.mul_(mask)
    found = to_sparse(net, density=1.0)
    assert isinstance(found, BlockSparseLinear)
    assert found.values.shape[1:] == (side, side)
    x = torch.randn(5, 384)
    assert torch.allclose(found(x), net(x), atol=1e-5)
    found(x).sum().backward()
    assert found.values.grad is not None
    back = to_dense(found)
    assert isinstance(back, nn.Linear)
    assert torch.equal(back.weight, net.weight)


def test_blocks_that_mostly_lie_beyond_the_weight_are_not_taken() -> None:
    found = to_sparse(nn.Linear(130, 130), density=1.0)
    assert isinstance(found, BlockSparseLinear)
    assert found.values.numel() <= 1.25 * 130 * 130
    assert found.density == 1.0
    assert isinstance(to_sparse(nn.Linear(5, 3), density=1.0), SparseLinear)


@forms
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_every_form_computes_the_same_and_comes_back_to_the_bit(form: Form, bias: bool, kept: float) -> None:
    torch.manual_seed(0)
    net = nn.Linear(20, 12, bias, dtype=torch.float64)
    mask = torch.rand(12, 20) < kept
    if 0 < kept < 1:
        mask[3:5], mask[:, [0, 7]] = False, False
        mask[5:8, 3:6] = True
    with torch.no_grad():
        net.weight.mul_(mask)
    if bias:
        net.bias.requires_grad_(False)  # what is frozen stays so
    found = to_sparse(net, {"weight": mask}, forms={"": form})
    assert type(found) is form
    assert found.density == int(mask.sum()) / 240
    for batch in ((), (5,), (2, 3)):
        x = torch.randn(*batch, 20, dtype=torch.float64, requires_grad=True)
        runs = []
        for model in (net, found):
            y = model(x)
            runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        for one, other in zip(*runs, strict=True):
            assert torch.allclose(one, other)
    back = to_dense(found)
    assert isinstance(back, nn.Linear)
    assert torch.equal(back.weight, net.weight)
    assert bias == (back.bias is not None)
    assert not bias or (torch.equal(back.bias, net.bias) and not back.bias.requires_grad)


def test_shrunk_layers_are_small_and_keep_what_is_pruned_within_at_zero() -> None:
    net = nn.Linear(20, 12)
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[2:6, 5:15] = True
    mask[3, 7] = False
    found = to_sparse(net, {"weight": mask}, forms={"": ShrunkLinear})
    assert isinstance(found, ShrunkLinear)
    assert found.values.shape == (4, 10)
    adam = torch.optim.AdamW(found.parameters(), 0.1)
    for _ in range(3):
        found(torch.randn(8, 20)).square().sum().backward()
        adam.step()
    assert int((found.weight != 0).sum()) == int(mask.sum())
    assert not found.weight[~mask].any()


def test_shrunk_layers_under_autocast() -> None:
    net = nn.Linear(20, 12)
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[2:6, 5:15] = True
    found = to_sparse(net, {"weight": mask}, forms={"": ShrunkLinear})
    x = torch.randn(3, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = found(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), nn.functional.linear(x, net.weight * mask, net.bias), atol=0.05)


def test_forms_by_name() -> None:
    net, sparsifier = pruned()
    found = to_sparse(net, sparsifier.masks, forms={"fc1": BitmapLinear, "fc3": ShrunkLinear})
    assert [type(each) for each in (found.fc1, found.fc2, found.fc3)] == [BitmapLinear, nn.Linear, ShrunkLinear]
    x = torch.randn(7, 1, 28, 28)
    assert torch.allclose(found(x), net(x), atol=1e-5)
    assert to_dense(found).state_dict().keys() == net.state_dict().keys()


def test_forms_that_do_not_fit_are_refused() -> None:
    net, sparsifier = pruned()
    with pytest.raises(InputError, match=r"forms name 'fc9', which is none of the linear layers: fc1, fc2, fc3"):
        to_sparse(net, forms={"fc9": BitmapLinear})
    with pytest.raises(ValueError, match="in part: prune by blocks"):
        to_sparse(net, sparsifier.masks, forms={"fc1": BlockSparseLinear})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    net, _ = pruned()
    found = to_sparse(net)
    torch.save(found.state_dict(), tmp_path / "sparse.pt")
    other = to_sparse(net)
    for layer in layers(other):
        nn.init.ones_(layer.values)
    other.load_state_dict(torch.load(tmp_path / "sparse.pt", weights_only=True))
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(other(x), found(x))
    size = sum(each.numel() * each.element_size() for each in found.state_dict().values())
    assert size < 0.25 * sum(each.numel() * each.element_size() for each in net.state_dict().values())


def test_tied_and_shared_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight
            self.twice = nn.Linear(8, 8)
            self.again = self.twice

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.again(self.twice(self.embedding(tokens))))
            return logits

    net = Net()
    with torch.no_grad():
        for weight in (net.head.weight, net.twice.weight):
            weight.mul_(torch.rand_like(weight) < 0.2)
    found = to_sparse(net, density=0.6)
    assert isinstance(found.twice, SparseLinear)
    assert found.twice is found.again
    assert isinstance(found.head, nn.Linear), "its weight is the embedding's"
    assert dict(found.named_parameters(remove_duplicate=False))["head.weight"] is found.get_parameter(
        "embedding.weight"
    )
    tokens = torch.randint(0, 20, (2, 5))
    assert torch.allclose(found(tokens), net(tokens), atol=1e-6)


def test_frozen_layers_and_modes_stay_so() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout()).eval()
    net[0].weight.requires_grad_(False)
    found = to_sparse(net, density=1.0)
    assert not found[0].training  # type: ignore[index]  # a Sequential
    assert not found[0].values.requires_grad  # type: ignore[index]
    back = to_dense(found)
    assert not back[0].weight.requires_grad  # type: ignore[index]
    assert back[0].bias.requires_grad  # type: ignore[index]


def test_a_transformer() -> None:
    torch.manual_seed(0)
    net = GPT(context=16, width=32, depth=2, heads=2).eval()
    sparsifier = Sparsifier(0.9)
    sparsifier.attach(net)
    found = to_sparse(net, sparsifier.masks)
    assert layers(found)
    tokens = torch.randint(0, 20, (2, 16))
    assert torch.allclose(found(tokens), net(tokens), atol=1e-5)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_densities_that_are_none_are_refused(density: float) -> None:
    with pytest.raises(InputError, match=rf"density={density}"):
        to_sparse(nn.Linear(2, 2), density=density)


def semi(monkeypatch: pytest.MonkeyPatch, masked: bool = True) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A network of which two layers are 2:4, the same with sparse layers on a device with kernels, and its masks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3)).double()
    masks = {f"{place}.weight": nm_mask(net.get_parameter(f"{place}.weight"), 2, 4) for place in (0, 2)}
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(name).mul_(mask)
    monkeypatch.setattr(convert, "has_kernels", lambda weight: True)
    return net, to_sparse(net, masks if masked else None), masks


@pytest.mark.parametrize("masked", [True, False])
def test_two_of_four_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    net, found, _ = semi(monkeypatch, masked)
    kinds = [type(layer) for layer in found.modules() if isinstance(layer, nn.Linear)]
    assert kinds == [SemiSparseLinear, SemiSparseLinear, nn.Linear]
    x = torch.randn(5, 16).double()
    assert torch.allclose(found(x), net(x), rtol=1e-12, atol=1e-12)
    back = to_dense(found)
    assert [type(layer) for layer in back.modules()] == [type(layer) for layer in net.modules()]
    assert all(torch.equal(back.state_dict()[name], value) for name, value in net.state_dict().items())
    assert not {each.data_ptr() for each in back.parameters()} & {each.data_ptr() for each in found.parameters()}


def test_two_of_four_without_kernels_stays_dense() -> None:
    net = nn.Linear(16, 32)
    with torch.no_grad():
        net.weight.mul_(nm_mask(net.weight, 2, 4))
    assert type(to_sparse(net)) is nn.Linear


def test_two_of_four_trains_as_the_masked_network(monkeypatch: pytest.MonkeyPatch) -> None:
    net, found, masks = semi(monkeypatch)
    for model in (net, found):
        torch.manual_seed(1)
        adam = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(10):
            model(torch.randn(8, 16).double()).square().sum().backward()
            for name, mask in masks.items():
                if model is net:
                    net.get_parameter(name).grad.mul_(mask)  # type: ignore[union-attr]  # it has one
            adam.step()
            adam.zero_grad()
    for name, value in net.state_dict().items():
        assert torch.allclose(found.state_dict()[name], value, rtol=1e-10, atol=1e-12), name
    assert not found.get_parameter("0.weight")[~masks["0.weight"]].any()
    found.load_state_dict({**found.state_dict(), "0.weight": torch.ones(32, 16)})
    assert int(to_dense(found).get_parameter("0.weight").count_nonzero()) == 256, "what the mask prunes takes no part"


def test_masks_that_move_train_as_in_linear_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3)).double()
    found = to_semi_sparse(net, only=["0", "2"])
    assert [type(layer) for layer in found.modules() if isinstance(layer, nn.Linear)] == [
        SemiSparseLinear, SemiSparseLinear, nn.Linear
    ]  # fmt: skip
    assert found.state_dict().keys() == net.state_dict().keys()
    for model in (net, found):
        torch.manual_seed(1)
        sparsifier, sgd = StraightThrough("2:4", decay=1e-3), torch.optim.SGD(model.parameters(), 0.02)
        sparsifier.attach(model, sgd)
        for step in range(10):
            model(torch.randn(8, 16).double()).square().sum().backward()
            sparsifier.update(step)
            sgd.step()
            sparsifier.apply()
            sgd.zero_grad()
    for name, value in net.state_dict().items():
        assert torch.allclose(found.state_dict()[name], value, rtol=1e-10, atol=1e-12), name


def test_layers_that_are_none_are_named() -> None:
    with pytest.raises(InputError, match=r"only=\['fc9'\].*choose among \['fc1', 'fc2', 'fc3'\]"):
        to_semi_sparse(LeNet300100(), only=["fc9"])


def test_kernels_are_what_to_sparse_takes() -> None:
    masks = {
        "0.weight": torch.rand(64, 64) < 0.1, "1.weight": torch.zeros(64, 64, dtype=torch.bool),
        "2.weight": torch.rand(64, 64) < 0.5, "3.weight": torch.rand(4, 4, 3, 3) < 0.1,
    }  # fmt: skip
    masks["1.weight"][32:, :16] = True
    layers = [nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(4, 4, 3)]
    found = kernels(nn.Sequential(*layers), masks)
    assert found == {"0.weight": "rows", "1.weight": "blocks of 16", "2.weight": "dense", "3.weight": "dense"}
    sparse = to_sparse(nn.Sequential(*layers), masks)
    assert [type(layer).__name__ for layer in sparse.children()] == [
        "SparseLinear", "BlockSparseLinear", "Linear", "Conv2d",
    ]  # fmt: skip
    assert kernels(layers[0], {"weight": masks["2.weight"]}, density=0.6) == {"weight": "rows"}


def test_names_that_torch_compile_gives_are_those_of_the_masks() -> None:
    net, sparsifier = pruned()
    masks = {name: ~mask for name, mask in sparsifier.masks.items()}  # other than what is zero
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", net)  # as torch.compile wraps a module
    plain = kernels(net, sparsifier.masks)
    assert plain == kernels(wrapped, sparsifier.masks)
    assert set(plain.values()) != {"dense"}
    name = next(each for each, kernel in plain.items() if kernel != "dense")
    layer = to_sparse(wrapped, masks, density=1.0).get_submodule(f"_orig_mod.{name.removesuffix('.weight')}")
    assert isinstance(layer, SparseLinear)
    assert layer.kept == int(masks[name].count_nonzero())
