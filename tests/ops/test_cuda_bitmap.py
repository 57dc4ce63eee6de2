"""The Triton of products with a bitmap of kept weights: on a GPU, or in the interpreter."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.close import close

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def packed(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, bits and starts, by NumPy."""
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    starts = torch.from_numpy(np.concatenate([[0], mask.sum(1).cumsum(0)]).astype(np.int64))
    return weight[mask], bits, starts


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 300, 40), (3, 257, 17), (16, 33, 16), (19, 70, 35)], ids=str)
def test_it_is_the_dense_layer(
    shape: tuple[int, int, int], dtype: torch.dtype, density: float, device: torch.device
) -> None:
    from sparsity.ops.cuda import bitmap

    batch, width, out = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, weight, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in [(batch, width), (out, width), (out,)]
    )
    mask = torch.rand(out, width, generator=generator) < density
    mask[out // 2] = False  # a row of nothing
    values, bits, starts = packed(weight, mask)
    values = torch.cat([values, values.new_full((64,), torch.nan)])  # what nobody may read
    for added in (bias, None):
        near = None if added is None else added.to(device)
        y = bitmap.linear(x.to(device), values.to(device), bits.to(device), starts.to(device), near, width)
        assert y.dtype == dtype
        expected = F.linear(x.double(), (weight * mask).double(), None if added is None else added.double())
        close(y.cpu(), expected, dtype)
