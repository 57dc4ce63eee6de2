"""Sums of vectors in whole numbers, and what has to be known of a vector before it is added."""

from ctypes import CDLL, byref, c_double, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity.ops import native

LEAST = 1 << 12  # elements that C++ is compiled for
CHUNK = 1 << 14  # elements added together in plain PyTorch: they stay in the cache


def add_whole_(upper: Tensor, lower: Tensor, values: Tensor, scale: float, parts: float) -> None:
    """Adds round(values * scale) to `upper`, and round((values * scale - that) * parts) to `lower`, in place.

    All are vectors of one size on the CPU, the sums of float64, the values of any floating dtype. Halves are rounded to
    even numbers. C++ and plain PyTorch come to the same bits.
    """
    if (library := _library(values)) is not None:
        library.sparsity_sums_add(
            native.at(upper), native.at(lower), native.at(values), values.element_size(), c_int64(len(values)),
            c_double(scale), c_double(parts),
        )  # fmt: skip
        return
    for high, low, part in zip(*(torch.split(each, CHUNK) for each in (upper, lower, values)), strict=True):
        addend = part.double() * scale
        whole = addend.round()
        high += whole
        low += addend.sub_(whole).mul_(parts).round_()


class Look(NamedTuple):
    """largest: the largest magnitude; NaN, or infinite, where any value is. kept: how many values the mask keeps.

    strays: how many it does not keep that are not zero.
    """

    largest: float
    kept: int
    strays: int


def look(values: Tensor, mask: Tensor) -> Look:
    """What there is to say of a vector, for the first values of which there is a mask."""
    if (library := _library(values, mask)) is not None:
        most, counts = c_double(), (c_int64 * 2)()
        library.sparsity_sums_look(
            native.at(values), values.element_size(), c_int64(len(values)), native.at(mask), c_int64(len(mask)),
            byref(most), byref(counts),
        )  # fmt: skip
        return Look(most.value, counts[0], counts[1])
    largest = float(values.abs().max()) if len(values) else 0.0
    return Look(largest, int(mask.count_nonzero()), int(((values[: len(mask)] != 0) & ~mask).count_nonzero()))


def _library(values: Tensor, *others: Tensor) -> CDLL | None:
    fits = values.dtype in (torch.float32, torch.float64) and len(values) >= LEAST
    plain = all(each.is_cpu and each.is_contiguous() for each in (values, *others))
    return native.library("sums") if fits and plain else None
