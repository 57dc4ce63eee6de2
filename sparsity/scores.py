"""Scores: how much each weight matters. Higher means keep."""

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsity import shards
from sparsity.compact import Compact
from sparsity.errors import InputError
from sparsity.ops import all_finite

SLABS = 16  # parts that `lamp` sorts one after the other: what bounds its extra memory
SMALL = 1 << 16  # weights that are not worth parting


def magnitude(weight: Tensor) -> Tensor:
    """|w|, in the weight's shape, float32 or wider."""
    return _wide(weight).abs()


def lamp(weight: Tensor) -> Tensor:
    """w^2 over the sum of it and of all larger squares of the same tensor, in the weight's shape, float32 or wider.

    LAMP, equation 4 of Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning" (ICLR 2021,
    arXiv 2010.07611). The largest weight of every tensor scores exactly 1, so no layer is emptied as long as one
    weight per layer is kept. Zero weights score 0, also where the whole tensor is zero. Among equal magnitudes the
    first counts as the largest.

    The authors' code takes the total minus a running sum, which in float32 loses the largest weights of big layers.
    Here the sum runs from the largest weight down, in float64. The tensor is sorted slab by slab, so that the
    extra memory is less than four times the tensor's, where a full sort takes ten.
    """
    magnitudes = magnitude(weight.detach()).flatten()
    scores = torch.zeros_like(magnitudes)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for lower, upper in _slabs(magnitudes):
        place = ((magnitudes > lower) & (magnitudes <= upper)).nonzero().squeeze(1)
        values, order = magnitudes[place].sort(descending=True, stable=True)
        squares = values.double().square()
        # Underflow leaves a zero square with nothing above it; it is as unimportant as a zero weight.
        sums = (total + squares.cumsum(0)).clamp_min(torch.finfo(torch.float64).tiny)
        scores[place[order]] = (squares / sums).to(scores.dtype)
        total = total + squares.sum()
    return scores.view(weight.shape)


def _slabs(magnitudes: Tensor) -> Iterator[tuple[float, float]]:
    """Intervals (lower, upper] from the largest magnitude down to zero, of about as many weights each.

    The bounds are quantiles of a sample: where they lie decides the memory, never the result.
    """
    slabs = SLABS if magnitudes.numel() > SMALL else 1
    sample = magnitudes[:: max(1, magnitudes.numel() // (64 * slabs))].sort(descending=True).values
    inner = [float(bound) for bound in sample[64:-1:64]] if slabs > 1 else []
    bounds = sorted({float("inf"), *inner, 0.0}, reverse=True)
    yield from zip(bounds[1:], bounds[:-1], strict=True)


class Score:
    """How much each weight of one tensor matters. Methods override `__call__`."""

    needs_gradient = False  # whether `signal` is asked for
    needs_momentum = False  # whether pruned weights keep their optimizer state, because it is the signal

    def __call__(self, weight: Tensor, signal: Tensor | None, generator: torch.Generator) -> Tensor:
        """The scores: a new tensor of the weight's shape, float32 or wider.

        `signal` is what `self.signal` says of the weight, whole. `generator` is on the CPU and seeded by run, step and
        parameter name, so every rank draws the same numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no score")

    def signal(self, weight: Tensor, optimizers: Sequence[Optimizer]) -> Tensor | None:
        """What training says of the weight: its gradient before it is masked, None where it has none.

        The gradient covers the whole accumulation window, is the mean over ranks under DDP, and is there anyway.
        """
        return weight.grad

    def check(self, weights: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        """Raises `InputError` where these optimizers will give no signal."""


class Magnitude(Score):
    """|w|."""

    def __call__(self, weight: Tensor, signal: Tensor | None, generator: torch.Generator) -> Tensor:
        return magnitude(weight.detach())


class Lamp(Score):
    """Layer-adaptive magnitude (`lamp`)."""

    def __call__(self, weight: Tensor, signal: Tensor | None, generator: torch.Generator) -> Tensor:
        return lamp(weight)


class Random(Score):
    """Uniform in [0, 1), independent of the weights."""

    def __call__(self, weight: Tensor, signal: Tensor | None, generator: torch.Generator) -> Tensor:
        return torch.rand(weight.shape, generator=generator).to(weight.device)


class Gradient(Score):
    """|g|: how fast a weight would move. RigL's growth (Evci et al., arXiv 1911.11134)."""

    needs_gradient = True

    def __call__(self, weight: Tensor, signal: Tensor | None, generator: torch.Generator) -> Tensor:
        if signal is None:
            raise InputError("a score by gradients was asked for before any backward pass: call it after one")
        return magnitude(signal.detach())


class Momentum(Gradient):
    """|m|: how fast a weight has lately wanted to move. Dettmers & Zettlemoyer (arXiv 1907.04840).

    m is SGD's momentum buffer. For Adam and its kin it is the first moment over the root of the second, as in the
    authors' code, without the correction of their bias, which is the same for all weights.
    """

    needs_momentum = True

    def signal(self, weight: Tensor, optimizers: Sequence[Optimizer]) -> Tensor | None:
        for optimizer in optimizers:
            state = optimizer.state.get(weight, {})
            if isinstance(state.get("momentum_buffer"), Tensor):
                buffer: Tensor = state["momentum_buffer"]
                return buffer
            if "exp_avg" in state:
                first, second = state["exp_avg"], state.get("exp_avg_sq")
                ratio: Tensor = first if second is None else _wide(first) / (_wide(second).sqrt() + 1e-8)
                return ratio
        return None

    def check(self, weights: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        stepped = {id(weight) for weight in weights.values()}
        for optimizer in optimizers:
            if isinstance(optimizer, Compact):
                raise InputError("momentum is asked for as a score, and Compact keeps none of pruned weights")
            for group in optimizer.param_groups:
                mine = any(id(weight) in stepped for weight in group["params"])
                if mine and not group.get("momentum") and "betas" not in group:
                    raise InputError(
                        f"momentum is asked for as a score, and {type(optimizer).__name__} keeps none: use SGD with "
                        "momentum=0.9, or Adam, AdamW, NAdam or RAdam"
                    )
        if not optimizers:
            raise InputError("momentum is asked for as a score: attach the optimizer too, attach(model, optimizer)")


class Scores(Mapping[str, Tensor]):
    """The scores of all targets, each computed when it is asked for, so that only one is in memory at a time.

    Weights that `masks` has already pruned score -inf: they come last, also behind a kept weight of exactly zero.
    Those of `turned` come with their first two axes exchanged. Raises `InputError` where a score is not finite.
    """

    def __init__(
        self,
        score: Score,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        seed: str,
        optimizers: Sequence[Optimizer] = (),
        turned: frozenset[str] = frozenset(),
    ) -> None:
        self._score, self._weights, self._masks, self._seed = score, weights, masks, seed
        self._turned = turned
        self._optimizers = optimizers
        double = any(weight.dtype == torch.float64 for weight in weights.values())
        self._dtype = torch.float64 if double else torch.float32
        self.shapes = {name: tuple(self._face(name, weight).shape) for name, weight in weights.items()}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        signal = self._score.signal(weight, self._optimizers) if self._score.needs_gradient else None
        values = shards.whole(weight.detach())
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        score = self._score(values, None if signal is None else shards.whole(signal), generator).to(self._dtype)
        # The weights too: a score may lose their NaN, as LAMP's comparisons do.
        if not (all_finite(values) and all_finite(score)):
            bad = int((~torch.isfinite(values)).sum())
            what = f"{bad} of its {weight.numel()} weights are" if bad else f"{type(self._score).__name__} scores it"
            raise InputError(
                f"'{name}' cannot be ranked: {what} NaN or infinite. "
                "The masks are unchanged; go back to the last good checkpoint and lower the learning rate"
            )
        return self._face(name, score.masked_fill_(~self._masks[name], -torch.inf))

    def _face(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if name in self._turned else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
