"""`keep_` against the plain definition, for every dtype and layout."""

import math

import pytest
import torch
from torch import nn

from sparsity.ops import all_finite, keep_
from sparsity.ops.keep import CHUNK

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 3, 3), (CHUNK + 7,), (0, 4)])
def test_kept_bits_stay_and_the_rest_is_zero(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensor, mask = torch.randn(shape, dtype=torch.float64).to(dtype), torch.rand(shape) < 0.3
    expected = torch.where(mask, tensor, torch.zeros((), dtype=dtype))
    assert keep_(tensor, mask) is tensor
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_infinity_and_minus_zero(dtype: torch.dtype) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.0], dtype=dtype)
    pruned = keep_(values.clone(), torch.zeros(5, dtype=torch.bool))
    assert torch.equal(pruned, torch.zeros(5, dtype=dtype))
    assert not torch.signbit(pruned).any()
    kept = keep_(values.clone(), torch.ones(5, dtype=torch.bool))
    assert torch.equal(torch.signbit(kept), torch.signbit(values))
    assert torch.equal(kept.nan_to_num(7.0), values.nan_to_num(7.0))


@pytest.mark.parametrize("layout", ["transposed", "channels last", "every other"])
def test_layouts_that_are_not_contiguous(layout: str) -> None:
    torch.manual_seed(0)
    if layout == "transposed":
        tensor = torch.randn(1500, 1000).t()
    elif layout == "channels last":
        tensor = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
    else:
        tensor = torch.randn(40, 30)[::2, ::3]
    mask = torch.rand(tensor.shape) < 0.3
    expected = torch.where(mask, tensor, 0.0)
    assert torch.equal(keep_(tensor, mask), expected)


def test_parameters_that_require_gradients_and_their_versions() -> None:
    weight = nn.Parameter(torch.ones(4))
    before = weight._version
    keep_(weight, torch.tensor([True, False, True, False]))
    assert weight.tolist() == [1, 0, 1, 0]
    assert weight._version > before, "writes have to be seen by autograd"
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    assert all_finite(torch.randn(100).to(dtype))
    assert all_finite(torch.tensor([most, most, most], dtype=dtype)), "the sum overflows, the numbers do not"
    assert all_finite(torch.empty(0, dtype=dtype))
    for bad in (math.nan, math.inf, -math.inf):
        values = torch.zeros(1000, dtype=dtype)
        values[617] = bad
        assert not all_finite(values)
    assert not all_finite(torch.tensor([math.inf, -math.inf], dtype=dtype))
