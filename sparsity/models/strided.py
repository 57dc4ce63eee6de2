"""A convolutional network that a CPU trains in seconds per epoch: every convolution halves the image."""

from torch import Tensor, nn

from sparsity.models.resnet import he_init


class StridedConvNet(nn.Module):
    """Three convolutions of stride 2 with batch norms and ReLU, and one linear layer: 68,266 parameters for 10 classes.

    Made for comparisons on CIFAR-10 without a GPU; it is nobody's benchmark network.

    Args:
        channels: of the images.
        classes: number of labels.
        width: channels of the first convolution; the other two have twice as many.
    """

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        if min(channels, classes, width) < 1:
            raise ValueError(f"channels, classes and width must be at least 1, got {channels=}, {classes=}, {width=}")
        self.features = nn.Sequential(
            *_halved(channels, width, 5), *_halved(width, 2 * width, 3), *_halved(2 * width, 2 * width, 3)
        )
        self.head = nn.Linear(2 * width * 16, classes)
        self.apply(he_init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, channels, 32, 32]``."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


def _halved(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
