"""The networks that the sparse-training papers measure on, and the Lightning modules that train them."""

from sparsity.models.classifier import Classifier
from sparsity.models.federated import FedCIFARNet, FedMNISTNet
from sparsity.models.language import LanguageModel
from sparsity.models.lenet import LeNet5, LeNet300100
from sparsity.models.resnet import ResNet20, ResNet32
from sparsity.models.strided import StridedConvNet
from sparsity.models.transformer import GPT, ViT
from sparsity.models.vgg import VGG16, VGG19
from sparsity.models.wide_resnet import WideResNet

__all__ = [
    "GPT",
    "VGG16",
    "VGG19",
    "Classifier",
    "FedCIFARNet",
    "FedMNISTNet",
    "LanguageModel",
    "LeNet5",
    "LeNet300100",
    "ResNet20",
    "ResNet32",
    "StridedConvNet",
    "ViT",
    "WideResNet",
]
