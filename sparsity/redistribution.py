"""Redistribution: how many weights each layer drops and how many it grows. Both sum to the same."""

import math
from collections.abc import Mapping

from sparsity.scores import Momentum, Score

Counts = dict[str, int]


class InPlace:
    """Every layer grows as many as it drops: its density stays. Redistributions override `__call__`.

    `score` is what layers are compared by, None where they are not.
    """

    score: Score | None = None

    def __call__(
        self, means: Mapping[str, float], kept: Mapping[str, int], sizes: Mapping[str, int], fraction: float
    ) -> tuple[Counts, Counts]:
        """How many weights each layer drops, and how many it grows.

        `means` are the mean scores of each layer's kept weights (0 without a score), `kept` and `sizes` its kept and
        all weights, and `fraction` is what part of the kept ones to drop.
        """
        dropped = {name: _part(fraction, count) for name, count in kept.items()}
        return dropped, dropped


class Elsewhere(InPlace):
    """Every layer grows as many as it drops, and no more than were free before: what is dropped stays so."""

    def __call__(
        self, means: Mapping[str, float], kept: Mapping[str, int], sizes: Mapping[str, int], fraction: float
    ) -> tuple[Counts, Counts]:
        dropped = {name: min(_part(fraction, count), sizes[name] - count) for name, count in kept.items()}
        return dropped, dropped


class Proportional(InPlace):
    """Layers grow in proportion to the mean score of their kept weights, whatever they dropped.

    Sparse momentum's rule (Dettmers & Zettlemoyer, arXiv 1907.04840, and the authors' code), with `Momentum()` for a
    score; `Gradient()` and `Magnitude()` are swapped in. A layer less than `protected` sparse whose share is above the
    mean drops no larger part than it is sparse, so that a nearly dense layer that matters is not torn down. No layer
    fills more than `full` of its free slots; what goes beyond is spread evenly over the others.

    The authors' code rounds up, may lose what fits nowhere, and corrects the count at later updates. Here the drops are
    rounded down, which leaves every layer a weight, and the growth sums to them exactly, by the largest remainders.
    """

    def __init__(self, score: Score | None = None, protected: float = 0.2, full: float = 0.99) -> None:
        self.score = score or Momentum()
        self.protected, self.full = protected, full

    def __call__(
        self, means: Mapping[str, float], kept: Mapping[str, int], sizes: Mapping[str, int], fraction: float
    ) -> tuple[Counts, Counts]:
        total = sum(means.values())
        shares = {name: mean / total if total else 1 / len(means) for name, mean in means.items()}
        dropped = {}
        for name, count in kept.items():
            sparsity = 1 - count / sizes[name]
            guarded = sparsity < self.protected and shares[name] > 1 / len(shares)
            dropped[name] = _part(min(sparsity, fraction) if guarded else fraction, count)
        free = {name: sizes[name] - kept[name] + dropped[name] for name in kept}
        room = {name: math.floor(self.full * slots) for name, slots in free.items()}
        number = sum(dropped.values())
        return dropped, _shared_out(number, shares, room if sum(room.values()) >= number else free)


def _part(fraction: float, count: int) -> int:
    """A fraction of the count, rounded down; the tolerance keeps (1 - 0.9) of 90 at 9."""
    return math.floor(fraction * count + 1e-9)


def _shared_out(number: int, shares: Mapping[str, float], room: Mapping[str, int]) -> Counts:
    """Whole numbers that sum to `number`: by share, at most `room`, the overflow evenly over those with room left."""
    parts = {name: number * share for name, share in shares.items()}
    open_ = set(parts)
    while over := {name for name in open_ if parts[name] > room[name]}:
        excess = sum(parts[name] - room[name] for name in over)
        open_ -= over
        parts |= {name: float(room[name]) for name in over}
        parts |= {name: parts[name] + excess / len(open_) for name in open_}
    counts = {name: min(room[name], math.floor(part)) for name, part in parts.items()}
    by_remainder = sorted(parts, key=lambda name: counts[name] - parts[name])
    while missing := number - sum(counts.values()):
        for name in [name for name in by_remainder if counts[name] < room[name]][:missing]:
            counts[name] += 1
    return counts
