"""The strided network, by its shapes and its count of parameters."""

import pytest
import torch

from sparsity.models import StridedConvNet


def test_shapes_and_parameters() -> None:
    net = StridedConvNet()
    assert sum(p.numel() for p in net.parameters()) == 68_266
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    small = StridedConvNet(channels=1, classes=4, width=2)
    assert small(torch.randn(3, 1, 32, 32)).shape == (3, 4)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="width=0"):
        StridedConvNet(width=0)
