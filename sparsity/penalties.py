"""Penalties on weights, as gradients to be added to those of the loss."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

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
    total, bounded = (
        math.fsum(float(function(each).sum(dtype=torch.float64)) for each in weights)
        for function in (torch.abs, lambda weight: torch.tanh(scale * weight.abs()))
    )
    factor = scale * total / bounded
    return [weight.sign() * (1 - torch.tanh(scale * weight).square()) * factor for weight in weights]


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


def lasso_gradient(weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of sum |w| for each weight tensor: its sign, and 0 at 0."""
    return [weight.sign() for weight in weights]


def ridge_gradient(weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of sum w^2 for each weight tensor."""
    return [2 * weight for weight in weights]
