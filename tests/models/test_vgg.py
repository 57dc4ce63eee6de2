import pytest
import torch
from torch import nn

from sparsity.models import VGG16, VGG19


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# (channels in, channels out, how often): table 1 of arXiv 1409.1556, columns D and E.
START = [(3, 64, 1), (64, 64, 1), (64, 128, 1), (128, 128, 1), (128, 256, 1)]
D = [*START, (256, 256, 2), (256, 512, 1), (512, 512, 5)]
E = [*START, (256, 256, 3), (256, 512, 1), (512, 512, 7)]


@pytest.mark.parametrize(("net", "convolutions"), [(VGG16, D), (VGG19, E)], ids=["D", "E"])
@pytest.mark.parametrize("classes", [10, 100])
def test_parameter_count(net: type[VGG16 | VGG19], convolutions: list[tuple[int, int, int]], classes: int) -> None:
    weights = sum(n * 9 * inputs * outputs for inputs, outputs, n in convolutions)
    biases_scales_shifts = sum(n * 3 * outputs for _, outputs, n in convolutions)
    with torch.device("meta"):
        assert count(net(classes)) == weights + biases_scales_shifts + 513 * classes


def test_documented_parameter_counts() -> None:
    with torch.device("meta"):
        assert count(VGG16()) == 14_728_266
        assert count(VGG19()) == 20_040_522


@pytest.mark.parametrize(("net", "depth"), [(VGG16, 16), (VGG19, 19)])
def test_one_linear_layer_replaces_the_three_of_the_name(net: type[VGG16 | VGG19], depth: int) -> None:
    with torch.device("meta"):
        layers = [type(m) for m in net().modules()]
    assert layers.count(nn.Conv2d) == depth - 3
    assert layers.count(nn.Linear) == 1


@pytest.mark.parametrize("net", [VGG16, VGG19])
def test_shapes(net: type[VGG16 | VGG19]) -> None:
    model = net(classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.features(images).shape == (2, 512, 1, 1)
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize("net", [VGG16, VGG19])
def test_gradient_reaches_every_parameter(net: type[VGG16 | VGG19]) -> None:
    torch.manual_seed(0)
    # Normalised by the statistics of a batch, the biases of the convolutions cancel and get no gradient.
    model = net().eval()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_error_names_the_value() -> None:
    with pytest.raises(ValueError, match=r"classes must be at least 1, got 0"):
        VGG16(classes=0)
