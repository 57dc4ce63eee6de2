"""`semi_sparse_linear` is the dense layer of the masked weight, by whatever computes it.

Without a GPU the kernels' part is taken by torch's own class of packed matrices, packing on the CPU, with a product of
what it unpacks.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsity.ops import semi, semi_sparse_linear
from sparsity.patterns import nm_mask, parse
from tests.ops.close import TOLERANCE, close

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
CUDA = torch.cuda.is_available()


class Packed(SparseSemiStructuredTensorCUTLASS):
    """Packs and unpacks as CUTLASS does, and counts it; the product is that of the dense matrix."""

    made: list[tuple[int, ...]] = []  # noqa: RUF012  # emptied by the fixture

    @classmethod
    def from_dense(cls, matrix: Tensor, alg_id: int = 0) -> "Packed":
        cls.made.append(tuple(matrix.shape))
        values, meta = sparse_semi_structured_from_dense_cutlass(matrix)  # type: ignore[no-untyped-call]  # torch's
        return cls(matrix.shape, values, meta, None, None, None)

    def _mm(
        self, B: Tensor, *, bias: Tensor | None = None, should_transpose_dense: bool = False, **kwargs: Any
    ) -> Tensor:
        assert should_transpose_dense, "x is the second factor"
        matrix = sparse_semi_structured_to_dense_cutlass(self.packed, self.meta)  # type: ignore[no-untyped-call]
        return F.linear(B, matrix, bias)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The op finds kernels; the shapes of what it packs."""
    Packed._PROTOTYPE_WARNING_SHOWN = False
    with pytest.warns(UserWarning, match="prototype stage"):
        Packed.from_dense(torch.zeros(32, 64).half())
    monkeypatch.setattr(semi, "_kinds", lambda device, dtype: (Packed,))
    Packed.made.clear()
    yield Packed.made
    semi._PACKED.clear()


def case(batch: int, width: int, rows: int, pattern: str = "2:4") -> tuple[Tensor, ...]:
    """x, y's slope, a weight, its mask, a bias: float64."""
    generator = torch.Generator().manual_seed(batch + width + rows)
    x, slope, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(batch, width), (batch, rows), (rows, width), (rows,)]
    )
    return x, slope, weight, parse(pattern)(weight.abs(), weight.numel() // 2), bias


def check(case: tuple[Tensor, ...], dtype: torch.dtype, masked: bool = True) -> None:
    x, slope, weight, mask, bias = case
    weight = weight if masked else weight * mask
    ours = [each.to(dtype).requires_grad_() for each in (x, weight, bias)]
    theirs = [each.detach().double().requires_grad_() for each in ours]
    y = semi_sparse_linear(ours[0], ours[1], ours[2], mask if masked else None)
    torch.autograd.backward(y, slope.to(dtype))
    expected = F.linear(theirs[0], theirs[1] * (mask if masked else 1), theirs[2])
    torch.autograd.backward(expected, slope.to(dtype).double())
    assert y.dtype == dtype
    close(y, expected, dtype)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert their.grad is not None
        assert mine.grad.dtype == dtype
        close(mine.grad, their.grad, dtype)
    assert ours[1].grad is not None
    assert bool(ours[1].grad[~mask].any()) != masked, "without a mask the gradient goes to all weights"


@dtypes
@pytest.mark.parametrize("masked", [True, False])
def test_it_is_the_dense_layer_of_the_masked_weight(dtype: torch.dtype, masked: bool) -> None:
    check(case(9, 20, 33), dtype, masked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("pattern", "shapes"), [("2:4", [(64, 128)]), ("2:4T", [(64, 128), (128, 64)])])
def test_packed_weights_compute_the_same(
    packing: list[tuple[int, ...]], dtype: torch.dtype, masked: bool, pattern: str, shapes: list[tuple[int, int]]
) -> None:
    check(case(9, 128, 64, pattern), dtype, masked)
    assert packing == shapes, "the transpose is packed where it is 2:4, too"


@pytest.mark.skipif(not CUDA, reason="no CUDA device here: the kernels themselves are not run")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "2:4T"])
@pytest.mark.parametrize("batch", [1, 9, 256])
def test_kernels_compute_the_same(dtype: torch.dtype, pattern: str, batch: int) -> None:
    weight = torch.empty(256, 512, dtype=dtype, device="cuda")
    if not semi.has_kernels(weight):
        pytest.skip("this device has no 2:4 kernels")
    check(tuple(each.cuda() for each in case(batch, 512, 256, pattern)), dtype)


def test_weights_are_packed_once_and_after_each_change(packing: list[tuple[int, ...]]) -> None:
    x, _, weight, mask, bias = (each.half() if each.is_floating_point() else each for each in case(3, 64, 32))
    for _ in range(3):
        first = semi_sparse_linear(x, weight, bias, mask)
    assert len(packing) == 1
    weight.mul_(2)
    assert torch.allclose(semi_sparse_linear(x, weight, None, mask), 2 * (first - bias), atol=0.1)
    mask[:] = nm_mask(torch.rand(32, 64), 2, 4)
    second = semi_sparse_linear(x, weight, bias, mask)
    close(second, F.linear(x.double(), weight.double() * mask, bias.double()), torch.float16)
    weight.data = weight.data.clone()
    semi_sparse_linear(x, weight, bias, mask)
    assert len(packing) == 4
    del weight
    assert not semi._PACKED, "what is packed goes with its weight"


def test_weights_without_the_pattern_are_dense(packing: list[tuple[int, ...]]) -> None:
    x, _, weight, _, bias = case(5, 64, 32)
    every = torch.ones_like(weight, dtype=torch.bool)
    with torch.no_grad():
        y = semi_sparse_linear(x.half(), weight.half(), bias.half(), every)
    close(y, F.linear(x.half().double(), weight.half().double(), bias.half().double()), torch.float16)
    check(case(5, 20, 33), torch.float16)  # a shape that kernels do not take
    check(case(5, 64, 32), torch.float32)  # nor this dtype
    assert not packing


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_leading_dimensions_and_strides(
    packing: list[tuple[int, ...]], batch: tuple[int, ...], transposed: bool
) -> None:
    _, _, weight, mask, bias = (each.half() if each.is_floating_point() else each for each in case(1, 64, 32, "2:4T"))
    if transposed:
        weight, mask = weight.t().contiguous().t(), mask.t().contiguous().t()
    x = torch.randn(64, *batch).half().movedim(0, -1).requires_grad_()
    y = semi_sparse_linear(x, weight, bias, mask)
    expected = F.linear(x, weight * mask, bias)
    assert y.shape == expected.shape
    assert torch.allclose(y, expected, atol=0.05)
    [found], [wanted] = (torch.autograd.grad(each.sum(), x) for each in (y, expected))
    assert torch.allclose(found, wanted, atol=0.05)


def test_gradients_by_differences() -> None:
    x, _, weight, mask, bias = case(3, 8, 5)
    given = [each.requires_grad_() for each in (x, weight, bias)]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return semi_sparse_linear(x, weight, bias, mask)

    torch.autograd.gradcheck(layer, given)
    torch.autograd.gradgradcheck(layer, given, fast_mode=True)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_torchs_own_checks(batch: tuple[int, ...]) -> None:
    _, _, weight, mask, bias = (each.float() if each.is_floating_point() else each for each in case(1, 20, 33))
    weight.requires_grad_()
    x, y = torch.randn(*batch, 20, requires_grad=True), torch.randn(*batch, 33, requires_grad=True)
    torch.library.opcheck(torch.ops.sparsity.semi, (x, weight, bias.requires_grad_(), mask))
    torch.library.opcheck(torch.ops.sparsity.semi_input, (y, weight, None))


@pytest.mark.usefixtures("packing")
def test_it_compiles_as_a_whole() -> None:
    x, _, weight, mask, bias = (each.half() if each.is_floating_point() else each for each in case(8, 64, 32, "2:4T"))
    given = (x.requires_grad_(), weight.requires_grad_())

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return semi_sparse_linear(x, weight, bias, mask).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*given).sum(), given)
    wanted = torch.autograd.grad(F.linear(given[0], given[1] * mask, bias).relu().sum(), given)
    for mine, their in zip(found, wanted, strict=True):
        close(mine, their.double(), torch.float16)


@pytest.mark.parametrize("kernels", [True, False])
def test_autocast(kernels: bool, request: pytest.FixtureRequest) -> None:
    packing = request.getfixturevalue("packing") if kernels else []
    x, slope, weight, mask, bias = (each.float() if each.is_floating_point() else each for each in case(8, 64, 32))
    weight.requires_grad_()
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = semi_sparse_linear(given, weight, bias, mask)
        assert y.dtype == torch.bfloat16
        close(y, F.linear(x.double(), weight.double() * mask, bias.double()), torch.bfloat16)
        [found] = torch.autograd.grad(y, weight, slope.bfloat16())
        assert found.dtype == torch.float32
        close(found, (slope.double().t() @ x.double()) * mask, torch.bfloat16)
    assert len(packing) == kernels, "one cast, one packing"


def test_inference_tensors(packing: list[tuple[int, ...]]) -> None:
    with torch.inference_mode():
        x, weight = torch.randn(4, 64).half(), torch.randn(32, 64).half()
        mask = nm_mask(weight, 2, 4)
        for _ in range(2):
            assert torch.allclose(semi_sparse_linear(x, weight, None, mask), x @ (weight * mask).t(), atol=0.05)
    assert len(packing) == 2, "they do not tell whether they have changed"


def test_where_there_are_no_kernels_a_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    semi._kinds.cache_clear()
    x, _, weight, mask, _ = case(5, 64, 32)
    with caplog.at_level(logging.INFO, "sparsity"):
        for _ in range(3):
            semi_sparse_linear(x.half(), weight.half(), None, mask)
    assert len(caplog.records) == 1
    assert "cpu has no 2:4 kernels for torch.float16" in caplog.text
    assert not semi.has_kernels(weight.half())


@pytest.mark.parametrize(("matrix", "is_so"), [
    ([[1, 0, 2, 0, 0, 0, 0, 0]], True), ([[1, 1, 1, 0]], False), ([[0, 1, 1, 1, 0, 0]], False), ([[0, 0, 0, 0]], True),
    ([[0, 0, 1, 1, 1, 1, 0, 0]], True), ([[-0.0, float("nan"), float("inf"), 0]], True), ([[]], True),
])  # fmt: skip
def test_the_pattern_by_hand(matrix: list[list[float]], is_so: bool) -> None:
    assert semi.is_semi_sparse(torch.tensor(matrix)) == is_so


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.randn(2, 7)}, r"expected x \[..., in\]"), ({"weight": torch.randn(8)}, r"a weight \[out, in\]"),
    ({"bias": torch.randn(3)}, "expected a bias of 5"), ({"mask": torch.ones(5, 8)}, "expected a bool mask"),
    ({"mask": torch.ones(8, 5, dtype=torch.bool)}, "expected a bool mask"),
    ({"weight": torch.randn(5, 8).double()}, "one dtype"), ({"bias": torch.randn(5).double()}, "one dtype"),
    ({"bias": torch.randn(5, device="meta")}, "one device"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.randn(2, 8), "weight": torch.randn(5, 8)} | change
    with pytest.raises(ValueError, match=message):
        semi_sparse_linear(**given)


@pytest.mark.parametrize("fused", [False, True])
def test_what_an_optimizer_steps_is_packed_anew(fused: bool, packing: list[tuple[int, ...]]) -> None:
    x, _, weight, mask, _ = (each.half() if each.is_floating_point() else each for each in case(8, 64, 32))
    weight = weight.requires_grad_()
    optimizer = torch.optim.AdamW([weight], 0.1, eps=1e-3, fused=fused)  # its own is zero in 16 bits
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(semi_sparse_linear(x, weight, None, mask).float().square().mean())
        optimizer.step()
    expected = F.linear(x.float(), torch.where(mask, weight, 0).float())
    torch.testing.assert_close(semi_sparse_linear(x, weight, None, mask).float(), expected, atol=0.05, rtol=0.01)


def test_another_mask_in_the_same_memory_is_another_mask(packing: list[tuple[int, ...]]) -> None:
    x, _, weight, mask, _ = (each.half() if each.is_floating_point() else each for each in case(8, 64, 32))
    for shift in range(4):
        moved = mask.roll(shift, 0)
        expected = F.linear(x.float(), torch.where(moved, weight, 0).float())
        torch.testing.assert_close(semi_sparse_linear(x, weight, None, moved).float(), expected, atol=0.05, rtol=0.01)
        del moved
