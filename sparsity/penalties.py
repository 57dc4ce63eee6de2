"""Penalties on weights, as gradients to be added to those of the loss."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparsity import shards
from sparsity.errors import InputError
from sparsity.ops import kth_largest

INFLECTION = math.atanh(1 / math.sqrt(3))  # where the slope of tanh falls fastest: 0.6585


def hypersparse_gradient(weights: Sequence[Tensor], sparsity: float, scale: float | None = None) -> list[Tensor]:
    """The gradient of the HyperSparse loss for each weight tensor, in its shape and dtype.

    Glandorf, Kaiser & Rosenhahn, "HyperSparse neural networks" (ICCVW 2023, arXiv 2308.07163). With a = |w| over all
    tensors together, and s such that s a = 0.6585 for the weight at the quantile of the sparsity:

        loss = sum(a) sum(tanh(s a)) / A - sum(a),  A = sum(tanh(s a)) held constant
        gradient = sign(w) s sech^2(s a) sum(a) / sum(tanh(s a))

    The value of the loss is zero at all times; its gradient draws small weights to zero about as strongly as L1 does,
    and large ones less, with the turning point at the weight that is the first to stay. The closed form needs no graph
    over all weights, and `scale` no sort of them; give it to use one that was computed before. The sums are in float64.

    Raises `InputError` where that weight is zero, or the sparsity does not lie in (0, 1).
    """
    scale = hypersparse_scale(weights, sparsity) if scale is None else scale
    factor = hypersparse_factor(weights, scale)
    return [torch.zeros_like(weight).add_(_slope(weight, scale), alpha=4 * factor) for weight in weights]


def hypersparse_scale(weights: Iterable[Tensor], sparsity: float) -> float:
    """0.6585 over the magnitude at the quantile of the sparsity, over all weights together, without a sort."""
    if not 0 < sparsity < 1:
        raise InputError(f"sparsity is the fraction of zeros and must lie in (0, 1), got {sparsity}")
    magnitudes = [weight.detach().abs() for weight in weights]
    size = sum(each.numel() for each in magnitudes)
    quantile = float(kth_largest(magnitudes, size - math.floor(sparsity * size)))
    if quantile == 0:
        zeros = 1 - sum(int(each.count_nonzero()) for each in magnitudes) / size
        raise InputError(
            f"the weight at the quantile of sparsity={sparsity} is zero: {zeros:.4f} of the weights already are; "
            "ask for more, or start from a network that is denser"
        )
    return INFLECTION / quantile


def hypersparse_factor(weights: Iterable[Tensor], scale: float) -> float:
    """s sum(a) / sum(tanh(s a)) over all weights together: the gradient at zero."""
    total = bounded = 0.0
    for weight in weights:
        magnitudes = weight.detach().abs()
        total += float(magnitudes.sum(dtype=torch.float64))
        bounded += float(_bend(magnitudes, scale).mul_(2).sub_(1).sum(dtype=torch.float64))
    return scale * total / bounded


def _slope(weight: Tensor, scale: float) -> Tensor:
    """sign(w) sech^2(s w) / 4."""
    slope: Tensor = torch.ops.aten.sigmoid_backward(_wide(weight.sign()), _bend(weight, scale))
    return slope


def _bend(weight: Tensor, scale: float) -> Tensor:
    """(1 + tanh(s w)) / 2, as a sigmoid, which torch 2.13 computes in a tenth of tanh's time on a CPU."""
    return _wide(weight).mul(2 * scale).sigmoid_()


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


class Penalty:
    """A penalty on weights that grows: `strength` times `growth` to the number of epochs since it began.

    The defaults are those of the HyperSparse authors' code. Penalties override `add`, and `prepare` where a weight's
    gradient depends on the others.
    """

    def __init__(self, strength: float = 5e-6, growth: float = 1.05) -> None:
        if strength <= 0 or growth < 1:
            raise InputError(f"expected {strength=} above 0 and {growth=} of at least 1")
        self.strength, self.growth = strength, growth

    def at(self, epochs: int) -> float:
        """The strength after this many epochs."""
        return self.strength * self.growth**epochs

    def prepare(self, weights: Mapping[str, Tensor], sparsity: float) -> None:
        """What all weights together say, before each step; weights are whole."""

    def begin(self) -> None:
        """An epoch begins."""

    def add(self, gradient: Tensor, weight: Tensor, strength: float) -> None:
        """Adds the penalty's gradient at these weights, times the strength, in place."""
        raise NotImplementedError(f"{type(self).__name__} defines no gradient")


class HyperSparsity(Penalty):
    """The HyperSparse loss (`hypersparse_gradient`), with its scale and its sums computed anew `every` so many steps.

    The authors' code sorts all weights at every step; between two steps they hardly move. At the start of an epoch the
    numbers are always new.
    """

    def __init__(self, strength: float = 5e-6, growth: float = 1.05, every: int = 50) -> None:
        super().__init__(strength, growth)
        if every < 1:
            raise InputError(f"every counts steps and must be at least 1, got {every}")
        self.every, self._age = every, 0
        self._scale = self._factor = 0.0

    def begin(self) -> None:
        self._age = 0

    def prepare(self, weights: Mapping[str, Tensor], sparsity: float) -> None:
        if self._age % self.every == 0:
            whole = _Whole(weights)
            self._scale = hypersparse_scale(whole, sparsity)
            self._factor = hypersparse_factor(whole, self._scale)
        self._age += 1

    def add(self, gradient: Tensor, weight: Tensor, strength: float) -> None:
        gradient.add_(_slope(weight, self._scale), alpha=4 * strength * self._factor)


class _Whole:
    """Weights, each gathered when it is its turn."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __iter__(self) -> Iterator[Tensor]:
        return (shards.whole(weight.detach()) for weight in self.weights.values())


class Lasso(Penalty):
    """The sum of |w| (L1)."""

    def add(self, gradient: Tensor, weight: Tensor, strength: float) -> None:
        gradient.add_(weight.sign(), alpha=strength)


class Ridge(Penalty):
    """The sum of w^2 (L2)."""

    def add(self, gradient: Tensor, weight: Tensor, strength: float) -> None:
        gradient.add_(weight, alpha=2 * strength)
