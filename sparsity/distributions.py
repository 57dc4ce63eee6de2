"""Distributions: how many weights each layer keeps. `(scores, density) -> {name: count}`, summing to the budget.

Uniform, Uniform+, ER and both kinds of ERK look only at shapes, the others also at values; all have the one signature.
"""

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from sparsity.errors import InputError
from sparsity.ops import adaptive_counts, kth_largest
from sparsity.targets import block

Shapes = Mapping[str, tuple[int, ...]]
Counts = dict[str, int]


def budget(shapes: Shapes, density: float) -> int:
    """The number of weights kept at this density: the nearest integer to density * (number of weights).

    Raises `InputError` if the density is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise InputError(f"density must lie in (0, 1], got {density}")
    return round(density * sum(_sizes(shapes).values()))


def uniform(shapes: Shapes, density: float) -> Counts:
    """The same density in every layer, to the nearest whole weight, and at least one weight per layer."""
    return _whole({name: density * size for name, size in _sizes(shapes).items()}, shapes, density)


def uniform_plus(shapes: Shapes, density: float) -> Counts:
    """Uniform, but a first convolution stays dense and the last layer keeps at least a fifth of its weights.

    Gale et al., "The state of sparsity in deep neural networks" (arXiv 1902.09574), as in the baselines of LAMP.
    """
    sizes, kept = _sizes(shapes), budget(shapes, density)
    total, first, last = sum(sizes.values()), next(iter(sizes)), next(reversed(sizes))
    held = {first: sizes[first]} if len(shapes[first]) == 4 and first != last else {}
    common, fifth = (kept - sum(held.values())) / (total - sum(held.values())), -(-sizes[last] // 5)
    if common * sizes[last] < fifth:
        held[last] = fifth
    rest = {name: size for name, size in sizes.items() if name not in held}
    room = kept - sum(held.values())
    if room < len(rest):
        least = sum(held.values()) + len(rest)
        raise InputError(_infeasible(density, "uniform+ keeps more in the first and last layer", least, total))
    found = held | _rounded({name: room * size / sum(rest.values()) for name, size in rest.items()}, rest, room)
    return {name: found[name] for name in shapes}


def er(shapes: Shapes, density: float) -> Counts:
    """Erdős-Rényi: a layer's density goes as (in + out) / (in * out), whatever its kernel; at most all are kept.

    Mocanu et al., SET (arXiv 1707.04780). For matrices it is the same as `erk`.
    """
    parts = {name: sum(shape[:2]) * math.prod(shape[2:]) for name, shape in shapes.items()}
    return _proportional(parts, shapes, density)


def erk(shapes: Shapes, density: float) -> Counts:
    """Erdős-Rényi-Kernel: a layer keeps weights in proportion to the sum of its axes, at most all of them.

    Evci et al., RigL (arXiv 1911.11134). Layers whose share exceeds their size stay dense and the others share what
    is left.
    """
    return _proportional({name: sum(shape) for name, shape in shapes.items()}, shapes, density)


def scaled_erk(shapes: Shapes, density: float) -> Counts:
    """The *sparsity* of a layer goes as 1 - (sum of its axes) / (product of its axes), 0 at least: nearly uniform.

    The formula that the public code of FedDST (Bibikar et al., arXiv 2112.09824), and of those that followed it, calls
    ERK; the budget is exact here. Where `erk` leaves a convolution with many channels a small part of its weights, this
    leaves it about as much as the others. Layers with a single input or output stay dense.
    """
    sizes, kept = _sizes(shapes), budget(shapes, density)
    weights = {name: max(0, sizes[name] - sum(shape)) for name, shape in shapes.items()}
    least = sum(1 if weights[name] else size for name, size in sizes.items())
    if kept < least:
        raise InputError(_infeasible(density, "scaled ERK empties a layer", least, sum(sizes.values())))
    pruned = sum(sizes.values()) - kept
    rate = pruned / max(1, sum(weights.values()))
    return _whole({name: sizes[name] - rate * weights[name] for name in sizes}, shapes, density)


def _proportional(parts: Mapping[str, int], shapes: Shapes, density: float) -> Counts:
    """Counts in proportion to `parts`; layers that this would more than fill stay dense."""
    sizes, kept = _sizes(shapes), budget(shapes, density)
    dense: set[str] = set()
    while True:
        total = sum(part for name, part in parts.items() if name not in dense)
        room = kept - sum(sizes[name] for name in dense)
        share = {name: float(sizes[name]) if name in dense else room * parts[name] / total for name in parts}
        full = {name for name in parts if name not in dense and share[name] > sizes[name]}
        if not full:
            return _whole(share, shapes, density)
        dense |= full


class Distribution:
    """How many weights each layer keeps. Methods override `__call__`."""

    needs_inputs = False  # whether scores should be magnitudes times the norms of inputs, where there is data

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        """The kept count per layer, summing exactly to `budget`; raises `InputError` where it cannot be met."""
        raise NotImplementedError(f"{type(self).__name__} defines no distribution")


class Uniform(Distribution):
    """The same density everywhere (`uniform`)."""

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        return uniform(_shapes(scores), density)


class UniformPlus(Distribution):
    """Uniform with a dense first convolution and a denser last layer (`uniform_plus`)."""

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        return uniform_plus(_shapes(scores), density)


class ER(Distribution):
    """Erdős-Rényi (`er`)."""

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        return er(_shapes(scores), density)


class ERK(Distribution):
    """Erdős-Rényi-Kernel (`erk`)."""

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        return erk(_shapes(scores), density)


class ScaledERK(Distribution):
    """Nearly uniform, by the formula of FedDST's code (`scaled_erk`)."""

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        return scaled_erk(_shapes(scores), density)


class Global(Distribution):
    """The highest scores of the whole model, whatever layer they are in; among equals, the first layer's.

    `minimum` is the least each layer keeps, as a fraction of all target weights (Global MP's minimum threshold,
    arXiv 2209.14624); smaller layers stay dense. Layers that fall below are held at it and the others share what is
    left, until none falls below. The authors' code rescales the layers' sparsities in a loop instead, and may end
    off the budget.
    """

    def __init__(self, minimum: float = 0.0) -> None:
        if not 0 <= minimum < 1:
            raise InputError(f"minimum must lie in [0, 1), a fraction of all target weights; got {minimum}")
        self.minimum = minimum

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        sizes = _sizes(_shapes(scores))
        kept, total = budget(_shapes(scores), density), sum(sizes.values())
        least = {name: min(size, math.ceil(round(self.minimum * total, 6))) for name, size in sizes.items()}
        if kept < max(1, sum(least.values())):
            reason = f"minimum={self.minimum} keeps more" if self.minimum else "it keeps none"
            raise InputError(_infeasible(density, reason, max(1, sum(least.values())), total))
        counts: Counts = {}
        while True:
            free = _Some(scores, [name for name in scores if name not in counts])
            found = _highest(free, kept - sum(counts.values()))
            low = {name: least[name] for name, count in found.items() if count < least[name]}
            if not low:
                return {name: (counts | found)[name] for name in scores}
            counts |= low


class LayerAdaptive(Distribution):
    """LAMP's counts: each layer keeps those of its weights whose layer-adaptive score is among the model's highest.

    Lee et al. (ICLR 2021, arXiv 2010.07611). The score of a weight (`sparsity.scores.lamp`, equation 4) falls with its
    magnitude inside a layer, so it says only how many each layer keeps; the magnitudes say which. No layer is
    emptied as long as one weight per layer is kept. Takes magnitudes, or other scores that are not negative.

    Computed in float64 and without sorting all weights (`sparsity.ops.adaptive_counts`). Among equals, the first
    layer's.
    """

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        shapes = _shapes(scores)
        kept = budget(shapes, density)
        if kept == 0:
            raise InputError(_infeasible(density, "it keeps none", 1, sum(_sizes(shapes).values())))
        return dict(zip(scores, adaptive_counts(_Some(scores, list(scores)), kept), strict=True))


class OWL(Distribution):
    """Outlier weighed layerwise sparsity, Yin et al. (ICML 2024, arXiv 2310.05175): more for blocks with many outliers.

    An outlier scores more than `threshold` times the mean of its block, which is a transformer block or, outside of
    those, a layer. The densities of the blocks follow the share of outliers, over a range of twice `spread`, and are
    moved together until the budget is met: by the weights of each block, where the authors' mean takes all blocks for
    equally large. Takes Wanda's scores where there is calibration data, and those of the method otherwise.

    Args:
        threshold: an outlier's score over the mean of its block; the authors' M, 5.
        spread: half the range of densities; the authors' lambda, 0.08.
    """

    needs_inputs = True

    def __init__(self, threshold: float = 5.0, spread: float = 0.08) -> None:
        if threshold <= 0 or not 0 <= spread < 0.5:
            raise InputError(f"expected {threshold=} above 0 and {spread=} in [0, 0.5)")
        self.threshold, self.spread = threshold, spread

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        shapes = _shapes(scores)
        sizes, kept = _sizes(shapes), budget(shapes, density)
        outliers = self._outliers(scores, sizes)
        low, high = min(outliers.values()), max(outliers.values())
        range_ = 2 * self.spread / (high - low) if high > low else 0.0
        share = {name: range_ * (outliers[block(name)] - low) for name in sizes}
        return _whole(_moved(share, sizes, kept), shapes, density)

    def _outliers(self, scores: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, float]:
        """The share of outliers of each block. Scores are asked for twice, and one layer's are held at a time."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for name in sizes:
            sums[block(name)] = sums.get(block(name), 0.0) + float(scores[name].sum(dtype=torch.float64))
            counts[block(name)] = counts.get(block(name), 0) + sizes[name]
        above = dict.fromkeys(sums, 0)
        for name in sizes:
            mean = sums[block(name)] / counts[block(name)]
            above[block(name)] += int((scores[name] > self.threshold * mean).count_nonzero())
        return {name: above[name] / counts[name] for name in above}


class PerLayer(Distribution):
    """An explicit map from globs to sparsities; a layer takes the first glob that matches it, or stays dense.

    The map holds at the method's final sparsity, which has to be the map's own. On the way there every layer is the
    same fraction of its way from dense, so that the global count is met at each step.
    """

    def __init__(self, sparsities: dict[str, float]) -> None:
        for glob, sparsity in sparsities.items():
            if not 0 <= sparsity < 1:
                raise InputError(f"the sparsity of '{glob}' must lie in [0, 1), got {sparsity}")
        self.sparsities = sparsities

    def __call__(self, scores: Mapping[str, Tensor], density: float) -> Counts:
        shapes = _shapes(scores)
        sizes, kept = _sizes(shapes), budget(shapes, density)
        zeros = {name: self._sparsity(name) * size for name, size in sizes.items()}
        self._check_globs(list(sizes))
        total = sum(sizes.values())
        if (total - kept) - sum(zeros.values()) > 0.5:
            raise InputError(_infeasible(density, "the map keeps more", total - sum(zeros.values()), total))
        way = min(1.0, (total - kept) / sum(zeros.values())) if kept < total else 0.0
        return _whole({name: size - way * zeros[name] for name, size in sizes.items()}, shapes, density)

    def _sparsity(self, name: str) -> float:
        return next((value for glob, value in self.sparsities.items() if fnmatchcase(name, glob)), 0.0)

    def _check_globs(self, names: list[str]) -> None:
        for glob in self.sparsities:
            if not any(fnmatchcase(name, glob) for name in names):
                raise InputError(f"'{glob}' in the per-layer map matches no target; the targets are {names}")


class _Some:
    """Some of the scores, computed anew at each iteration and never held together."""

    def __init__(self, scores: Mapping[str, Tensor], names: list[str]) -> None:
        self.scores, self.names = scores, names

    def __iter__(self) -> Iterator[Tensor]:
        return (self.scores[name] for name in self.names)


def _highest(scores: _Some, count: int) -> Counts:
    """How many of the `count` highest scores lie in each tensor; among equals, the first."""
    if count == 0:
        return dict.fromkeys(scores.names, 0)
    threshold = kth_largest(scores, count)
    # One call per layer, so that no layer's scores are held while the next one's are computed.
    tallies = {name: _tally(scores.scores[name], threshold) for name in scores.names}
    missing = count - sum(above for above, _ in tallies.values())
    counts = {}
    for name, (above, equal) in tallies.items():
        counts[name] = above + min(equal, missing)
        missing -= counts[name] - above
    return counts


def _tally(score: Tensor, threshold: Tensor) -> tuple[int, int]:
    """How many scores lie above the threshold, and how many on it."""
    threshold = threshold.to(score.device)
    return int((score > threshold).count_nonzero()), int((score == threshold).count_nonzero())


def _whole(share: Mapping[str, float], shapes: Shapes, density: float) -> Counts:
    """The shares as whole counts of at least one, summing to the budget; what is full or whole by rule stays so."""
    sizes, kept = _sizes(shapes), budget(shapes, density)
    if kept < len(sizes):
        raise InputError(_infeasible(density, "it empties layers", len(sizes), sum(sizes.values())))
    full = {name: sizes[name] for name in sizes if share[name] >= sizes[name]}
    rest = {name: value for name, value in share.items() if name not in full}
    counts = full | _rounded(rest, sizes, kept - sum(full.values()))
    return {name: counts[name] for name in shapes}


def _rounded(share: Mapping[str, float], sizes: Mapping[str, int], kept: int) -> Counts:
    """The shares as whole counts of at least one that sum to `kept`, by the largest remainders."""
    counts = {name: max(1, math.floor(value)) for name, value in share.items()}
    by_remainder = sorted(share, key=lambda name: math.floor(share[name]) - share[name])
    while missing := kept - sum(counts.values()):
        step, order = (1, by_remainder) if missing > 0 else (-1, by_remainder[::-1])
        able = [name for name in order if 1 <= counts[name] + step <= sizes[name]]
        for name in able[: abs(missing)]:
            counts[name] += step
    return counts


def _moved(share: Mapping[str, float], sizes: Mapping[str, int], kept: int) -> dict[str, float]:
    """How many weights each layer keeps at its share and a common number more, within 1 % and 100 %, in sum `kept`."""

    def counts(more: float) -> dict[str, float]:
        return {name: sizes[name] * min(1.0, max(0.01, share[name] + more)) for name in sizes}

    low, high = -1.0, 1.0
    for _ in range(60):  # halvings, until floats end
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle).values()) < kept else (low, middle)
    return counts(high)


def _shapes(scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    # Computing the scores only to ask for their shapes would cost a pass each.
    known: dict[str, tuple[int, ...]] | None = getattr(scores, "shapes", None)
    return known or {name: tuple(score.shape) for name, score in scores.items()}


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _infeasible(density: float, reason: str, least: float, total: int) -> str:
    return (
        f"sparsity {1 - density:.6g} cannot be met over {total} target weights: {reason}; "
        f"the highest that can is {math.floor((1 - least / total) * 1e6) / 1e6:.6g}"
    )
