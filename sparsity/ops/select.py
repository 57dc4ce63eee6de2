"""Exact selection by rank, from histograms of the bits of floats: no sort, no copy of all the values."""

from collections.abc import Iterable, Iterator
from ctypes import c_int64
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsity.ops import cuda, native

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK = 1 << 18  # elements looked at together: what bounds the extra memory
DIGIT = 16  # bits of a float resolved by one pass
HALF = 1 << DIGIT - 1
SMALL = 1 << 15  # elements that a selection is faster for
LARGE = 1 << 20  # elements that C++ is compiled for
THREADS = 4  # of C++ at most: each has 256 kB of counts
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kth_largest(tensors: Iterable[Tensor], k: int, group: "ProcessGroup | None" = None) -> Tensor:
    """The k-th largest value (k = 1 is the largest) over all elements of all tensors, as a 0-dim CPU tensor.

    Exact for float16, bfloat16, float32 and float64. A NaN lies beyond the infinity of its sign. `tensors` is iterated
    once per 16 bits of the dtype and holds one tensor at a time, so a collection that computes its tensors when
    iterated is never in memory as a whole; the extra memory is some ten megabytes. It is plain PyTorch; for large
    tensors C++ on a CPU, and Triton on a GPU but for float64.

    With a process group it is over the tensors of all its processes, of which some may have none: what they send each
    other is one histogram of 512 kB for each 16 bits, whatever the size.

    Raises `ValueError` if k is not in [1, number of elements] or the tensors have different dtypes.
    """
    tensors = list(tensors) if isinstance(tensors, Iterator) else tensors
    first = next(iter(tensors), None)
    dtype = torch.float32 if first is None else first.dtype
    if dtype.itemsize not in INTEGERS:
        raise ValueError(f"expected floating tensors of 16, 32 or 64 bits, got {dtype}")
    if group is not None:
        dtype = _agreed(None if first is None else dtype, group)
    del first  # holds on to what was computed
    top = 8 * dtype.itemsize - DIGIT
    prefix, rank = 0, k
    for shift in range(top, -1, -DIGIT):
        histogram = torch.zeros(1 << DIGIT, dtype=torch.int64)
        # `map` lets go of each tensor before the next one is computed; a loop variable would hold on to it.
        for part in map(
            partial(_histogram, dtype=dtype, shift=shift, prefix=None if shift == top else prefix), tensors
        ):
            histogram = histogram.to(part.device).add_(part)
        if group is not None:
            histogram = _sum(histogram, group)
        if not 1 <= rank <= int(histogram.sum()):
            raise ValueError(f"k must lie in [1, {int(histogram.sum())}], the number of elements; got k={k}")
        digit, rank = _bin_of(histogram, rank)
        prefix = digit - HALF if shift == top else prefix << DIGIT | digit
    return _value(prefix, dtype)


def _agreed(dtype: torch.dtype | None, group: "ProcessGroup") -> torch.dtype:
    """The dtype of all processes; None is of one that has no tensors."""
    found = _sum(torch.tensor([int(each == dtype) for each in DTYPES]), group).tolist()
    dtypes = [each for each, count in zip(DTYPES, found, strict=True) if count]
    if len(dtypes) > 1:
        raise ValueError(f"expected floating tensors of one dtype, got {' and '.join(map(str, dtypes))}")
    return dtypes[0] if dtypes else torch.float32


def _sum(tensor: Tensor, group: "ProcessGroup") -> Tensor:
    """Over the processes; NCCL's send from GPUs only, all others from here."""
    given = tensor.to("cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu")
    torch.distributed.all_reduce(given, group=group)
    return given


def largest(tensor: Tensor, count: int) -> Tensor:
    """A bool mask of the tensor's shape that is True at its `count` largest elements; among equals, the first.

    Exactly `count` elements are selected, also where values are tied. -0.0 and 0.0 are equal. NaN is never expected.
    """
    if count == 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    values = tensor.reshape(-1)
    threshold = _threshold(values, count)
    mask = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.count_nonzero())]] = True
    return mask.view(tensor.shape)


def _threshold(values: Tensor, count: int) -> Tensor:
    # The histograms of a small tensor are longer than it is.
    fits = values.is_cpu and 1 <= count <= values.numel() <= SMALL
    if fits and values.dtype in (torch.float32, torch.float64):
        return values.kthvalue(values.numel() - count + 1).values
    return kth_largest([values], count).to(values.device)


def _histogram(tensor: Tensor, dtype: torch.dtype, shift: int, prefix: int | None) -> Tensor:
    """How many elements have each value of the 16 bits above `shift`, of those whose bits above them are `prefix`.

    Without a prefix these are the first bits, and carry the sign.
    """
    if tensor.dtype != dtype or not dtype.is_floating_point:
        raise ValueError(f"expected floating tensors of one dtype, got {dtype} and {tensor.dtype}")
    values = tensor.detach().reshape(-1)
    if cuda.serves(values):
        from sparsity.ops.cuda import select as kernels

        return kernels.histogram(values, shift, prefix)
    histogram = torch.zeros(1 << DIGIT, dtype=torch.int64, device=tensor.device)
    if values.is_cpu and values.numel() >= LARGE and (library := native.library("select")) is not None:
        values = values.contiguous()
        failed = library.sparsity_histogram(
            native.at(values), c_int64(values.numel()), values.element_size(), shift, prefix is None,
            c_int64(prefix or 0), native.at(histogram), min(torch.get_num_threads(), THREADS),
        )  # fmt: skip
        if failed:
            raise MemoryError("there is no memory for the histograms of a selection")
        return histogram
    # Negative floats grow in magnitude with their bits: their bins are put into order afterwards, which is cheaper.
    negative = prefix is not None and prefix < 0
    for chunk in torch.split(values, CHUNK):
        bits = chunk.view(INTEGERS[dtype.itemsize])
        if prefix is None:
            digits = (bits >> shift).to(torch.int32).add_(HALF)
        else:
            raw = prefix ^ (1 << 8 * dtype.itemsize - DIGIT - shift - 1) - 1 if negative else prefix
            digits = bits[bits >> shift + DIGIT == raw] >> shift & (1 << DIGIT) - 1
        histogram += torch.bincount(digits, minlength=1 << DIGIT)
    if prefix is None:
        histogram[:HALF] = histogram[:HALF].flip(0)
    return histogram.flip(0) if negative else histogram


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest key, and the key's rank inside that bin."""
    above = histogram.flip(0).cumsum(0)
    place = int((above < rank).sum())
    digit = (1 << DIGIT) - 1 - place
    return digit, rank - int(above[place] - histogram[digit])


def _value(key: int, dtype: torch.dtype) -> Tensor:
    integer = INTEGERS[dtype.itemsize]
    bits = key ^ torch.iinfo(integer).max if key < 0 else key
    return torch.tensor(bits, dtype=integer).view(dtype)
