import pytest
import torch
from torch import nn

from sparsity.models import ResNet20, ResNet32
from sparsity.models.resnet import BasicBlock, ResNet


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")])
def test_parameter_count_of_the_paper(depth: int, millions: str) -> None:
    """arXiv 1512.03385, table 6."""
    with torch.device("meta"):
        assert f"{count(ResNet(depth)) / 1e6:.2g}" == millions


def test_documented_parameter_counts() -> None:
    assert count(ResNet20()) == 269_722
    assert count(ResNet32()) == 464_154


@pytest.mark.parametrize(("depth", "classes", "width"), [(8, 10, 1), (20, 100, 1), (32, 10, 2), (14, 3, 5)], ids=str)
def test_parameter_count_by_arithmetic(depth: int, classes: int, width: int) -> None:
    n, w = (depth - 2) // 6, 16 * width
    # A stage of c channels holds 2n convolutions of 9c^2, the second and third stage half of one less.
    stem = 27 * w
    weights = 9 * w**2 * (2 * n * (1 + 4 + 16) - (4 + 16) // 2)
    scales_and_shifts = 2 * w * (1 + 2 * n * (1 + 2 + 4))
    with torch.device("meta"):
        net = ResNet(depth, classes, width)
    assert count(net) == stem + weights + scales_and_shifts + (4 * w + 1) * classes


@pytest.mark.parametrize("net", [ResNet20, ResNet32])
@pytest.mark.parametrize("width", [1, 2])
def test_shapes(net: type[ResNet20 | ResNet32], width: int) -> None:
    model = net(classes=7, width=width).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.stages(model.stem(images)).shape == (2, 64 * width, 8, 8)
    assert model(images).shape == (2, 7)


def test_depth_counts_the_weight_layers() -> None:
    for depth in (8, 20, 32):
        layers = [m for m in ResNet(depth).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    x = torch.randn(2, 3, 5, 5)
    shortcut = BasicBlock(3, 7, stride=2).shortcut(x)
    assert shortcut.shape == (2, 7, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(shortcut[:, :3, row, column], x[:, :, 2 * row, 2 * column])
    assert not shortcut[:, 3:].any()


def test_block_without_residual_is_its_shortcut() -> None:
    block = BasicBlock(4, 4, stride=1)
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    assert torch.equal(block(x), x)


def test_he_initialisation() -> None:
    torch.manual_seed(0)
    for name, parameter in ResNet32().named_parameters():
        if "conv" in name:
            fan_out = parameter.shape[0] * 9
            assert parameter.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06), name


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = ResNet20()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("depth", "below", "above"), [(18, 14, 20), (21, 20, 26), (2, 8, 14), (7, 8, 14), (-4, 8, 14)], ids=str
)
def test_error_names_the_nearest_depths(depth: int, below: int, above: int) -> None:
    message = rf"depth must be 6n \+ 2 with n >= 1, got {depth}; the nearest valid depths are {below} and {above}$"
    with pytest.raises(ValueError, match=message):
        ResNet(depth)
    ResNet(below)
    ResNet(above)


def test_errors_name_the_values() -> None:
    with pytest.raises(ValueError, match=r"classes and width must be at least 1, got classes=10, width=0"):
        ResNet20(width=0)
    with pytest.raises(ValueError, match=r"classes and width must be at least 1, got classes=-1, width=1"):
        ResNet32(classes=-1)
