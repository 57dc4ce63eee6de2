"""Operations: one definition each in plain PyTorch. They know nothing of the rest of the package."""

from sparsity.ops.select import kth_largest, largest

__all__ = ["kth_largest", "largest"]
