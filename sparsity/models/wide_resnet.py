"""Wide residual networks for CIFAR: Zagoruyko & Komodakis 2016 (arXiv 1605.07146)."""

from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.models.resnet import blocks_per_stage, conv3x3, he_init


class WideResNet(nn.Module):
    """WRN-depth-width: a ResNet of n pre-activation blocks in each of three stages, ``width`` times as wide.

    For 10 classes, WRN-28-2 has 1,467,610 parameters and WRN-28-10 has 36,479,194.

    Args:
        depth: 6n + 4, the number of convolutions, the three of the shortcuts included.
        width: factor on the 16, 32 and 64 channels of the stages; the stem keeps 16.
        classes: number of labels.
        dropout: probability of zeroing an activation between the two convolutions of a block.
    """

    def __init__(self, depth: int = 28, width: int = 2, classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        if min(width, classes) < 1:
            raise ValueError(f"width and classes must be at least 1, got {width=}, {classes=}")
        blocks = blocks_per_stage(depth, extra=4)
        narrow, middle, broad = 16 * width, 32 * width, 64 * width
        self.stem = conv3x3(3, 16)
        self.stages = nn.Sequential(
            stage(16, narrow, blocks, 1, dropout),
            stage(narrow, middle, blocks, 2, dropout),
            stage(middle, broad, blocks, 2, dropout),
        )
        self.bn = nn.BatchNorm2d(broad)
        self.head = nn.Linear(broad, classes)
        self.apply(he_init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, H, W]``, H = W = 32 in the paper."""
        features = F.relu(self.bn(self.stages(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, added to the block's input.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and of the shortcut.
        dropout: probability of zeroing an activation between the convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut: nn.Conv2d | None = None
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        active = F.relu(self.bn1(x))
        residual = self.dropout(F.relu(self.bn2(self.conv1(active))))
        # Only a projection may see activated input: the identity path stays clear (arXiv 1603.05027).
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = skip + self.conv2(residual)
        return out


def stage(inputs: int, outputs: int, blocks: int, stride: int, dropout: float) -> nn.Sequential:
    """``blocks`` pre-activation blocks; the first one changes the shape."""
    first = PreActivationBlock(inputs, outputs, stride, dropout)
    others = (PreActivationBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)
