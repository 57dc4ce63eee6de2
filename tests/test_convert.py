"""Layers of kept weights: what they compute, train, save, and what they come back as."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsity import InputError, Sparsifier
from sparsity.convert import BlockSparseLinear, SparseLinear, kernels, to_dense, to_sparse
from sparsity.models import GPT, LeNet300100


def pruned(sparsity: float = 0.9) -> tuple[nn.Module, Sparsifier]:
    torch.manual_seed(0)
    net = LeNet300100()
    sparsifier = Sparsifier(sparsity)
    sparsifier.attach(net)
    return net, sparsifier


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


def test_training_is_that_of_the_masked_network() -> None:
    net, sparsifier = pruned()
    net = net.double()
    found = to_sparse(net, sparsifier.masks, density=1.0)
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
    assert sizes[1] < 0.15 * sizes[0]


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
