"""`block_sparse_linear` is the dense layer of a weight masked by blocks: results, gradients, odd shapes, own checks."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import block_sparse_linear, compressed_blocks, decompressed_blocks, product
from tests.ops.close import TOLERANCE, close

SHAPES = [(1, 16, 16), (3, 33, 20), (2, 16, 70), (17, 70, 50), (40, 100, 130), (150, 64, 33), (70, 129, 257)]
pytestmark = pytest.mark.usefixtures("backend")
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def case(batch: int, width: int, rows: int, side: int, density: float = 0.4) -> tuple[Tensor, ...]:
    """x, y's slope, a weight, a mask of whole blocks, and a bias: float64."""
    generator = torch.Generator().manual_seed(batch + width + rows + side)
    x, slope, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(batch, width), (batch, rows), (rows, width), (rows,)]
    )
    blocks = torch.rand(-(-rows // side), -(-width // side), generator=generator) < density
    mask = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :width]
    return x, slope, weight, mask, bias


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_dense_layer_of_the_masked_weight(shape: tuple[int, int, int], side: int, density: float) -> None:
    check(shape, side, density, torch.float64)


@dtypes
def test_dtypes(dtype: torch.dtype) -> None:
    check((40, 100, 130), 32, 0.4, dtype)


def check(shape: tuple[int, int, int], side: int, density: float, dtype: torch.dtype) -> None:
    x, slope, weight, mask, bias = case(*shape, side, density)
    ours = [each.to(dtype).requires_grad_() for each in (x, weight, bias)]
    theirs = [each.detach().double().requires_grad_() for each in ours]
    values, columns, starts = compressed_blocks(ours[1], mask, side)
    y = block_sparse_linear(ours[0], values, columns, starts, shape[2], ours[2])
    torch.autograd.backward(y, slope.to(dtype))
    expected = F.linear(theirs[0], theirs[1] * mask, theirs[2])
    torch.autograd.backward(expected, slope.to(dtype).double())
    assert y.dtype == dtype
    close(y, expected, dtype)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert their.grad is not None
        assert mine.grad.dtype == dtype
        close(mine.grad, their.grad, dtype)
    assert ours[1].grad is not None
    assert not ours[1].grad[~mask].any()


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)], ids=str)
def test_any_leading_dimensions(batch: tuple[int, ...]) -> None:
    _, _, weight, mask, bias = case(1, 33, 20, 16)
    x = torch.randn(*batch, 33, dtype=torch.float64, requires_grad=True)
    y = block_sparse_linear(x, *compressed_blocks(weight, mask, 16), 20, bias)
    expected = F.linear(x, weight * mask, bias)
    assert torch.allclose(y, expected)
    [found], [wanted] = (torch.autograd.grad(each.sum(), x) for each in (y, expected))
    assert torch.allclose(found, wanted)


def test_a_weight_comes_back_as_it_was() -> None:
    _, _, weight, mask, _ = case(1, 70, 50, 32)
    values, columns, starts = compressed_blocks(weight, mask)
    assert values.shape[1:] == (32, 32)
    assert torch.equal(decompressed_blocks(values, columns, starts, 50, 70), weight * mask)
    found = compressed_blocks(weight * mask)
    assert all(torch.equal(*pair) for pair in zip(found, (values, columns, starts), strict=True))


def test_what_lies_beyond_the_weight_is_not_looked_at() -> None:
    x, slope, weight, mask, _ = case(5, 33, 20, 16, 1.0)
    values, columns, starts = compressed_blocks(weight, mask, 16)
    inside = compressed_blocks(torch.ones_like(weight), mask, 16)[0] > 0
    values = torch.where(inside, values, float("nan"))
    x.requires_grad_()
    y = block_sparse_linear(x, values, columns, starts, 20)
    [found] = torch.autograd.grad(y, x, slope)
    assert torch.allclose(y, F.linear(x, weight))
    assert torch.allclose(found, slope @ weight)


def test_slopes_beyond_the_weight_are_zero() -> None:
    x, slope, weight, mask, _ = case(5, 33, 20, 16, 1.0)
    x[0, 0] = float("inf")
    _, columns, starts = compressed_blocks(weight, mask, 16)
    found = torch.ops.sparsity.blocks_values(slope, x, columns, starts, 16)
    inside = compressed_blocks(torch.ones_like(weight), mask, 16)[0] > 0
    assert not found[~inside].any()


def test_gradients_by_differences() -> None:
    x, _, weight, mask, bias = case(2, 18, 17, 16, 0.5)
    values, columns, starts = compressed_blocks(weight, mask, 16)
    given = [each.requires_grad_() for each in (x, values, bias)]

    def layer(x: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return block_sparse_linear(x, v, columns, starts, 17, b)

    torch.autograd.gradcheck(layer, given, fast_mode=True)
    torch.autograd.gradgradcheck(layer, given, fast_mode=True)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_torchs_own_checks(batch: tuple[int, ...]) -> None:
    _, _, weight, mask, bias = case(1, 33, 20, 16)
    values, columns, starts = compressed_blocks(weight.float(), mask, 16)
    values.requires_grad_()
    x, y = torch.randn(*batch, 33, requires_grad=True), torch.randn(*batch, 20, requires_grad=True)
    for name, arguments in {
        "blocks": (x, values, columns, starts, bias.float().requires_grad_(), 20),
        "blocks_input": (y, values, columns, starts, 33),
        "blocks_values": (y, x, columns, starts, 16),
    }.items():
        torch.library.opcheck(getattr(torch.ops.sparsity, name), arguments)


def test_it_compiles_as_a_whole() -> None:
    x, _, weight, mask, bias = case(20, 33, 18, 16)
    values, columns, starts = compressed_blocks(weight, mask, 16)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return block_sparse_linear(x, values, columns, starts, 18, bias).relu()

    given = (x.requires_grad_(), values.requires_grad_())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for function in (layer, compiled):
        y = function(*given)
        assert torch.allclose(y, F.linear(x, weight * mask, bias).relu())
        found = torch.autograd.grad(y.sum(), given)
        assert [each.shape for each in found] == [each.shape for each in given]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, slope, weight, mask, bias = (each.float() if each.is_floating_point() else each for each in case(20, 33, 18, 16))
    parameter = weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = block_sparse_linear(x, *compressed_blocks(parameter, mask, 16), 18, bias)
    assert y.dtype == dtype
    torch.autograd.backward(y, slope.to(dtype))
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32
    close(y, F.linear(x.double(), weight.double() * mask, bias.double()), torch.bfloat16)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_activations(name: str) -> None:
    x, slope, weight, mask, bias = case(20, 33, 18, 16)
    blocks = compressed_blocks(weight, mask, 16)
    y = block_sparse_linear(x, *blocks, 18, bias, name)
    expected = getattr(F, name)(F.linear(x.requires_grad_(), weight * mask, bias))
    learned = block_sparse_linear(x, *blocks, 18, bias, activation=name)
    assert torch.allclose(y, expected)
    assert torch.allclose(learned, expected)
    [found], [wanted] = (torch.autograd.grad(each, x, slope) for each in (learned, expected))
    assert torch.allclose(found, wanted)
    with torch.no_grad():
        compiled = torch.compile(block_sparse_linear, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x, *blocks, 18, bias, name), expected)
    torch.library.opcheck(torch.ops.sparsity.blocks_activated, (x.detach(), *blocks, bias, 18, name))


def test_other_activations_are_refused() -> None:
    x, _, weight, mask, _ = case(2, 33, 18, 16)
    with pytest.raises(ValueError, match="expected an activation of relu, gelu, silu or None, got 'tanh'"):
        block_sparse_linear(x, *compressed_blocks(weight, mask, 16), 18, activation="tanh")


FRESH = """
import torch
from sparsity.ops import compressed_blocks, block_sparse_linear
torch.use_deterministic_algorithms(True)
for batch in (1, 40, 300):
    mask = (torch.rand(7, 3) < 0.5).repeat_interleave(32, 0).repeat_interleave(32, 1)[:200, :70]
    x, weight = torch.randn(batch, 70, requires_grad=True), torch.randn(200, 70).mul(mask).requires_grad_()
    for _ in range(3):
        y = block_sparse_linear(x, *compressed_blocks(weight, mask), 200)
        found = torch.autograd.grad(y.square().sum(), (x, weight))
        wanted = torch.autograd.grad((x @ weight.t()).square().sum(), (x, weight))
        assert torch.allclose(found[0], wanted[0], rtol=1e-3, atol=1e-2)
        assert torch.allclose(found[1], wanted[1] * mask, rtol=1e-3, atol=1e-2)
"""


def test_memory_that_was_used_before_does_not_matter() -> None:
    # glibc fills what it gives with other bytes, here and in C++, and torch what `empty` gives with NaN.
    code = f"from sparsity.ops import product\nproduct.WORK = {product.WORK}" + FRESH
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MALLOC_PERTURB_": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"columns": torch.tensor([0, 3], dtype=torch.int32)}, IndexError, "columns are from 0 to 3, the weight has 3"),
    ({"columns": torch.tensor([0, 1])}, ValueError, "columns of int32"),
    ({"starts": torch.tensor([0, 1, 3])}, IndexError, "from 0 to 2"),
    ({"starts": torch.tensor([0, 2])}, ValueError, "have 2 block rows, starts say 1"),
    ({"values": torch.randn(2, 16, 8)}, ValueError, "expected 2 square blocks"),
    ({"values": torch.randn(2, 24, 24)}, ValueError, "square blocks of 16, 32, 64 or 128"),
    ({"values": torch.randn(2, 16, 16).double()}, ValueError, "floating tensors of one dtype"),
    ({"bias": torch.randn(3)}, ValueError, "expected a bias of 20"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    given = {
        "x": torch.randn(2, 33), "values": torch.randn(2, 16, 16), "columns": torch.tensor([0, 2], dtype=torch.int32),
        "starts": torch.tensor([0, 1, 2]), "bias": torch.randn(20),
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        block_sparse_linear(**given, out=20)  # type: ignore[arg-type]  # none is the activation


@pytest.mark.parametrize(("weight", "mask", "side", "message"), [
    (torch.randn(3), None, 16, "expected a matrix"),
    (torch.randn(32, 32), None, 8, "a side of 16, 32, 64, 128, got 8"),
    (torch.randn(32, 32), torch.ones(16, 32, dtype=torch.bool), 16, "expected a bool mask"),
    (torch.randn(32, 32), torch.eye(32, dtype=torch.bool), 16, "block row 0, block column 0 in part"),
])  # fmt: skip
def test_what_cannot_be_compressed_is_refused(weight: Tensor, mask: Tensor | None, side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressed_blocks(weight, mask, side)


def test_what_was_traced_without_gradients_refuses_to_give_any() -> None:
    x = torch.randn(2, 16, requires_grad=True)
    values, columns, starts = compressed_blocks(torch.randn(16, 16), side=16)
    y = torch.ops.sparsity.blocks_activated(x, values, columns, starts, None, 16, "relu")
    with pytest.raises(RuntimeError, match="blocks_activated has no gradient"):
        y.sum().backward()
