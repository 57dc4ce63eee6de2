from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from sparsity.ops import kth_largest, largest
from sparsity.ops.select import CHUNK

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF = float("inf")
pytestmark = pytest.mark.usefixtures("backend")


class Lazy:
    """Computes its tensors anew each time it is iterated."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.computed = 0

    def __iter__(self) -> Iterator[Tensor]:
        for tensor in self.tensors:
            self.computed += 1
            yield tensor.clone()


def descending(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).sort(descending=True).values


def largest_by_sort(tensor: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest: by value, then by index."""
    values = tensor.flatten().tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def chosen(tensor: Tensor, count: int) -> list[int]:
    mask = largest(tensor, count)
    assert mask.dtype == torch.bool
    assert mask.shape == tensor.shape
    indices: list[int] = mask.flatten().nonzero().squeeze(1).tolist()
    return indices


@dtypes
def test_kth_largest_is_that_of_a_sort(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in [(), (1,), (7, 3), (2, 3, 5), (0, 4), (101,)]]
    expected = descending(tensors)
    found = torch.stack([kth_largest(tensors, k) for k in range(1, len(expected) + 1)])
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@dtypes
def test_kth_largest_orders_the_extremes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    about = torch.finfo(dtype)
    tiny = about.smallest_normal * about.eps  # the smallest subnormal
    values = [INF, about.max, 1 + about.eps, 1.0, about.smallest_normal, 2 * tiny, tiny]
    ascending = [-value for value in values] + [-0.0, 0.0] + values[::-1]
    tensor = torch.tensor(ascending, dtype=torch.float64).to(dtype)[torch.randperm(len(ascending))]
    found = [float(kth_largest([tensor], k)) for k in range(1, len(ascending) + 1)]
    assert found == ascending[::-1]
    assert found[6] == tiny > 0


@dtypes
def test_kth_largest_of_duplicates(dtype: torch.dtype) -> None:
    tensors = [torch.full((3, 5), 2.0), torch.tensor([-1.0, 3.0, 2.0]), torch.full((4,), -1.0)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    found = [float(kth_largest(tensors, k)) for k in range(1, 23)]
    assert found == [3.0] + [2.0] * 16 + [-1.0] * 5


@dtypes
def test_kth_largest_of_random_bits(dtype: torch.dtype) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    generator = torch.Generator().manual_seed(1)
    about = torch.iinfo(integer)
    values = torch.randint(about.min, about.max, (4000,), generator=generator, dtype=integer).view(dtype)
    values = values[~values.isnan()]
    expected = values.sort(descending=True).values
    for k in [1, 2, 3, 500, 1999, len(values) - 1, len(values)]:
        assert kth_largest([values], k) == expected[k - 1], k


def test_kth_largest_tells_neighbouring_floats_apart() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    above = torch.nextafter(one, 2 * one)
    tensor = torch.stack([one, above, one, -above, -one])
    assert [kth_largest([tensor], k) for k in (1, 2, 3, 4, 5)] == [above, one, one, -one, -above]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(60.0).view(3, 4, 5)[:, ::2, 1:],
        torch.arange(4.0).view(4, 1).expand(4, 3),
        torch.arange(96.0).view(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.arange(40.0)[::2],
        torch.ones(()).expand(50),
    ],
    ids=["transposed", "sliced", "expanded", "channels last", "strided", "one for all"],
)
def test_non_contiguous_tensors(tensor: Tensor) -> None:
    expected = descending([tensor])
    assert [kth_largest([tensor], k) for k in range(1, tensor.numel() + 1)] == list(expected)
    for count in [1, 5, tensor.numel()]:
        assert chosen(tensor, count) == largest_by_sort(tensor, count)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_tensors_larger_than_a_chunk(size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(2))
    expected = tensor.sort(descending=True).values
    for k in [1, size // 3, size]:
        assert kth_largest([tensor], k) == expected[k - 1]
        assert int(largest(tensor, k).sum()) == k
    assert torch.equal(tensor[largest(tensor, size // 3)].sort(descending=True).values, expected[: size // 3])


def test_collections_that_compute_their_tensors_when_iterated() -> None:
    tensors = [torch.randn(9, 11, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    lazy = Lazy(tensors)
    assert kth_largest(lazy, 40) == descending(tensors)[39]
    assert lazy.computed > len(tensors)


def test_generators_are_iterated_once() -> None:
    tensors = [torch.randn(9, 11), torch.randn(5)]
    assert kth_largest((tensor for tensor in tensors), 40) == descending(tensors)[39]


def test_parameters_need_no_detaching() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 3.0, 2.0]))
    found = kth_largest([weight], 2)
    assert float(found) == 2.0
    assert not found.requires_grad
    assert chosen(weight, 2) == [1, 2]


def test_a_nan_lies_beyond_the_infinity_of_its_sign() -> None:
    nan = torch.tensor(float("nan"))
    tensor = torch.stack([torch.tensor(INF), nan.copysign(torch.tensor(-1.0)), torch.tensor(-INF), nan.abs()])
    found = [kth_largest([tensor], k) for k in (1, 2, 3, 4)]
    assert [value.isnan().item() for value in found] == [True, False, False, True]
    assert [found[0].signbit(), found[1], found[2], found[3].signbit()] == [False, INF, -INF, True]


@pytest.mark.parametrize("k", [0, -1, 8, 100])
def test_kth_largest_refuses_ranks_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 7\], the number of elements; got k={k}$"):
        kth_largest([torch.ones(2, 3), torch.ones(1)], k)


def test_kth_largest_refuses_nothing_at_all() -> None:
    with pytest.raises(ValueError, match=r"k must lie in \[1, 0\], the number of elements; got k=1"):
        kth_largest([], 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.float64, r"one dtype, got torch\.float32 and torch\.float64"),
        (torch.int32, r"one dtype, got torch\.float32 and torch\.int32"),
    ],
    ids=str,
)
def test_kth_largest_refuses_mixed_dtypes(other: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kth_largest([torch.ones(3), torch.ones(3, dtype=other)], 1)


def test_kth_largest_refuses_integers() -> None:
    with pytest.raises(ValueError, match=r"expected floating tensors .* got torch\.int64"):
        kth_largest([torch.arange(3)], 1)


def test_kth_largest_refuses_floats_of_eight_bits() -> None:
    with pytest.raises(ValueError, match="16, 32 or 64 bits"):
        kth_largest([torch.ones(3).to(torch.float8_e4m3fn)], 1)


@dtypes
def test_largest_under_heavy_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randint(-2, 3, (9, 13), generator=generator).to(dtype)
    for count in range(tensor.numel() + 1):
        assert chosen(tensor, count) == largest_by_sort(tensor, count)


@pytest.mark.parametrize("value", [0.0, -1.0, -INF, INF])
def test_largest_of_equals_is_the_first(value: float) -> None:
    assert chosen(torch.full((3, 5), value), 7) == list(range(7))


def test_largest_takes_both_zeros_as_equal() -> None:
    tensor = torch.tensor([-0.0, 0.0, -1.0, 0.0, -0.0])
    assert [chosen(tensor, count) for count in range(6)] == [
        [], [0], [0, 1], [0, 1, 3], [0, 1, 3, 4], [0, 1, 2, 3, 4],
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (4, 5), (2, 3, 3, 3)], ids=str)
def test_largest_of_none_and_of_all(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert not largest(tensor, 0).any()
    assert largest(tensor, tensor.numel()).all()
    assert largest(tensor, tensor.numel()).shape == shape


@pytest.mark.parametrize("count", [-1, 7])
def test_largest_refuses_counts_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 6\], the number of elements; got k={count}$"):
        largest(torch.ones(2, 3), count)


def tensors_of(process: int) -> list[Tensor]:
    """What each of two processes has."""
    every = torch.randn(60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [every[45:]] if process else [every[:40], every[40:45]]


def run(process: int, store: str) -> None:
    """Raises where a process does not find the value that is k-th over both."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=process, world_size=2, timeout=timedelta(seconds=60)
    )
    group, ranks, both = dist.group.WORLD, (1, 2, 30, 59, 60), tensors_of(0) + tensors_of(1)
    mine = tensors_of(process)
    for dtype in DTYPES:
        found = [kth_largest([each.to(dtype) for each in mine], k, group) for k in ranks]
        expected = descending([each.to(dtype) for each in both])
        assert found == [expected[k - 1] for k in ranks]
    nothing: list[Tensor] = [] if process else mine
    assert kth_largest(nothing, 45, group) == descending(tensors_of(0))[44]
    with pytest.raises(ValueError, match=r"k must lie in \[1, 60\], the number of elements; got k=61"):
        kth_largest(mine, 61, group)
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32 and torch\.float64"):
        kth_largest([each.float() if process else each for each in mine], 1, group)
    dist.destroy_process_group()


def test_a_process_group_shares_one_threshold(backend: str, tmp_path: Path) -> None:
    if backend == "native":
        pytest.skip("sums of histograms, whatever made them")
    spawn(run, (str(tmp_path / "store"),), nprocs=2)  # type: ignore[no-untyped-call]  # torch's
