"""`sparse_linear` is the dense layer of a masked weight: results, gradients, dtypes, odd shapes, torch's own checks."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import compressed, decompressed, product, sparse_linear
from tests.ops.close import TOLERANCE, close

SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (1, 33, 17),
    (2, 16, 16),
    (9, 70, 50),
    (17, 31, 64),
    (40, 100, 3),
    (100, 257, 40),
    (300, 64, 33),
]
pytestmark = pytest.mark.usefixtures("backend")
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def case(batch: int, width: int, rows: int, density: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, y's slope, a weight, a mask, and a bias."""
    generator = torch.Generator().manual_seed(batch + width + rows)
    normal = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in
              [(batch, width), (batch, rows), (rows, width), (rows,)]]  # fmt: skip
    mask = torch.rand(rows, width, generator=generator) < density
    x, slope, weight, bias = (each.to(dtype) for each in normal)
    return x, slope, weight, mask, bias


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@dtypes
def test_it_is_the_dense_layer_of_the_masked_weight(
    shape: tuple[int, int, int], density: float, dtype: torch.dtype
) -> None:
    x, slope, weight, mask, bias = case(*shape, density, dtype)
    ours = [each.clone().requires_grad_() for each in (x, weight, bias)]
    theirs = [each.double().requires_grad_() for each in (x, weight, bias)]
    values, columns, starts = compressed(ours[1], mask)
    y = sparse_linear(ours[0], values, columns, starts, ours[2])
    torch.autograd.backward(y, slope)
    expected = F.linear(theirs[0], theirs[1] * mask, theirs[2])
    torch.autograd.backward(expected, slope.double())
    assert y.dtype == dtype
    close(y, expected, dtype)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert their.grad is not None
        assert mine.grad.dtype == dtype
        close(mine.grad, their.grad, dtype)
    assert not ours[1].grad[~mask].any()  # type: ignore[index]  # it has one


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2,), (2, 3), (2, 1, 20)], ids=str)
def test_any_leading_dimensions(batch: tuple[int, ...]) -> None:
    _, _, weight, mask, bias = case(1, 33, 20, 0.3)
    x = torch.randn(*batch, 33, dtype=torch.float64, requires_grad=True)
    y = sparse_linear(x, *compressed(weight, mask), bias)
    expected = F.linear(x, weight * mask, bias)
    assert torch.allclose(y, expected)
    [found] = torch.autograd.grad(y.sum(), x)
    [wanted] = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(found, wanted)


def test_rows_without_weights_and_weights_without_rows() -> None:
    for rows, width in ((0, 4), (4, 0), (4, 4)):
        weight = torch.zeros(rows, width)
        found = sparse_linear(torch.randn(5, width), *compressed(weight), torch.ones(rows))
        assert torch.equal(found, torch.ones(5, rows))


def test_what_is_not_there_takes_no_part(backend: str) -> None:
    if backend == "plain":
        pytest.skip("the dense matrix multiplies zeros with what is not finite")
    weight = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    x = torch.tensor([[float("nan"), 1.0]] * 3)
    found = sparse_linear(x, *compressed(weight))
    assert torch.equal(found[:, 0], torch.full((3,), 2.0))
    assert found[:, 1].isnan().all()


FRESH = """
import torch
from sparsity.ops import compressed, sparse_linear
torch.use_deterministic_algorithms(True)
for batch in (1, 3, 40, 300):
    x, weight = torch.randn(batch, 70), torch.randn(500, 70).mul(torch.rand(500, 70) < 0.2).requires_grad_()
    for _ in range(3):
        y = sparse_linear(x.requires_grad_(), *compressed(weight))
        found = torch.autograd.grad(y.square().sum(), (x, weight))
        wanted = torch.autograd.grad((x @ weight.t()).square().sum(), (x, weight))
        assert torch.allclose(found[0], wanted[0], rtol=1e-3, atol=1e-2)
        assert torch.allclose(found[1], wanted[1] * (weight != 0), rtol=1e-3, atol=1e-2)
"""


def test_memory_that_was_used_before_does_not_matter(backend: str) -> None:
    # glibc fills what it gives with other bytes, here and in C++, and torch what `empty` gives with NaN.
    code = f"from sparsity.ops import product\nproduct.WORK = {product.WORK}" + FRESH
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MALLOC_PERTURB_": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_weight_comes_back_as_it_was() -> None:
    _, _, weight, mask, _ = case(1, 33, 20, 0.3)
    values, columns, starts = compressed(weight, mask)
    assert columns.dtype == torch.int16
    assert torch.equal(decompressed(values, columns, starts, 33), weight * mask)
    assert torch.equal(values, weight[mask])


def test_wide_weights_have_wide_columns() -> None:
    weight = torch.zeros(2, 40_000)
    weight[1, 39_999] = 2.0
    weight[0, 5] = 1.0
    values, columns, starts = compressed(weight)
    assert columns.dtype == torch.int32
    x = torch.randn(3, 40_000)
    found = sparse_linear(x, values, columns, starts)
    assert torch.allclose(found, torch.stack([x[:, 5], 2 * x[:, 39_999]], 1))


def test_duplicates_add_up() -> None:
    values, columns, starts = torch.ones(2), torch.tensor([1, 1], dtype=torch.int32), torch.tensor([0, 2])
    assert torch.equal(sparse_linear(torch.tensor([[5.0, 7.0]] * 3), values, columns, starts), torch.full((3, 1), 14.0))


def test_tensors_that_are_not_contiguous() -> None:
    x, _, weight, mask, bias = case(20, 33, 18, 0.3)
    values, columns, starts = compressed(weight, mask)
    values, columns, starts = (torch.stack([each, each], -1)[..., 0] for each in (values, columns, starts))
    turned = x.t().contiguous().t()
    assert torch.allclose(sparse_linear(turned, values, columns, starts, bias), F.linear(x, weight * mask, bias))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_gradients_by_differences(density: float) -> None:
    x, _, weight, mask, bias = case(3, 5, 4, density)
    values, columns, starts = compressed(weight, mask)
    given = [each.requires_grad_() for each in (x, values, bias)]
    torch.autograd.gradcheck(lambda x, v, b: sparse_linear(x, v, columns, starts, b), given)
    torch.autograd.gradgradcheck(lambda x, v, b: sparse_linear(x, v, columns, starts, b), given)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_torchs_own_checks(batch: tuple[int, ...]) -> None:
    _, _, weight, mask, bias = case(1, 9, 6, 0.4, torch.float32)
    values, columns, starts = compressed(weight, mask)
    values.requires_grad_()
    x, y = torch.randn(*batch, 9, requires_grad=True), torch.randn(*batch, 6, requires_grad=True)
    for name, arguments in {
        "linear": (x, values, columns, starts, bias.requires_grad_()),
        "linear_input": (y, values, columns, starts, 9),
        "linear_values": (y, x, columns, starts),
    }.items():
        torch.library.opcheck(getattr(torch.ops.sparsity, name), arguments)


def test_it_compiles_as_a_whole() -> None:
    x, _, weight, mask, bias = case(20, 33, 18, 0.3, torch.float32)
    values, columns, starts = compressed(weight, mask)

    def both(x: Tensor, values: Tensor) -> Any:
        y = sparse_linear(x, values, columns, starts, bias).relu()
        return y, *torch.autograd.grad(y.sum(), (x, values))

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return sparse_linear(x, values, columns, starts, bias).relu()

    eager = both(x.requires_grad_(), values.requires_grad_())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x, values)
    found = [y, *torch.autograd.grad(y.sum(), (x, values))]
    for one, other in zip(eager, found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, slope, weight, mask, bias = case(20, 33, 18, 0.3, torch.float32)
    parameter = weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = sparse_linear(x, *compressed(parameter, mask), bias)
    assert y.dtype == dtype
    torch.autograd.backward(y, slope.to(dtype))
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32
    close(y, F.linear(x.double(), weight.double() * mask, bias.double()), torch.bfloat16)


def test_autocast_leaves_float64_alone() -> None:
    x, _, weight, mask, bias = case(20, 33, 18, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_linear(x, *compressed(weight, mask), bias).dtype == torch.float64


def test_shapes_without_numbers() -> None:
    values, columns, starts = compressed(torch.ones(2, 3))
    meta = [each.to("meta") for each in (torch.ones(4, 3), values, columns, starts)]
    assert sparse_linear(*meta).shape == (4, 2)


def test_layers_without_inputs_have_gradients() -> None:
    x, bias = torch.ones(5, 0, requires_grad=True), torch.ones(4, requires_grad=True)
    values, columns, starts = compressed(torch.zeros(4, 0))
    found = torch.autograd.grad(
        sparse_linear(x, values.requires_grad_(), columns, starts, bias).sum(), (x, values, bias)
    )
    assert [each.shape for each in found] == [(5, 0), (0,), (4,)]


BOMB = """
import resource, torch
from sparsity.ops import compressed, product, sparse_linear
values, columns, starts = compressed(torch.eye(4, 4_000_000))
x = torch.ones(3, 4_000_000)
sparse_linear(x[:, :4], *compressed(torch.eye(4)))
product.WORK = 0
sparse_linear(x[:, :4].contiguous(), *compressed(torch.eye(4)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), -1))
try:
    sparse_linear(x, values, columns, starts)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads what Linux says of memory")
def test_too_large_a_batch_is_an_error(backend: str) -> None:
    if backend == "plain":
        pytest.skip("of C++")
    done = subprocess.run([sys.executable, "-c", BOMB], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "there is no memory for the batch" in done.stdout


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.randn(2, 5)}, IndexError, "columns are from 0 to 6, the weight has 5"),
    ({"columns": torch.tensor([0, -1, 2], dtype=torch.int32)}, IndexError, "columns are from -1 to 2"),
    ({"starts": torch.tensor([0, 2, 4])}, IndexError, r"from 0 to 3, the number of columns, got \[0, 4\]"),
    ({"starts": torch.tensor([0, 4, 3])}, IndexError, "starts that rise"),
    ({"starts": torch.tensor([0, 2, 3], dtype=torch.int32)}, ValueError, "starts of int64"),
    ({"columns": torch.tensor([0, 1, 2])}, ValueError, "columns of int16 or int32"),
    ({"columns": torch.tensor([0, 1], dtype=torch.int32)}, ValueError, "as many values as columns"),
    ({"values": torch.randn(3).double()}, ValueError, "floating tensors of one dtype"),
    ({"x": torch.ones(2, 7, dtype=torch.int64), "values": torch.ones(3).long()}, ValueError, "floating tensors"),
    ({"bias": torch.randn(3)}, ValueError, "expected a bias of 2"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    given = {
        "x": torch.randn(2, 7), "values": torch.randn(3), "columns": torch.tensor([0, 6, 2], dtype=torch.int32),
        "starts": torch.tensor([0, 2, 3]), "bias": torch.randn(2),
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        sparse_linear(**given)


def test_places_are_looked_at_again_when_they_change() -> None:
    values, columns, starts = torch.randn(3), torch.tensor([0, 6, 2], dtype=torch.int32), torch.tensor([0, 2, 3])
    x = torch.randn(2, 7)
    sparse_linear(x, values, columns, starts)
    columns[0] = 9
    with pytest.raises(IndexError, match="from 2 to 9"):
        sparse_linear(x, values, columns, starts)


@pytest.mark.parametrize(("weight", "mask", "message"), [
    (torch.randn(3), None, "expected a matrix"),
    (torch.randn(3, 2), torch.ones(2, 3, dtype=torch.bool), r"expected a bool mask of \(3, 2\)"),
    (torch.randn(3, 2), torch.ones(3, 2), "expected a bool mask"),
])  # fmt: skip
def test_what_cannot_be_compressed_is_refused(weight: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressed(weight, mask)
