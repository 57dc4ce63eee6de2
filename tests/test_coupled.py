"""What is taken out of a network with branches was not needed: the function is the same, the layers are smaller."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsity import InputError, Sparsifier
from sparsity.models import GPT, ResNet20, ViT, WideResNet
from sparsity.models.vgg import VGG
from sparsity.shrink import manifest, shrink, shrunk_like

pytest.importorskip("torch_pruning", reason='torch-pruning is missing: pip install "lightning-sparsity[structured]"')


def same(net: nn.Module, *inputs: Tensor) -> nn.Module:
    """The smaller network, which computes the same as the other, and can be made again of its manifest."""
    net = net.double().eval()
    before = {name: each.clone() for name, each in net.state_dict().items()}
    found = shrink(net, *inputs)
    fresh = [torch.randn_like(each) if each.is_floating_point() else each.flip(1) for each in inputs]
    for given in (inputs, fresh):
        assert torch.allclose(found(*given), net(*given), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(net.state_dict()[name], each) for name, each in before.items())
    assert not {each.data_ptr() for each in found.parameters()} & {each.data_ptr() for each in net.parameters()}
    rebuilt = shrunk_like(net, manifest(found))
    rebuilt.load_state_dict(found.state_dict())
    assert torch.equal(rebuilt(*fresh), found(*fresh))
    return found


@torch.no_grad()
def moved(net: nn.Module, shift: Callable[[Tensor], object] = lambda bias: bias.normal_()) -> nn.Module:
    """The network with norms as after some training."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            for value in (norm.running_mean, norm.running_var, norm.weight):
                value.uniform_(0.5, 2)  # type: ignore[union-attr]  # it has them
            shift(norm.bias)
    return net


@torch.no_grad()
def emptied(net: nn.Module, share: float = 0.5) -> nn.Module:
    """The network without the weights of some outputs of each layer but the last."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name != "head":
            layer.weight[torch.rand(len(layer.weight)) < share] = 0
    return net


def size(net: nn.Module) -> int:
    return sum(each.numel() for each in net.parameters())


def layer(net: nn.Module, name: str) -> nn.Module:
    return net.get_submodule(name)


class Branches(nn.Module):
    """A stem, a residual branch, a shortcut of its own, and two of these concatenated."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.shortcut = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, padding=padding, bias=False)
        self.first, self.norm = nn.Conv2d(8, 10, 1), nn.BatchNorm2d(10)
        self.second, self.join = nn.Conv2d(10, 6, 3, padding=padding), nn.Conv2d(14, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.second(self.norm(self.first(x)).sigmoid()) + self.shortcut(x)
        x = x if y.shape == x.shape else nn.functional.adaptive_avg_pool2d(x, y.shape[-1])
        logits: Tensor = self.head(self.join(torch.cat([y.relu(), x], 1)).relu().mean((2, 3)))
        return logits


IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double()


def test_outputs_that_branches_share() -> None:
    net = moved(Branches())
    with torch.no_grad():
        net.get_parameter("second.weight")[[0, 1, 2]] = 0
        net.get_parameter("shortcut.weight")[[1, 2, 3]] = 0  # both are without 1 and 2
        net.get_parameter("first.weight")[[4, 7]] = 0
        net.get_parameter("join.weight")[:, 3] = 0  # nobody looks at 3 of the sum
        net.get_parameter("join.weight")[:, 6 + 5] = 0  # of 5 of the stem others do
    found = same(net, IMAGES)
    shapes = {name: list(each.shape[:2]) for name, each in found.named_parameters() if each.ndim > 1}
    assert shapes == {
        "stem.weight": [8, 3], "shortcut.weight": [3, 8], "first.weight": [8, 8], "second.weight": [3, 8],
        "join.weight": [5, 11], "head.weight": [4, 5],
    }  # fmt: skip
    assert str(layer(found, "second")) == str(nn.Conv2d(8, 3, 3))


def test_constants_before_a_padding_stay_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    net = moved(Branches(padding=1))
    with torch.no_grad():
        net.get_parameter("first.weight")[[4, 7]] = 0
    with caplog.at_level(logging.INFO, "sparsity"):
        found = same(net, IMAGES)
    assert size(found) == size(net)
    assert "no bias can take over their constant: {'first': 2}" in caplog.text


@pytest.mark.parametrize("net", [ResNet20, lambda: WideResNet(10, 1), lambda: VGG((1, 1, 1, 1, 1), 10)])
def test_convolutional_networks(net: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    masked = emptied(moved(net()))
    side = 32 if isinstance(masked, VGG) else 8
    found = same(masked, torch.randn(1, 3, side, side).double())
    assert size(found) < 0.8 * size(masked)


def test_a_network_pruned_by_channels() -> None:
    torch.manual_seed(0)
    net = ResNet20()
    sparsifier = Sparsifier(0.5, pattern="channel")
    sparsifier.attach(net)
    found = same(moved(net, lambda bias: bias.zero_()), torch.randn(1, 3, 8, 8).double())
    # Fresh batch norms map zeros to minus their mean over their deviation, which ReLU makes zero.
    for name, mask in sparsifier.masks.items():
        if name.endswith("conv1.weight"):
            assert len(found.get_parameter(name)) == int(mask.flatten(1).any(1).sum()), name


@torch.no_grad()
def headless(net: nn.Module, width: int, heads: int) -> nn.Module:
    """The network without a head that is not looked at, and one without values; in each block."""
    for name, module in net.named_modules():
        if name.endswith("attention"):
            nn.init.normal_(module.get_parameter("qkv.bias"))
            module.get_parameter("proj.weight").view(width, heads, -1)[:, 0] = 0
            module.get_parameter("qkv.weight").view(3, heads, -1)[2, 2] = 0
        if name.endswith("mlp"):
            module.get_parameter("fc.weight")[::3] = 0
            nn.init.normal_(module.get_parameter("fc.bias"))
    return net


@pytest.mark.parametrize("kind", ["ViT", "GPT"])
def test_heads_and_neurons_of_transformers(kind: str) -> None:
    torch.manual_seed(0)
    net = ViT(8, 4, 16, 2, 4) if kind == "ViT" else GPT(8, 16, 2, 4)
    x = torch.randn(2, 3, 8, 8).double() if kind == "ViT" else torch.randint(0, 256, (2, 8))
    found = same(headless(net, 16, 4), x)
    for block in ("blocks.0", "blocks.1"):
        assert layer(found, f"{block}.attention").heads == 2
        assert str(layer(found, f"{block}.attention.qkv")) == str(nn.Linear(16, 24))
        assert str(layer(found, f"{block}.mlp.fc")) == str(nn.Linear(16, 42))
    assert layer(net, "blocks.0.attention").heads == 4


class Mixed(nn.Module):
    """Outputs that take part in something else than layers."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.proj, self.mix = nn.Linear(6, 8), nn.Linear(8, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.proj(self.mix(self.fc(x)))
        return logits


@pytest.mark.parametrize("mix", [
    lambda x: x.softmax(-1), lambda x: x - x.mean(-1, keepdim=True), lambda x: x.cumsum(-1), lambda x: x.flip(-1),
    lambda x: x + torch.ones(8).double(), lambda x: x[..., :4].repeat(1, 2) + x,
])  # fmt: skip
def test_outputs_that_are_mixed_with_others_stay(mix: Callable[[Tensor], Tensor]) -> None:
    net = Mixed(mix)
    with torch.no_grad():
        net.proj.weight[:, [1, 2]] = 0
        net.fc.weight[[3, 5]] = 0
    same(net, torch.randn(1, 6).double())


@torch.no_grad()
def test_one_sample_is_enough_to_see_what_varies() -> None:
    net = Mixed(lambda x: x.roll(1, -1))
    net.fc.weight[[3]] = 0
    net.proj.weight[:, 3] = 0
    assert size(same(net, torch.zeros(1, 6).double())) == size(net)


class Tied(nn.Module):
    """Layers that share a weight, one with groups, one in a norm over all outputs, and a loose parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.norm, self.scale, self.last = nn.LayerNorm(6), nn.Parameter(torch.randn(8)), nn.Linear(6, 8)
        self.grouped, self.head = nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 2, 1)
        with torch.no_grad():
            for weight in (self.first.weight, self.second.weight, self.last.weight, self.grouped.weight):
                weight[[1, 2]] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.norm(self.third(self.second(self.first(x)).relu()).relu())) * self.scale
        logits: Tensor = self.head(self.grouped(x[..., None]).relu())
        return logits


def test_what_is_shared_grouped_or_normed_as_a_whole_stays() -> None:
    net = Tied()
    found = same(net, torch.randn(3, 4).double())
    assert size(found) == size(net)
    assert found.get_parameter("third.weight") is found.get_parameter("second.weight")


def test_modes_frozen_weights_and_gradients_stay() -> None:
    net = moved(Branches()).double().train()
    layer(net, "second").requires_grad_(False)
    with torch.no_grad():
        for name in ("first", "stem"):
            net.get_parameter(f"{name}.weight")[2] = 0
        net.get_parameter("stem.bias")[2] = 1.0
    found = shrink(net, IMAGES)
    assert all(module.training for module in found.modules())
    frozen = {name for name, each in found.named_parameters() if not each.requires_grad}
    assert frozen == {"second.weight", "second.bias"}
    assert "shortcut.bias" in dict(found.named_parameters()), "it has the stem's constant"
    assert all(each.grad is None for each in found.parameters())


def test_a_whole_layer_without_weights_keeps_one_output() -> None:
    net = moved(Branches())
    with torch.no_grad():
        net.get_parameter("first.weight").zero_()
    assert len(same(net, IMAGES).get_parameter("first.weight")) == 1


@pytest.mark.parametrize(("net", "message"), [
    (Mixed(lambda x: x.matmul(torch.ones(2, 2).double())), "Mixed does not run on these inputs: "),
    (Mixed(lambda x: x.detach()).requires_grad_(False), None),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused(net: nn.Module, message: str | None) -> None:
    x = torch.randn(2, 6).double()
    if message:
        with pytest.raises(InputError, match=message):
            shrink(net.double(), x)
    else:
        assert size(same(net, x)) == size(net)


def test_networks_without_anything_to_follow_are_refused_by_name() -> None:
    class Labels(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    with pytest.raises(InputError, match="torch-pruning cannot follow Labels"):
        shrink(Labels(torch.relu), torch.randn(2, 6))
