"""The Triton of `kth_largest`: on a GPU, or in the interpreter."""

import pytest
import torch
from torch import Tensor

from sparsity.ops import kth_largest, largest
from sparsity.ops import select as module

DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF = float("inf")


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0)


def check(tensors: list[Tensor], ranks: list[int], device: torch.device) -> None:
    expected = torch.cat([each.reshape(-1) for each in tensors]).sort(descending=True).values
    found = [kth_largest([each.to(device) for each in tensors], k) for k in ranks]
    assert [float(each) for each in found] == [float(expected[k - 1]) for k in ranks]
    assert {(each.dtype, each.device.type) for each in found} == {(tensors[0].dtype, "cpu")}


@dtypes
def test_kth_largest_is_that_of_a_sort(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in [(), (7, 3), (0, 4), (9001,)]]
    check(tensors, [1, 2, 4000, 4600, 9022, 9023], device)


@dtypes
def test_extremes_and_random_bits(dtype: torch.dtype, device: torch.device) -> None:
    integer = module.INTEGERS[dtype.itemsize]
    about = torch.iinfo(integer)
    values = torch.randint(about.min, about.max, (5000,), dtype=integer).view(dtype)
    values = torch.cat([values[~values.isnan()], torch.tensor([INF, -INF, 0.0, -0.0]).to(dtype)])
    check([values], [1, 2, 77, 2500, len(values) - 1, len(values)], device)


@pytest.mark.parametrize("value", [0.0, -INF, INF, 1.5, -1.5])
def test_one_value_and_few_others(value: float, device: torch.device) -> None:
    tensor = torch.full((5000,), value)
    tensor[::1000] = torch.tensor([3.0, -3.0, 0.5, 1e-40, -1e-40])
    check([tensor], [1, 2, 3, 4, 2500, 4998, 5000], device)


def test_neighbouring_floats(device: torch.device) -> None:
    above = torch.tensor(1.0).nextafter(torch.tensor(2.0))
    check([torch.stack([torch.tensor(1.0), above, -above, torch.tensor(-1.0)])], [1, 2, 3, 4], device)


def test_non_contiguous_tensors(device: torch.device) -> None:
    tensor = torch.randn(40, 60)
    check([tensor.t(), tensor[::2, 3:]], [1, 500, 3000], device)


def test_tensors_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsity.ops.cuda import select

    monkeypatch.setattr(select, "MOST", 1000)
    check([torch.randn(3500)], [1, 1700, 3500], device)


def test_largest_under_ties(device: torch.device) -> None:
    tensor = torch.randint(-2, 3, (50, 41)).float()
    for count in (1, 700, 2049):
        assert torch.equal(largest(tensor.to(device), count).cpu(), module.largest(tensor.double(), count))
