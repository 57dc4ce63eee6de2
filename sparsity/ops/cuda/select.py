"""Histograms of 16 bits of floats: see `sparsity.ops.select` for the selection by them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1 << 12  # elements of a program
COPIES = 8  # of the counts: what is often met is not counted in one place alone
MOST = 1 << 30  # elements that 32-bit counts are for
INTEGERS = {2: torch.int16, 4: torch.int32}


def histogram(values: Tensor, shift: int, prefix: int | None) -> Tensor:
    """How many of the floats have each value of the 16 bits above `shift`, in order, of those with this prefix.

    Int64, where the values are.
    """
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
    for part in torch.split(values.contiguous().view(INTEGERS[values.element_size()]), MOST):
        copies = torch.zeros(COPIES, 1 << 16, dtype=torch.int32, device=values.device)
        with torch.cuda.device_of(values):
            _histogram_kernel[(triton.cdiv(len(part), BLOCK),)](
                part, copies, len(part), prefix or 0, SHIFT=shift, WIDTH=8 * part.element_size(),
                WITHIN=prefix is not None, BLOCK=BLOCK, COPIES=COPIES, DIGIT=16, num_warps=8,
            )  # fmt: skip
        counts += copies.sum(0)
    return counts


@triton.jit(do_not_specialize=["prefix"])
def _histogram_kernel(
    bits, counts, size, prefix, SHIFT: tl.constexpr, WIDTH: tl.constexpr, WITHIN: tl.constexpr, BLOCK: tl.constexpr,
    COPIES: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """Adds those of one block.

    Its least and its largest digit are counted by sums: pruned weights are all zero, and scores of what is not to be
    chosen all -inf, and additions to one place wait for one another.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = place < size
    key = tl.load(bits + place, mask=here, other=0).to(tl.int32)
    key = key ^ ((key >> 31) & ((1 << WIDTH - 1) - 1))  # has the order of the floats
    digit = key >> SHIFT
    if WITHIN:
        here = here & (digit >> DIGIT == prefix)
        digit = digit & ((1 << DIGIT) - 1)
    else:
        digit += 1 << DIGIT - 1
    least, most = tl.min(tl.where(here, digit, 1 << DIGIT)), tl.max(tl.where(here, digit, -1))
    to = counts + (tl.program_id(0) % COPIES << DIGIT)
    if least <= most:
        lowest, highest = here & (digit == least), here & (digit == most) & (least < most)
        tl.atomic_add(to + least, tl.sum(lowest.to(tl.int32)), sem="relaxed")
        tl.atomic_add(to + most, tl.sum(highest.to(tl.int32)), sem="relaxed")
        tl.atomic_add(to + digit, 1, mask=here & (digit != least) & (digit != most), sem="relaxed")
