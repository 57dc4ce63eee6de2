"""Data sets held in memory, as Lightning data modules: images and text."""

from sparsity.data.cifar10 import CIFAR10
from sparsity.data.digits import Digits
from sparsity.data.images import Images
from sparsity.data.mnist import MNIST
from sparsity.data.text import Text, TinyShakespeare

__all__ = ["CIFAR10", "MNIST", "Digits", "Images", "Text", "TinyShakespeare"]
