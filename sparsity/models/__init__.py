"""The networks that the sparse-training papers measure on, and the Lightning module that trains them."""

from sparsity.models.classifier import Classifier
from sparsity.models.lenet import LeNet5, LeNet300100
from sparsity.models.resnet import ResNet20, ResNet32
from sparsity.models.vgg import VGG16, VGG19
from sparsity.models.wide_resnet import WideResNet

__all__ = [
    "VGG16",
    "VGG19",
    "Classifier",
    "LeNet5",
    "LeNet300100",
    "ResNet20",
    "ResNet32",
    "WideResNet",
]
