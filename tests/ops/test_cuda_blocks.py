"""The Triton of `block_sparse_linear`: on a GPU, or in the interpreter."""

import pytest
import torch
from torch.nn import functional as F

from sparsity.ops import block_sparse_linear, compressed_blocks, cuda
from tests.ops.close import close
from tests.ops.test_blocks import case

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, on NaN
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SHAPES = [(1, 33, 20, 16), (17, 70, 50, 32), (40, 100, 130, 64), (70, 129, 257, 128), (64, 128, 256, 128)]


@pytest.fixture(autouse=True)
def tf32() -> None:
    """Off: results are compared to those in float64."""
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(shape, 0.4, dtype, device)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_block_and_all(density: float, device: torch.device) -> None:
    check((20, 50, 70, 16), density, torch.float32, device)


def check(shape: tuple[int, int, int, int], density: float, dtype: torch.dtype, device: torch.device) -> None:
    x, slope, weight, mask, bias = case(*shape, density)
    if density < 1:  # a row of blocks and a column are empty
        mask[shape[3] * ((len(mask) - 1) // shape[3]) :] = False
        mask[:, : shape[3]] = False
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


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_activations(name: str, device: torch.device) -> None:
    x, _, weight, mask, bias = (each.to(device) for each in case(20, 33, 18, 16))
    x, weight, bias = x.float(), weight.float(), bias.float()
    x[0, 0], x[1, 0] = torch.nan, torch.inf
    y = block_sparse_linear(x, *compressed_blocks(weight, mask, 16), 18, bias, name)
    expected = getattr(F, name)(F.linear(x.double(), (weight * mask).double(), bias.double()))
    rows = slice(2, None)
    close(y[rows], expected[rows], torch.float32)
    assert y[0].isnan().any()


def test_sums_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "processors", lambda tensor: 4)
    check((150, 33, 20, 16), 1.0, torch.float32, device)
    check((150, 33, 20, 16), 1.0, torch.float16, device)


def test_what_lies_beyond_the_weight_is_not_looked_at_and_has_no_slope(device: torch.device) -> None:
    x, slope, weight, mask, _ = (each.to(device) for each in case(5, 33, 20, 16, 1.0))
    x, slope, weight = x.float(), slope.float(), weight.float()
    values, columns, starts = compressed_blocks(weight, mask, 16)
    inside = compressed_blocks(torch.ones_like(weight), mask, 16)[0] > 0
    values = torch.where(inside, values, float("nan"))
    y = block_sparse_linear(x.requires_grad_(), values, columns, starts, 20)
    [found] = torch.autograd.grad(y, x, slope)
    assert torch.allclose(y, F.linear(x, weight), atol=1e-5)
    assert torch.allclose(found, slope @ weight, atol=1e-5)
    x = x.detach()
    x[0, 0] = float("inf")
    assert not torch.ops.sparsity.blocks_values(slope, x, columns, starts, 16)[~inside].any()


def test_blocks_that_change_in_place_are_seen(device: torch.device) -> None:
    # The blocks by columns are remembered: of the same tensors, but not of what they were before.
    _, slope, weight, mask, _ = (each.to(device) for each in case(5, 48, 32, 16, 0.0))
    weight = weight.float()
    mask[:16, :16] = mask[16:, 32:] = True
    values, columns, starts = compressed_blocks(weight, mask, 16)
    for _ in range(2):
        found = torch.ops.sparsity.blocks_input(slope.float(), values, columns, starts, 48)
        assert torch.allclose(found, slope.float() @ (weight * mask), atol=1e-5)
    columns[0] = 1
    found = torch.ops.sparsity.blocks_input(slope.float(), values, columns, starts, 48)
    weight[:16, 16:32], mask[:16, :16], mask[:16, 16:32] = weight[:16, :16].clone(), False, True
    assert torch.allclose(found, slope.float() @ (weight * mask), atol=1e-5)


def test_nothing_is_compiled_again_when_blocks_change(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter compiles nothing")
    from sparsity.ops.cuda import blocks

    kernels = (blocks._product_kernel, blocks._values_kernel)
    counts = []
    for density in (0.3, 0.5, 0.8):
        check((64, 128, 256, 16), density, torch.float32, device)
        counts.append([sum(len(each[0]) for each in kernel.device_caches.values()) for kernel in kernels])
    assert counts[0] == counts[1] == counts[2]
