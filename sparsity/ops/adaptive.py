"""Selection by layer-adaptive scores: how many of the highest lie in each tensor, without a sort of all of them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsity.ops.keep import INTEGERS
from sparsity.ops.select import CHUNK

BINS = 1 << 15  # by the 15 bits below a float's sign: its exponent and the first of its digits
SLACK = 1e-12  # far more than the sums of squares can be off by


def adaptive_counts(tensors: Iterable[Tensor], k: int) -> list[int]:
    """How many of the k highest layer-adaptive scores of all tensors lie in each; among equals, the first tensor's.

    The score of an element is its square over the sum of itself and of all larger squares of the same tensor, in
    float64 (LAMP, equation 4 of arXiv 2010.07611). Elements below zero are left out. `tensors` is iterated twice and
    holds one tensor at a time.

    A histogram of each tensor bounds the scores of each bin from both sides, and so the k-th highest of all. Only
    elements of bins that may lie on either side of it are then sorted: a few percent, unless most are equal.

    Raises `ValueError` if k is not in [1, number of elements that are not negative].
    """
    layers = [Layer(tensor) for tensor in tensors]
    counts = torch.cat([layer.counts for layer in layers])
    if not 1 <= k <= int(counts.sum()):
        raise ValueError(f"k must lie in [1, {int(counts.sum())}], the number of elements; got k={k}")
    bottom = _weighted_kth(torch.cat([layer.low for layer in layers]), counts, k)
    top = _weighted_kth(torch.cat([layer.high for layer in layers]), counts, k)
    between = [layer.scores(tensor, bottom, top) for layer, tensor in zip(layers, tensors, strict=True)]
    found = torch.tensor([layer.surely_above(top) for layer in layers])
    owner = torch.arange(len(layers)).repeat_interleave(torch.tensor([len(scores) for scores in between]))
    order = torch.cat(between).argsort(descending=True, stable=True)[: k - int(found.sum())]
    result: list[int] = (found + owner[order].bincount(minlength=len(layers))).tolist()
    return result


class Layer:
    """A tensor's magnitudes in bins: how many there are, and bounds of their scores. On the CPU, in float64.

    The sums of squares are taken on the CPU for every device, in a fixed order, so that all ranks find the same.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        squares = torch.zeros(BINS, dtype=torch.float64)
        for part in torch.split(tensor.detach().reshape(-1), CHUNK):
            values = part.cpu()
            bins = _bins(values) + 1  # 0: negative
            self.counts += bins.bincount(minlength=BINS + 1)[1:]
            squares += bins.bincount(values.double().square(), minlength=BINS + 1)[1:]
        self.above = squares.flip(0).cumsum(0).flip(0) - squares
        self.low, self.high = self._bounds(squares, _edges(tensor.dtype).square())

    def _bounds(self, squares: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the highest score that an element of each bin may have."""
        most = torch.minimum(edges[1:], squares)
        least = torch.where(self.counts == 1, squares, edges[:-1])
        return _ratio(least, self.above + squares) * (1 - SLACK), _ratio(most, self.above + most) * (1 + SLACK)

    def _open(self, bottom: float, top: float) -> tuple[int, int]:
        """The bins [first, last) whose elements may lie on either side of the threshold."""
        filled = self.counts > 0
        out = (filled & (self.high < bottom)).nonzero()
        inside = (filled & (self.low > top)).nonzero()
        return int(out[-1]) + 1 if len(out) else 0, int(inside[0]) if len(inside) else BINS

    def surely_above(self, top: float) -> int:
        """How many elements have scores above the threshold, whatever it is in its bounds."""
        return int(self.counts[self._open(0.0, top)[1] :].sum())

    def scores(self, tensor: Tensor, bottom: float, top: float) -> Tensor:
        """The scores of those that may lie on either side, from the highest down; float64."""
        first, last = self._open(bottom, top)
        parts = torch.split(tensor.detach().reshape(-1), CHUNK)
        values = torch.cat([part[(_bins(part) >= first) & (_bins(part) < last)] for part in parts]).cpu()
        squares = values.sort(descending=True).values.double().square()
        larger = float(self.above[last - 1])
        return _ratio(squares, larger + squares.cumsum(0))


def _bins(values: Tensor) -> Tensor:
    """The bin of each value, -1 for negative ones; -0.0 counts as negative no more than 0.0 does."""
    bits = (values + 0.0).view(INTEGERS[values.element_size()])
    return (bits >> 8 * values.element_size() - 16).clamp_min(-1).int()


def _edges(dtype: torch.dtype) -> Tensor:
    """The least value of each bin and, last, what no value reaches."""
    shift = 8 * dtype.itemsize - 16
    bits = torch.arange(BINS, dtype=INTEGERS[dtype.itemsize]) << shift
    finite = bits.view(dtype).double().nan_to_num(nan=torch.inf)
    return torch.cat([finite, torch.tensor([torch.inf], dtype=torch.float64)])


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where nothing is there: squares that underflow matter as little as zeros."""
    return part / whole.clamp_min(torch.finfo(torch.float64).tiny)


def _weighted_kth(values: Tensor, counts: Tensor, k: int) -> float:
    """The k-th largest value, where each stands `counts` times."""
    values, counts = values[counts > 0], counts[counts > 0]
    order = values.argsort(descending=True)
    return float(values[order[torch.searchsorted(counts[order].cumsum(0), k)]])
