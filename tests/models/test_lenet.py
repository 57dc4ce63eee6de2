import pytest
import torch
from torch import nn

from sparsity.models import LeNet5, LeNet300100


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("net", "published"),
    [
        # Lottery ticket hypothesis (arXiv 1803.03635), figure 2: "266K" for LeNet.
        pytest.param(LeNet300100, 266_610, id="lenet-300-100"),
        # SNIP (arXiv 1810.02340), table 1: 431K for the Caffe LeNet-5.
        pytest.param(LeNet5, 431_080, id="lenet-5"),
    ],
)
def test_parameter_count(net: type[nn.Module], published: int) -> None:
    assert count(net()) == published


def test_parameter_count_follows_inputs_channels_and_classes() -> None:
    assert count(LeNet300100(inputs=64, classes=7)) == 266_610 - (784 - 64) * 300 - 3 * 101
    assert count(LeNet5(channels=3, classes=7)) == 431_080 + 2 * 20 * 25 - 3 * 501


@pytest.mark.parametrize("shape", [(784,), (28, 28), (1, 28, 28), (4, 14, 14)], ids=str)
def test_lenet300100_flattens_any_image(shape: tuple[int, ...]) -> None:
    net = LeNet300100(classes=7)
    images = torch.randn(3, *shape)
    assert net(images).shape == (3, 7)
    torch.testing.assert_close(net(images), net(images.reshape(3, 784)))


def test_lenet5_shape() -> None:
    assert LeNet5(channels=3, classes=7)(torch.randn(2, 3, 28, 28)).shape == (2, 7)


def test_lenet5_is_nonlinear_only_in_its_pooling_and_hidden_layer() -> None:
    net = LeNet5()
    for name, parameter in net.named_parameters():
        nn.init.constant_(parameter, -0.1 if name == "conv1.weight" else 0.0)
    nn.init.constant_(net.conv2.weight, -0.1)
    nn.init.constant_(net.fc1.weight, 1.0)
    nn.init.constant_(net.fc2.weight, 1.0)
    # -0.1 over 25 ones is -2.5, which a ReLU would erase; 20 * 25 of those times -0.1 give 125.
    expected = torch.full((1, 10), 125.0 * 800 * 500)
    torch.testing.assert_close(net(torch.ones(1, 1, 28, 28)), expected)


@pytest.mark.parametrize("net", [LeNet300100, LeNet5])
def test_gradient_reaches_every_parameter(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = net()
    model(torch.randn(4, 1, 28, 28)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_errors_name_the_values() -> None:
    with pytest.raises(ValueError, match=r"inputs and classes must be at least 1, got inputs=0, classes=10"):
        LeNet300100(inputs=0)
    with pytest.raises(ValueError, match=r"channels and classes must be .* got channels=1, classes=-2"):
        LeNet5(classes=-2)


def test_rectified_lenet5_has_a_relu_after_each_convolution() -> None:
    torch.manual_seed(0)
    plain, rectified = LeNet5(), LeNet5(rectify=True)
    rectified.load_state_dict(plain.state_dict())
    images = torch.randn(4, 1, 28, 28)
    features = torch.relu(torch.max_pool2d(plain.conv1(images), 2))
    features = torch.max_pool2d(torch.relu(plain.conv2(features)), 2)
    expected = plain.fc2(torch.relu(plain.fc1(features.flatten(1))))
    assert torch.allclose(rectified(images), expected, atol=1e-6)
    assert not torch.allclose(plain(images), expected, atol=1e-3)
