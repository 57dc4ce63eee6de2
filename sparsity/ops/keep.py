"""Zeroing what a mask does not keep, in place."""

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements masked together: their widened mask stays in the cache
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def keep_(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zeroes the elements of a floating tensor where the bool mask is False, in place, and returns the tensor.

    What is kept stays the same to the bit, and what is not becomes +0.0, also where it is NaN or infinite. The bits
    are multiplied by 0 or 1 as integers: several times faster than `masked_fill_` on a CPU, whose loop over bools is
    not vectorised, and without an inverted copy of the mask. The extra memory is 4 MB.
    """
    bits = tensor.detach().view(INTEGERS[tensor.element_size()])
    if tensor.is_cpu and tensor.numel() > CHUNK and tensor.is_contiguous() and mask.is_contiguous():
        for part, kept in zip(torch.split(bits.view(-1), CHUNK), torch.split(mask.view(-1), CHUNK), strict=True):
            part.mul_(kept)
    else:
        bits.mul_(mask)
    return tensor
