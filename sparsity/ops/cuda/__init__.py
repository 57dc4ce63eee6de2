"""CUDA: kernels in Triton, imported when a CUDA tensor first gets here. Without it, plain PyTorch does the same.

What they compute is tested in Triton's interpreter and on a GPU where there is one. No time of them has been measured.
"""

import logging
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)  # compute capability: the first with products of bfloat16
SHARED = 227 << 10  # bytes of shared memory that a program has on a Hopper GPU

log = logging.getLogger(__name__)


def serves(tensor: Tensor) -> bool:
    """Whether a kernel takes this tensor: floats of 16 or 32 bits, at least one, on a GPU for which there is Triton."""
    return tensor.is_cuda and tensor.dtype in DTYPES and tensor.numel() > 0 and _available(tensor.device.index)


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that a program may have where this tensor is."""
    if not tensor.is_cuda:
        return SHARED
    properties = torch.cuda.get_device_properties(tensor.device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def processors(tensor: Tensor) -> int:
    """How many multiprocessors there are where this tensor is; 1 in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


@cache
def _available(device: int) -> bool:
    """One line of the log says why not."""
    if torch.cuda.get_device_capability(device) < OLDEST:
        log.info("GPU %d is older than compute capability 8.0: operations run in plain PyTorch there", device)
        return False
    try:
        import triton

        triton.runtime.driver.active.get_current_device()  # needs a C compiler, as every launch does
    except Exception as error:
        log.info("Triton cannot be used, so operations run in plain PyTorch, which is slower: %s", error)
        return False
    return True
