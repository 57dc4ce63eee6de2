"""VGG with batch normalisation for CIFAR: Simonyan & Zisserman 2014 (arXiv 1409.1556), columns D and E.

Of 32 x 32 pixels the five poolings leave one, so that a single linear layer replaces the three of the paper;
the convolutions keep their biases. This is the shape that LAMP (arXiv 2010.07611) prunes.
"""

from collections.abc import Sequence

from torch import Tensor, nn

STAGE_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each stage closed by a max pooling, then one linear layer.

    Args:
        depths: convolutions in each of the five stages.
        classes: number of labels.
    """

    def __init__(self, depths: Sequence[int], classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        self.features = features(depths)
        self.head = nn.Linear(STAGE_CHANNELS[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, 32, 32]``."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


class VGG16(VGG):
    """13 convolutions and one linear layer: 14,728,266 parameters for 10 classes.

    Args:
        classes: number of labels.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__((2, 2, 3, 3, 3), classes)


class VGG19(VGG):
    """16 convolutions and one linear layer: 20,040,522 parameters for 10 classes.

    Args:
        classes: number of labels.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__((2, 2, 4, 4, 4), classes)


def features(depths: Sequence[int]) -> nn.Sequential:
    """Maps images ``[B, 3, 32, 32]`` to ``[B, 512, 1, 1]``."""
    layers: list[nn.Module] = []
    inputs = 3
    for depth, outputs in zip(depths, STAGE_CHANNELS, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
