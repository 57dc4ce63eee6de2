"""The two LeNets of the pruning literature, for MNIST (LeCun et al. 1998, "Gradient-based learning applied to
document recognition", Proc. IEEE 86(11))."""

from torch import Tensor, nn
from torch.nn import functional as F


class LeNet300100(nn.Module):
    """Two hidden layers of 300 and 100 units with ReLU: 266,610 parameters for 784 inputs and 10 classes.

    Args:
        inputs: values per image, 784 = 28 * 28 for MNIST.
        classes: number of labels.
    """

    def __init__(self, inputs: int = 784, classes: int = 10) -> None:
        super().__init__()
        if min(inputs, classes) < 1:
            raise ValueError(f"inputs and classes must be at least 1, got {inputs=}, {classes=}")
        self.fc1 = nn.Linear(inputs, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images of any shape ``[B, ...]`` with ``inputs`` values each."""
        hidden = F.relu(self.fc1(images.flatten(1)))
        hidden = F.relu(self.fc2(hidden))
        logits: Tensor = self.fc3(hidden)
        return logits


class LeNet5(nn.Module):
    """LeNet-5 as Caffe ships it and SNIP (arXiv 1810.02340) and sparse momentum (arXiv 1907.04840) prune it.

    431,080 parameters for 1 channel and 10 classes. It departs from LeCun's: 20 and 50 feature maps, max
    pooling, one hidden layer of 500 units, and no nonlinearity but the pooling after a convolution.

    Args:
        channels: channels of the images, 1 for MNIST.
        classes: number of labels.
        rectify: whether a ReLU follows each convolution, as in sparse momentum's code; at its learning rate of 0.1
            the dense network does not learn without.
    """

    def __init__(self, channels: int = 1, classes: int = 10, rectify: bool = False) -> None:
        super().__init__()
        if min(channels, classes) < 1:
            raise ValueError(f"channels and classes must be at least 1, got {channels=}, {classes=}")
        self.rectify = rectify
        self.conv1 = nn.Conv2d(channels, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, channels, 28, 28]``."""
        features = self._pooled(self.conv1(images))
        features = self._pooled(self.conv2(features))
        logits: Tensor = self.fc2(F.relu(self.fc1(features.flatten(1))))
        return logits

    def _pooled(self, features: Tensor) -> Tensor:
        pooled = F.max_pool2d(features, 2)
        return F.relu(pooled) if self.rectify else pooled
