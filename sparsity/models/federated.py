"""The two small convolutional networks of FedDST and the methods after it, in the sizes that their code has."""

import torch
from torch import Tensor, nn


class FedMNISTNet(nn.Module):
    """Two convolutions and two linear layers: 261,750 weights without the biases, for images of 28 x 28 pixels.

    Args:
        classes: number of labels.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 10, 5), nn.MaxPool2d(3, 1), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(3, 1), nn.ReLU()
        )
        self.hidden, self.head = nn.Linear(20 * 16 * 16, 50), nn.Linear(50, classes)
        _channels_last(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 1, 28, 28]``."""
        logits: Tensor = self.head(self.hidden(self.features(images).flatten(1)).relu())
        return logits


class FedCIFARNet(nn.Module):
    """Three convolutions and two linear layers: 122,336 weights without the biases, for images of 32 x 32 pixels.

    Args:
        classes: number of labels.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3), nn.ReLU(),
        )  # fmt: skip
        self.hidden, self.head = nn.Linear(64 * 4 * 4, 64), nn.Linear(64, classes)
        _channels_last(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, 32, 32]``."""
        logits: Tensor = self.head(self.hidden(self.features(images).flatten(1)).relu())
        return logits


def _channels_last(net: nn.Module) -> None:
    # On a CPU convolutions of so few channels are faster so.
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a layout
