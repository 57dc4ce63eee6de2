"""Exact sums: the same to the last bit in any order, and however they are shared out among processes."""

import torch
from torch import Tensor

UPPER, LOWER = 8, 52  # bits after the point of the upper part, and how many more the lower part has
LARGEST = 2.0**40  # magnitude of one addend; a thousand of them fit
EVERY = 512  # additions until the lower part is carried into the upper one


class Exact:
    """A sum of float vectors, in whole numbers of 2^-60.

    Each addend is parted into multiples of 2^-8 and the rest, both int64, which add without rounding; what is below
    2^-61 (4e-19) is rounded away before. So it does not matter who adds what first, which is why the result of a round
    is the same for any number of processes.
    """

    def __init__(self, size: int) -> None:
        self.upper = torch.zeros(size, dtype=torch.int64)
        self.lower = torch.zeros(size, dtype=torch.int64)
        self._added = 0
        # Memory that is used again: new pages for each addend would take longer than adding it.
        self._addend = torch.empty(size, dtype=torch.float64)
        self._integers = torch.empty(size, dtype=torch.int64)

    def add(self, values: Tensor, times: int = 1) -> None:
        """Adds so many times the values, float of [size], all finite and that often below `LARGEST`."""
        addend = self._addend.copy_(values).mul_(times * 2.0**UPPER)
        self.upper += self._integers.copy_(addend)  # towards zero
        self.lower += self._integers.copy_(addend.sub_(self._integers).mul_(2.0**LOWER).round_())
        self._added += 1
        if self._added % EVERY == 0:
            self.carry()

    def carry(self) -> None:
        """Makes room in the lower part; the sum is the same."""
        more = self.lower >> LOWER
        self.upper += more
        self.lower -= more << LOWER

    def value(self) -> Tensor:
        """The sum, float64 of [size]."""
        self.carry()
        return self.upper.double() * 2.0**-UPPER + self.lower.double() * 2.0 ** -(UPPER + LOWER)

    def tensors(self) -> list[Tensor]:
        """The integers to add up over processes, in place."""
        self.carry()
        return [self.upper, self.lower]
