"""The Triton of `block_sparse_linear`: on a GPU, or in the interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import block_sparse_linear, compressed_blocks
from tests.ops.close import close
from tests.ops.test_blocks import case

HALF = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SHAPES = [(1, 33, 20, 16), (17, 70, 50, 32), (40, 100, 130, 64), (70, 129, 257, 128), (64, 128, 256, 128)]


@pytest.fixture(autouse=True)
def tf32() -> None:
    """Off: results are compared to those in float64."""
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(shape, 0.4, dtype, device)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_block_and_all(density: float, device: torch.device) -> None:
    check((20, 50, 70, 16), density, torch.float32, device)


def check(shape: tuple[int, int, int, int], density: float, dtype: torch.dtype, device: torch.device) -> None:
    x, slope, weight, mask, bias = case(*shape, density)
    mask[:, : shape[3]] = False  # a column of blocks that is empty, and
    mask[-1:] = mask[-1:] & (density == 1)
    mask[shape[3] * ((len(mask) - 1) // shape[3]) :] &= density == 1  # a row
    ours = [each.to(dtype).to(device).requires_grad_() for each in (x, weight, bias)]
    theirs = [each.detach().double().cpu().requires_grad_() for each in ours]
    values, columns, starts = compressed_blocks(ours[1], mask.to(device), shape[3])
    y = block_sparse_linear(ours[0], values, columns, starts, shape[2], ours[2])
    torch.autograd.backward(y, slope.to(dtype).to(device))
    expected = F.linear(theirs[0], theirs[1] * mask, theirs[2])
    torch.autograd.backward(expected, slope.to(dtype).double())
    assert y.dtype == dtype
    close(y.cpu(), expected, dtype)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert their.grad is not None
        close(mine.grad.cpu(), their.grad, dtype)
