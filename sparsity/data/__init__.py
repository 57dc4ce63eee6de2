"""Image data sets held in memory, as Lightning data modules."""

from sparsity.data.cifar10 import CIFAR10
from sparsity.data.digits import Digits
from sparsity.data.images import Images
from sparsity.data.mnist import MNIST

__all__ = ["CIFAR10", "MNIST", "Digits", "Images"]
