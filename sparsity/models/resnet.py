"""Residual networks for CIFAR: He et al. 2015 (arXiv 1512.03385), section 4.2."""

from torch import Tensor, nn
from torch.nn import functional as F


class ResNet(nn.Module):
    """A 3x3 stem, three stages of n blocks of 16, 32 and 64 channels, average pooling, one linear layer.

    Args:
        depth: weight layers on the longest path, 6n + 2.
        classes: number of labels.
        width: factor on every channel count; GraSP (arXiv 2002.07376) prunes ResNet-32 at width 2.
    """

    def __init__(self, depth: int, classes: int = 10, width: int = 1) -> None:
        super().__init__()
        if min(classes, width) < 1:
            raise ValueError(f"classes and width must be at least 1, got {classes=}, {width=}")
        blocks = blocks_per_stage(depth, extra=2)
        narrow, middle, broad = 16 * width, 32 * width, 64 * width
        self.stem = conv3x3(3, narrow)
        self.stem_bn = nn.BatchNorm2d(narrow)
        self.stages = nn.Sequential(
            stage(narrow, narrow, blocks, stride=1),
            stage(narrow, middle, blocks, stride=2),
            stage(middle, broad, blocks, stride=2),
        )
        self.head = nn.Linear(broad, classes)
        self.apply(he_init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, H, W]``, H = W = 32 in the paper."""
        features = self.stages(F.relu(self.stem_bn(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class ResNet20(ResNet):
    """269,722 parameters for 10 classes at width 1.

    Args:
        classes: number of labels.
        width: factor on every channel count.
    """

    def __init__(self, classes: int = 10, width: int = 1) -> None:
        super().__init__(20, classes, width)


class ResNet32(ResNet):
    """464,154 parameters for 10 classes at width 1.

    Args:
        classes: number of labels.
        width: factor on every channel count.
    """

    def __init__(self, classes: int = 10, width: int = 1) -> None:
        super().__init__(32, classes, width)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, plus a shortcut without parameters (option A).

    Args:
        inputs: channels in.
        outputs: channels out, at least ``inputs``.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = outputs - inputs
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Every ``stride``-th pixel of ``x``, with channels of zeros appended."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """``blocks`` basic blocks; the first one changes the shape."""
    first = BasicBlock(inputs, outputs, stride)
    others = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A padded 3x3 convolution, without bias because batch normalisation would cancel it."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def he_init(module: nn.Module) -> None:
    """Draws the weights of a convolution from N(0, 2 / fan_out) (arXiv 1502.01852, equation 14)."""
    # The factor 2 makes up for a ReLU; none follows the linear layer, which keeps PyTorch's default.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def blocks_per_stage(depth: int, extra: int) -> int:
    """The n of ``depth = 6n + extra``: three stages of n blocks of two layers, and ``extra`` others."""
    blocks, rest = divmod(depth - extra, 6)
    if blocks < 1 or rest:
        nearest = 6 * max(blocks, 1) + extra
        raise ValueError(
            f"depth must be 6n + {extra} with n >= 1, got {depth}; "
            f"the nearest valid depths are {nearest} and {nearest + 6}"
        )
    return blocks
