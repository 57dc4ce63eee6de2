"""Memory: what this process keeps of what it has freed."""

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers its options


def keep_freed() -> bool:
    """Lets glibc keep the memory that is freed, for the next tensor; returns whether it will.

    By itself it gives larger blocks back to the system, and the tensors of the next training step are mapped anew, page
    by page, which takes small convolutional networks on a CPU much of their time. The process then has its peak of
    memory until it ends. Does nothing where there is no glibc, and where the environment has settings of its own for
    it (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    settled = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if settled or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, 32 << 20) and mallopt(TRIM_THRESHOLD, 1 << 30))
