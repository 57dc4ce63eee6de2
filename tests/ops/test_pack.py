"""N:M packing against a slow reading of the format, by its definition and in Triton."""

import pytest
import torch
from torch import Tensor

from sparsity.ops import cuda, pack_nm, unpack_nm

PATTERNS = [(2, 4), (1, 2), (1, 4), (4, 4), (4, 8), (3, 8), (1, 16), (8, 16), (3, 5)]


@pytest.fixture(params=["plain", "triton"], autouse=True)
def where(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "triton":
        found: torch.device = request.getfixturevalue("device")
        return found
    return torch.device("cpu")


def slow(row: list[float], n: int, m: int) -> tuple[list[float], list[int]]:
    """Values and bytes of one row, by sorting each group and by one long integer."""
    width = len(bin(m - 1)) - 2
    values, code, bits = [], 0, 0
    for start in range(0, len(row), m):
        group = row[start : start + m]
        for place in sorted(sorted(range(m), key=lambda i, group=group: -abs(group[i]))[:n]):  # type: ignore[misc]
            values.append(group[place])
            code |= place << bits
            bits += width
    return values, list(code.to_bytes(-(-bits // 8), "little"))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 130), (2, 2, 9)], ids=str)
def test_the_format(shape: tuple[int, ...], n: int, m: int, where: torch.device) -> None:
    generator = torch.Generator().manual_seed(n + m)
    weight = torch.randint(-3, 4, (*shape[:-1], shape[-1] * m), generator=generator).float()  # many are equal
    values, indices = pack_nm(weight.to(where), n, m)
    expected = [slow(row, n, m) for row in weight.flatten(0, -2).tolist()]
    assert values.flatten(0, -2).tolist() == [each[0] for each in expected]
    assert indices.flatten(0, -2).tolist() == [each[1] for each in expected]
    back = unpack_nm(values, indices, n, m).cpu()
    assert back.shape == weight.shape
    assert torch.equal(back[back != 0], weight[back != 0])
    groups, kept = weight.abs().view(-1, m), back.abs().view(-1, m)
    assert torch.equal(kept.sum(1), groups.topk(n).values.sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, where: torch.device) -> None:
    weight = torch.randn(5, 24).to(dtype).to(where)
    values, indices = pack_nm(weight, 2, 4)
    assert values.dtype == dtype
    back = unpack_nm(values, indices, 2, 4)
    assert torch.equal(back, weight * (back != 0))
    assert int((back != 0).sum()) == 60


def test_all_zero_and_not_finite(where: torch.device) -> None:
    zeros, inf, nan = [0.0] * 4, torch.inf, torch.nan
    weight = torch.tensor([[*zeros, 1.0, -inf, 2.0, 3.0, 1.0, nan, inf, inf]]).to(where)
    values, indices = pack_nm(weight, 2, 4)
    assert indices.tolist() == [[0b1101_0100, 0b1001]]
    torch.testing.assert_close(values.cpu(), torch.tensor([[0, 0, -inf, 3, nan, inf]]), equal_nan=True)


def test_gradients_and_torchs_own_checks(where: torch.device) -> None:
    weight = torch.randn(3, 16, dtype=torch.float64, device=where, requires_grad=True)
    values, indices = pack_nm(weight, 2, 4)
    assert torch.autograd.gradcheck(lambda w: pack_nm(w, 2, 4)[0], weight)
    assert torch.autograd.gradcheck(lambda v: unpack_nm(v, indices, 2, 4), values.detach().requires_grad_())
    torch.library.opcheck(torch.ops.sparsity.pack_nm, (weight, 2, 4))
    torch.library.opcheck(torch.ops.sparsity.unpack_nm, (values.detach().requires_grad_(), indices, 2, 4))


def test_it_compiles_as_a_whole(where: torch.device) -> None:
    def both(weight: Tensor) -> Tensor:
        return unpack_nm(*pack_nm(weight, 2, 4), 2, 4)

    weight = torch.randn(3, 16, device=where)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(weight), both(weight))


def test_nothing(where: torch.device) -> None:
    for shape in [(0, 8), (3, 0)]:
        weight = torch.zeros(shape, device=where)
        values, indices = pack_nm(weight, 2, 4)
        assert unpack_nm(values, indices, 2, 4).shape == shape


@pytest.mark.parametrize(("call", "message"), [
    (lambda: pack_nm(torch.ones(3, 6), 2, 4), "groups of 4 do not divide 6"),
    (lambda: pack_nm(torch.ones(4).int(), 2, 4), "expected a floating weight"),
    (lambda: pack_nm(torch.ones(4), 5, 4), "got 5:4"),
    (lambda: pack_nm(torch.ones(4), 0, 4), "got 0:4"),
    (lambda: unpack_nm(torch.ones(3), torch.zeros(1).byte(), 2, 4), r"expected values \[..., groups \* 2\]"),
    (lambda: unpack_nm(torch.ones(6), torch.zeros(1).byte(), 2, 4), r"expected indices of uint8 \(2,\)"),
    (lambda: unpack_nm(torch.ones(4), torch.zeros(1), 2, 4), r"got torch\.float32"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_kernels_are_used_where_they_serve(where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(cuda, "serves", lambda tensor: seen.append(tensor))
    pack_nm(torch.ones(2, 8, device=where), 2, 4)
    assert len(seen) == 1
