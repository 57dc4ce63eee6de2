"""Exact selection by rank, from histograms of the bits of floats: no sort, no copy of all the values."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements looked at together: what bounds the extra memory
DIGIT = 16  # bits of a float resolved by one pass
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def kth_largest(tensors: Iterable[Tensor], k: int) -> Tensor:
    """The k-th largest value (k = 1 is the largest) over all elements of all tensors, as a 0-dim CPU tensor.

    Exact for float16, bfloat16, float32 and float64. A NaN lies beyond the infinity of its sign. `tensors` is iterated
    once per 16 bits of the dtype and holds one tensor at a time, so a collection that computes its tensors when
    iterated is never in memory as a whole; the extra memory is about a million elements.

    Raises `ValueError` if k is not in [1, number of elements] or the tensors have different dtypes.
    """
    tensors = list(tensors) if isinstance(tensors, Iterator) else tensors
    dtype = next(iter(tensors), torch.empty(0)).dtype
    prefix, rank = 0, k
    for shift in range(8 * dtype.itemsize - DIGIT, -1, -DIGIT):
        first = shift == 8 * dtype.itemsize - DIGIT
        histogram = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for keys in _keys(tensors, dtype):
            known = keys if first else keys[keys >> shift + DIGIT == prefix]
            histogram += _digits(known, shift, signed=first)
        if not 1 <= rank <= int(histogram.sum()):
            raise ValueError(f"k must lie in [1, {int(histogram.sum())}], the number of elements; got k={k}")
        digit, rank = _bin_of(histogram, rank)
        prefix = digit - (1 << DIGIT - 1) if first else prefix << DIGIT | digit
    return _value(prefix, dtype)


def largest(tensor: Tensor, count: int) -> Tensor:
    """A bool mask of the tensor's shape that is True at its `count` largest elements; among equals, the first.

    Exactly `count` elements are selected, also where values are tied. -0.0 and 0.0 are equal. NaN is never expected.
    """
    if count == 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    values = tensor.reshape(-1)
    threshold = kth_largest([values], count).to(tensor.device)
    mask = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.count_nonzero())]] = True
    return mask.view(tensor.shape)


def _keys(tensors: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements, a chunk at a time, as integers that have the floats' order."""
    for tensor in tensors:
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise ValueError(f"expected floating tensors of one dtype, got {dtype} and {tensor.dtype}")
        for chunk in torch.split(tensor.detach().reshape(-1), CHUNK):
            bits = chunk.view(INTEGERS[dtype.itemsize])
            # Negative floats grow in magnitude with their bits: flipping all but the sign puts them in order.
            yield bits ^ ((bits >> 8 * dtype.itemsize - 1) & torch.iinfo(bits.dtype).max)


def _digits(keys: Tensor, shift: int, signed: bool) -> Tensor:
    """How many keys have each value of the 16 bits above `shift`; the first digit carries the sign."""
    digits = (keys >> shift).to(torch.int32)
    digits = digits + (1 << DIGIT - 1) if signed else digits & (1 << DIGIT) - 1
    return torch.bincount(digits, minlength=1 << DIGIT).cpu()


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest key, and the key's rank inside that bin."""
    above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    return (1 << DIGIT) - 1 - place, rank - int(above[place] - histogram.flip(0)[place])


def _value(key: int, dtype: torch.dtype) -> Tensor:
    integer = INTEGERS[dtype.itemsize]
    bits = key ^ torch.iinfo(integer).max if key < 0 else key
    return torch.tensor(bits, dtype=integer).view(dtype)
