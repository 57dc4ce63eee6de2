"""Operations: one definition each in plain PyTorch. They know nothing of the rest of the package."""

from sparsity.ops.adaptive import adaptive_counts
from sparsity.ops.bitmap import bitmap_linear, compressed_bitmap, decompressed_bitmap
from sparsity.ops.blocks import block_sparse_linear, compressed_blocks, decompressed_blocks
from sparsity.ops.finite import all_finite
from sparsity.ops.gumbel import best_nm_mask, candidates, gumbel_nm_gradient, gumbel_nm_mask
from sparsity.ops.keep import keep_
from sparsity.ops.linear import compressed, decompressed, sparse_linear
from sparsity.ops.pack import pack_nm, unpack_nm
from sparsity.ops.precision import whole_digits
from sparsity.ops.select import kth_largest, largest
from sparsity.ops.semi import semi_sparse_linear

__all__ = [
    "adaptive_counts", "all_finite", "best_nm_mask", "bitmap_linear", "block_sparse_linear", "candidates", "compressed",
    "compressed_bitmap", "compressed_blocks", "decompressed", "decompressed_bitmap", "decompressed_blocks",
    "gumbel_nm_gradient", "gumbel_nm_mask", "keep_", "kth_largest", "largest", "pack_nm", "semi_sparse_linear",
    "sparse_linear", "unpack_nm", "whole_digits",
]  # fmt: skip
