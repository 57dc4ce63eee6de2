"""`bitmap_linear` is the dense layer of a masked weight: results, gradients, odd shapes, processors, own checks."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.ops import bitmap, bitmap_linear, compressed_bitmap, decompressed_bitmap, native, product
from tests.ops.close import TOLERANCE, close

SHAPES = [(1, 1, 1), (1, 16, 4), (2, 33, 17), (3, 5, 7), (4, 64, 40), (5, 31, 64), (9, 100, 3), (17, 257, 33)]
backends = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are dense in several parts."""
    monkeypatch.setattr(bitmap, "SLAB", 200)


def case(batch: int, width: int, rows: int, density: float) -> tuple[Tensor, ...]:
    """x, y's slope, a weight, a mask with a row that keeps nothing and one that keeps all, and a bias: float64."""
    generator = torch.Generator().manual_seed(batch + width + rows)
    x, slope, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(batch, width), (batch, rows), (rows, width), (rows,)]
    )
    mask = torch.rand(rows, width, generator=generator) < density
    if rows > 3:
        mask[1], mask[2] = False, True
    return x, slope, weight, mask, bias


@backends
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_the_dense_layer_of_the_masked_weight(
    shape: tuple[int, int, int], density: float, dtype: torch.dtype
) -> None:
    x, slope, weight, mask, bias = case(*shape, density)
    ours = [each.to(dtype).requires_grad_() for each in (x, weight, bias)]
    theirs = [each.detach().double().requires_grad_() for each in ours]
    y = bitmap_linear(ours[0], *compressed_bitmap(ours[1], mask), ours[2])
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


@backends
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 1, 20)], ids=str)
def test_any_leading_dimensions(batch: tuple[int, ...]) -> None:
    _, _, weight, mask, bias = case(1, 33, 20, 0.4)
    x = torch.randn(*batch, 33, dtype=torch.float64, requires_grad=True)
    y = bitmap_linear(x, *compressed_bitmap(weight, mask), bias)
    expected = F.linear(x, weight * mask, bias)
    assert torch.allclose(y, expected)
    [found], [wanted] = (torch.autograd.grad(each.sum(), x) for each in (y, expected))
    assert torch.allclose(found, wanted)


@backends
def test_rows_without_weights_and_weights_without_rows() -> None:
    for rows, width in ((0, 4), (4, 0), (4, 4)):
        x, bias = torch.randn(5, width, requires_grad=True), torch.ones(rows, requires_grad=True)
        values, bits, starts = compressed_bitmap(torch.zeros(rows, width))
        found = bitmap_linear(x, values.requires_grad_(), bits, starts, bias)
        assert torch.equal(found, torch.ones(5, rows))
        slopes = torch.autograd.grad(found.sum(), (x, values, bias))
        assert [each.shape for each in slopes] == [(5, width), (0,), (rows,)]


def test_the_format_by_hand() -> None:
    weight = torch.zeros(3, 10)
    weight[0, 0], weight[0, 9], weight[2, 3] = 5.0, 6.0, 7.0
    values, bits, starts = compressed_bitmap(weight)
    assert values.tolist() == [5.0, 6.0, 7.0]
    assert bits.dtype == torch.uint8
    assert bits.tolist() == [[1, 2], [0, 0], [8, 0]]
    assert starts.dtype == torch.int64
    assert starts.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 40])
def test_a_weight_comes_back_as_it_was(width: int) -> None:
    _, _, weight, mask, _ = case(1, width, 20, 0.4)
    parameter = weight.clone().requires_grad_()
    values, bits, starts = compressed_bitmap(parameter, mask)
    found = decompressed_bitmap(values, bits, starts, width)
    assert torch.equal(found, weight * mask)
    torch.autograd.backward(found, weight)
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, weight * mask)


FRESH = """
import torch
from sparsity.ops import compressed_bitmap, bitmap_linear
torch.use_deterministic_algorithms(True)
for batch in (1, 3, 40):
    mask = torch.rand(501, 70) < 0.4
    mask[-3:] = False
    x, weight = torch.randn(batch, 70, requires_grad=True), torch.randn(501, 70).mul(mask).requires_grad_()
    for _ in range(3):
        y = bitmap_linear(x, *compressed_bitmap(weight, mask))
        found = torch.autograd.grad(y.square().sum(), (x, weight))
        wanted = torch.autograd.grad((x @ weight.t()).square().sum(), (x, weight))
        assert torch.allclose(found[0], wanted[0], rtol=1e-3, atol=1e-2)
        assert torch.allclose(found[1], wanted[1] * mask, rtol=1e-3, atol=1e-2)
"""


def test_memory_that_was_used_before_does_not_matter() -> None:
    # glibc fills what it gives with other bytes, here and in C++, and torch what `empty` gives with NaN.
    code = "from sparsity.ops import product\nproduct.WORK = 0" + FRESH
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MALLOC_PERTURB_": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
def test_processors_without_long_vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if native.library("bitmap") is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "cpu").mkdir()
    for name in ("bitmap.cpp", "tiles.h"):
        (tmp_path / "cpu" / name).write_bytes((native.SOURCES / name).read_bytes())
    monkeypatch.setattr(native, "SOURCES", tmp_path / "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("-std=c++17", "-O1", "-march=x86-64", "-shared", "-fPIC"))
    monkeypatch.setattr(product, "WORK", 0)
    native.library.cache_clear()
    try:
        assert native.library("bitmap") is not None
        for shape in SHAPES:
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                test_it_is_the_dense_layer_of_the_masked_weight(shape, 0.4, dtype)
    finally:
        native.library.cache_clear()


@backends
def test_tensors_that_are_not_contiguous() -> None:
    x, slope, weight, mask, bias = case(5, 33, 18, 0.4)
    values, bits, starts = (torch.stack([each, each], -1)[..., 0] for each in compressed_bitmap(weight, mask))
    turned = x.t().contiguous().t().requires_grad_()
    y = bitmap_linear(turned, values, bits, starts, bias)
    assert torch.allclose(y, F.linear(x, weight * mask, bias))
    [found] = torch.autograd.grad(y, turned, slope.t().contiguous().t())
    assert torch.allclose(found, slope @ (weight * mask))


@backends
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_gradients_by_differences(density: float) -> None:
    x, _, weight, mask, bias = case(3, 9, 5, density)
    values, bits, starts = compressed_bitmap(weight, mask)
    given = [each.requires_grad_() for each in (x, values, bias)]
    torch.autograd.gradcheck(lambda x, v, b: bitmap_linear(x, v, bits, starts, b), given)
    torch.autograd.gradgradcheck(lambda x, v, b: bitmap_linear(x, v, bits, starts, b), given)


@backends
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_torchs_own_checks(batch: tuple[int, ...]) -> None:
    _, _, weight, mask, bias = (each.float() if each.is_floating_point() else each for each in case(1, 9, 6, 0.4))
    values, bits, starts = compressed_bitmap(weight, mask)
    values.requires_grad_()
    x, y = torch.randn(*batch, 9, requires_grad=True), torch.randn(*batch, 6, requires_grad=True)
    for name, arguments in {
        "bitmap": (x, values, bits, starts, bias.requires_grad_()),
        "bitmap_input": (y, values, bits, starts, 9),
        "bitmap_values": (y, x, bits, starts, len(values)),
    }.items():
        torch.library.opcheck(getattr(torch.ops.sparsity, name), arguments)


@backends
def test_it_compiles_as_a_whole() -> None:
    x, _, weight, mask, bias = case(20, 33, 18, 0.4)
    values, bits, starts = compressed_bitmap(weight, mask)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return bitmap_linear(x, values, bits, starts, bias).relu()

    given = (x.requires_grad_(), values.requires_grad_())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        y = function(*given)
        assert torch.allclose(y, F.linear(x, weight * mask, bias).relu())
        results.append(torch.autograd.grad(y.sum(), given))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, slope, weight, mask, bias = (
        each.float() if each.is_floating_point() else each for each in case(20, 33, 18, 0.4)
    )
    parameter = weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = bitmap_linear(x, *compressed_bitmap(parameter, mask), bias)
    assert y.dtype == dtype
    torch.autograd.backward(y, slope.to(dtype))
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32
    close(y, F.linear(x.double(), weight.double() * mask, bias.double()), torch.bfloat16)


def test_shapes_without_numbers() -> None:
    meta = [each.to("meta") for each in (torch.ones(4, 3), *compressed_bitmap(torch.ones(2, 3)))]
    assert bitmap_linear(*meta).shape == (4, 2)


@backends
@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.randn(2, 8)}, ValueError, r"2 rows of 8 columns have bits of \(2, 1\) and flat values, got \(2, 2\)"),
    ({"x": torch.randn(2, 9)}, ValueError, "bits beyond the 9 columns of the weight are set"),
    ({"bits": torch.tensor([[1, 2], [0, 4]], dtype=torch.uint8)}, ValueError, "bits beyond the 10 columns"),
    ({"bits": torch.tensor([[1, 2], [0, 3]], dtype=torch.uint8)}, IndexError, "bits that are set in each row"),
    ({"bits": torch.tensor([[1, 2], [0, 1]])}, ValueError, "expected bits of uint8"),
    ({"bits": torch.zeros(3, 2, dtype=torch.uint8)}, ValueError, r"have bits of \(2, 2\) and flat values"),
    ({"starts": torch.tensor([0, 1, 3])}, IndexError, "bits that are set in each row"),
    ({"starts": torch.tensor([1, 3, 4])}, IndexError, "starts that rise from 0"),
    ({"starts": torch.tensor([0, 2, 3], dtype=torch.int32)}, ValueError, "starts of int64"),
    ({"starts": torch.zeros(0, dtype=torch.int64)}, ValueError, "starts of int64"),
    ({"values": torch.randn(4)}, IndexError, "the bits keep 3 weights, and there are 4 values"),
    ({"values": torch.randn(3, 1)}, ValueError, r"flat values, got \(2, 2\) and \(3, 1\)"),
    ({"values": torch.randn(3).double()}, ValueError, "floating tensors of one dtype"),
    ({"x": torch.ones(2, 10).long(), "values": torch.ones(3).long()}, ValueError, "floating tensors"),
    ({"bias": torch.randn(3)}, ValueError, "expected a bias of 2"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    given = {
        "x": torch.randn(2, 10), "values": torch.randn(3), "bits": torch.tensor([[1, 2], [0, 1]], dtype=torch.uint8),
        "starts": torch.tensor([0, 2, 3]), "bias": torch.randn(2),
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        bitmap_linear(**given)


@backends
def test_gradients_of_other_batches_are_refused() -> None:
    values, bits, starts = compressed_bitmap(torch.ones(2, 10))
    with pytest.raises(ValueError, match="expected one batch"):
        torch.ops.sparsity.bitmap_values(torch.randn(3, 2), torch.randn(4, 10), bits, starts, 20)
    with pytest.raises(ValueError, match="one number for each row"):
        torch.ops.sparsity.bitmap_input(torch.randn(3, 3), values, bits, starts, 10)


def test_bits_are_looked_at_again_when_they_change() -> None:
    values, bits, starts = compressed_bitmap(torch.ones(2, 10))
    x = torch.randn(2, 10)
    bitmap_linear(x, values, bits, starts)
    with pytest.raises(IndexError, match="there are 19 values"):
        bitmap_linear(x, values[:-1], bits, starts)
    bits[0, 0] = 0
    with pytest.raises(IndexError, match="starts"):
        bitmap_linear(x, values, bits, starts)


@pytest.mark.parametrize(("weight", "mask", "message"), [
    (torch.randn(3), None, "expected a matrix"),
    (torch.randn(3, 2), torch.ones(2, 3, dtype=torch.bool), r"expected a bool mask of \(3, 2\)"),
    (torch.randn(3, 2), torch.ones(3, 2), "expected a bool mask"),
])  # fmt: skip
def test_what_cannot_be_compressed_is_refused(weight: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressed_bitmap(weight, mask)
