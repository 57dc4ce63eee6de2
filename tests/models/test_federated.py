"""The networks of the federated papers, by their shapes and their counts of weights."""

import pytest
import torch
from torch import nn

from sparsity import Targets
from sparsity.models import FedCIFARNet, FedMNISTNet


@pytest.mark.parametrize(("net", "shape", "weights"), [
    (FedMNISTNet(), (2, 1, 28, 28), 261_750), (FedCIFARNet(), (2, 3, 32, 32), 122_336),
])  # fmt: skip
def test_shapes_and_weights(net: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    assert net(torch.randn(shape)).shape == (2, 10)
    assert sum(weight.numel() for weight in Targets().select(net).values()) == weights
