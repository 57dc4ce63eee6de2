"""Relaxations: how a network gets from dense to N:M while it trains, by decay of the mask or of its structure."""

import math

from sparsity.errors import InputError
from sparsity.patterns import NM
from sparsity.schedules import Horizon, Time


class Relaxation:
    """What the forward pass of training uses at a step. This one: the final pattern, and nothing that is pruned."""

    def resolve(self, horizon: Horizon) -> int:
        """The step from which on only the final pattern is left."""
        return 0

    def share(self, step: int, end: int) -> float:
        """The factor, in [0, 1], by which pruned weights still take part."""
        return 0.0

    def pattern(self, final: NM, step: int, end: int) -> NM:
        """The pattern that is in force at a step."""
        return final


class _Until(Relaxation):
    """A relaxation that ends at a time: steps, a fraction of training or epochs."""

    def __init__(self, until: Time = 0.5) -> None:
        self.until = until

    def resolve(self, horizon: Horizon) -> int:
        end = horizon.length(self.until, "until")
        if horizon.steps is not None and end >= horizon.steps:
            raise InputError(
                f"until={self.until!r} is step {end} of {horizon.steps}: no step is left for the pattern asked for; "
                "end earlier, or train longer"
            )
        return end


class LinearDecay(_Until):
    """Pruned weights take part with a factor that falls linearly from 1 to 0 at `until`.

    MdGf-Linear of progressive gradient flow, Bambhaniya et al. (arXiv 2402.04744): its 1 - c step, c = 1 / until.
    """

    def share(self, step: int, end: int) -> float:
        return max(0.0, 1 - step / end) if end else 0.0


class ExponentialDecay(_Until):
    """Pruned weights take part with a factor that falls exponentially from 1 to 0.001 at `until`, and is 0 then.

    MdGf-Exponential of progressive gradient flow (arXiv 2402.04744): its exp(-c step), c = ln 1000 / until. The
    authors have no end: with their c = 1e-4 the factor is 0.001 after 69,000 steps.
    """

    def share(self, step: int, end: int) -> float:
        return math.exp(-math.log(1000) * step / end) if step < end else 0.0


class Stepwise(_Until):
    """M-1:M, then M/2:M, M/4:M and so on down to N:M, each for the same part of the time until `until`.

    SdGf-Stepwise of progressive gradient flow (arXiv 2402.04744).
    """

    def pattern(self, final: NM, step: int, end: int) -> NM:
        kept = [final.m - 1]
        while kept[-1] > final.n:
            kept.append(max(final.n, kept[-1] // 2 if len(kept) > 1 else final.m // 2))
        frame = min(len(kept) - 1, step * (len(kept) - 1) // end) if end else len(kept) - 1
        return NM(kept[frame], final.m) if kept[frame] != final.n else final


class Geometric(_Until):
    """8N:8M, then 4N:4M, 2N:2M and N:M: as sparse from the start, with ever less freedom.

    SdGf-Geometric of progressive gradient flow (arXiv 2402.04744). A layer that 8M does not divide starts later.
    """

    def pattern(self, final: NM, step: int, end: int) -> NM:
        frame = min(3, step * 3 // end) if end else 3
        return NM(final.n << 3 - frame, final.m << 3 - frame) if frame < 3 else final
