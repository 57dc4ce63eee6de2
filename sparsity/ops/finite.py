"""Whether numbers are finite, at the price of a sum."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    One of them would make the sum so too; a finite sum, which needs no mask of the tensor's size, settles it. A sum
    that is not finite may have overflowed, and only then is every element looked at.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
