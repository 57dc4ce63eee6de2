import pytest
import torch
from torch import nn

from sparsity.models import WideResNet
from sparsity.models.wide_resnet import PreActivationBlock


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    [
        (40, 1, 0.6),
        (40, 2, 2.2),
        (40, 4, 8.9),
        (40, 8, 35.7),
        (28, 10, 36.5),
        (28, 12, 52.5),
        (22, 8, 17.2),
        (22, 10, 26.8),
        (16, 8, 11.0),
        (16, 10, 17.1),
    ],
    ids=str,
)
def test_parameter_count_of_the_paper(depth: int, width: int, millions: float) -> None:
    """arXiv 1605.07146, table 4."""
    with torch.device("meta"):
        assert round(count(WideResNet(depth, width)) / 1e6, 1) == millions


def test_documented_parameter_counts() -> None:
    with torch.device("meta"):
        assert count(WideResNet(28, 2)) == 1_467_610
        assert count(WideResNet(28, 10)) == 36_479_194


@pytest.mark.parametrize("width", [1, 2])
def test_shapes(width: int) -> None:
    model = WideResNet(10, width, classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.stages(model.stem(images)).shape == (2, 64 * width, 8, 8)
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize("depth", [10, 16, 28])
def test_depth_counts_the_convolutions(depth: int) -> None:
    with torch.device("meta"):
        convolutions = [m for m in WideResNet(depth).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth


def test_projection_only_where_the_shape_changes() -> None:
    def projected(net: WideResNet) -> list[bool]:
        return [m.shortcut is not None for m in net.modules() if isinstance(m, PreActivationBlock)]

    assert projected(WideResNet(16, 2)) == [True, False] * 3
    assert projected(WideResNet(16, 1)) == [False, False, True, False, True, False]


def test_identity_block_passes_its_input_unactivated() -> None:
    block = PreActivationBlock(4, 4, stride=1, dropout=0.0)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x)


def test_projection_sees_activated_input() -> None:
    block = PreActivationBlock(4, 8, stride=2, dropout=0.0).eval()
    nn.init.zeros_(block.conv2.weight)
    assert block(-torch.rand(2, 4, 6, 6)).abs().max() == 0


def test_dropout_acts_between_the_convolutions_in_training_only() -> None:
    block = PreActivationBlock(4, 4, stride=1, dropout=1.0)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 2, dropout=0.3)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("depth", "below", "above"), [(20, 16, 22), (27, 22, 28), (4, 10, 16), (0, 10, 16)], ids=str)
def test_error_names_the_nearest_depths(depth: int, below: int, above: int) -> None:
    message = rf"depth must be 6n \+ 4 with n >= 1, got {depth}; the nearest valid depths are {below} and {above}$"
    with pytest.raises(ValueError, match=message):
        WideResNet(depth)
    with torch.device("meta"):
        WideResNet(below)
        WideResNet(above)


def test_errors_name_the_values() -> None:
    with pytest.raises(ValueError, match=r"width and classes must be at least 1, got width=0, classes=10"):
        WideResNet(width=0)
    with pytest.raises(ValueError, match=r"dropout probability has to be between 0 and 1, but got 1\.5"):
        WideResNet(10, dropout=1.5)
