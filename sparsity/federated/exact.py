"""Exact sums: the same to the last bit in any order, and however they are shared out among processes."""

import torch
from torch import Tensor

from sparsity.ops.sums import add_whole_

UPPER, LOWER = 6, 46  # bits after the point of the upper part, and how many more the lower part has
LARGEST = 2.0**37  # magnitude of one addend; a thousand of them fit
SMALL, MAGNIFIED = 2.0**-20, 2.0**46  # below which float32 has bits beyond 2^-52, and by how much that is larger
EVERY = 64  # additions until the lower part is carried into the upper one


class Exact:
    """A sum of float vectors, in whole numbers of 2^-52.

    Each addend is parted into a multiple of 2^-6 and the rest, whole numbers that float64 adds without rounding while
    they stay below 2^53; what is below 2^-53 (1e-16) is rounded away before. So it does not matter who adds what first,
    which is why the result of a round is the same for any number of processes.
    """

    def __init__(self, size: int) -> None:
        self.upper = torch.zeros(size, dtype=torch.float64)
        self.lower = torch.zeros(size, dtype=torch.float64)
        self._added = 0

    def add(self, values: Tensor, times: int = 1) -> None:
        """Adds so many times the values, float of [size], all finite and that often below `LARGEST`."""
        add_whole_(self.upper, self.lower, values, times * 2.0**UPPER, 2.0**LOWER)
        self._added += 1
        if self._added % EVERY == 0:
            self.carry()

    def carry(self) -> None:
        """Makes room in the lower part; the sum is the same."""
        more = (self.lower * 2.0**-LOWER).floor_()
        self.upper += more
        self.lower -= more * 2.0**LOWER

    def value(self) -> Tensor:
        """The sum, float64 of [size]."""
        self.carry()
        return self.upper * 2.0**-UPPER + self.lower * 2.0 ** -(UPPER + LOWER)

    def tensors(self) -> list[Tensor]:
        """The whole numbers to add up over processes, in place."""
        self.carry()
        return [self.upper, self.lower]


class Wide:
    """As `Exact`, for float32 of very different sizes, such as squares of gradients.

    What is small has a sum of its own, so that nothing is rounded away before 2^-98.
    """

    def __init__(self, size: int) -> None:
        self.large, self.small = Exact(size), Exact(size)

    def add(self, values: Tensor, times: int = 1) -> None:
        """As `Exact.add`."""
        tiny = values.abs() < SMALL
        self.large.add(torch.where(tiny, 0.0, values), times)
        self.small.add(torch.where(tiny, values.double() * MAGNIFIED, 0.0), times)

    def value(self) -> Tensor:
        """The sum, float64 of [size]."""
        return self.large.value() + self.small.value() / MAGNIFIED

    def tensors(self) -> list[Tensor]:
        """As `Exact.tensors`."""
        return [*self.large.tensors(), *self.small.tensors()]
