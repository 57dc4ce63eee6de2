"""Compiles all kernels, in bfloat16 where they take it, for a GPU that need not be there.

    python -m tests.ops.compiled 90                       # its compute capability; without TRITON_INTERPRET

Prints a line for each: its name, how much shared memory it takes, and whether it has the instructions of tensor cores.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsity.ops.cuda import bitmap, blocks, gumbel, pack, select

ALIGNED = [["tt.divisibility", 16]]
PRODUCT = {"x": "*bf16", "values": "*bf16", "order": "*i32", "sources": "*i32", "starts": "*i64", "bias": "*bf16",
           "y": "*bf16", "batch": "i32", "width": "i32", "out": "i32"}  # fmt: skip
SLOPES = {"y": "*bf16", "x": "*bf16", "rows": "*i32", "columns": "*i32", "values": "*bf16", "batch": "i32",
          "out": "i32", "width": "i32", "share": "i32"}  # fmt: skip
BITMAP = {"x": "*bf16", "values": "*bf16", "bits": "*u8", "starts": "*i64", "bias": "*bf16", "y": "*bf16",
          "batch": "i32", "width": "i32", "out": "i32", "length": "i32"}  # fmt: skip
SAMPLED = {"logits": "*fp32", "table": "*fp32", "slopes": "*fp32", "found": "*fp32", "groups": "i32", "scale": "fp32",
           "coldness": "fp32", "first": "i32", "second": "i32"}  # fmt: skip
PACKED = {"weight": "*bf16", "values": "*bf16", "indices": "*u8", "groups": "i32", "length": "i32"}
COUNTED = {"bits": "*i32", "counts": "*i32", "size": "i32", "prefix": "i32"}
CASES: list[tuple[Any, dict[str, str], dict[str, Any], int, int]] = []

for side in (128, 32):
    tiles = blocks._tiles(torch.empty(1, 1024, dtype=torch.bfloat16), side, 8192)
    sizes = {"SIDE": side, "STEP": min(side, tiles.step), "EVEN": True, "PRECISION": "ieee"}
    for turned in (False, True):
        more = {"ROWS": tiles.rows, "GROUP": 4, "TURNED": turned, "BIASED": True, "ACTIVATION": None}
        CASES.append((blocks._product_kernel, PRODUCT, {**sizes, **more}, tiles.warps, 2 * tiles.buffers - 1))
    tiles = blocks._tiles(torch.empty(1, 1024, dtype=torch.bfloat16), side, side)
    CASES.append((blocks._values_kernel, SLOPES, {**sizes, "STEP": tiles.step}, tiles.warps, tiles.buffers))
of_bitmap = {"ROWS": 16, "BATCH": 16, "BYTES": 32, "BIASED": True, "PRECISION": "ieee"}
CASES.append((bitmap._linear_kernel, BITMAP, of_bitmap, 4, 3))
of_samples = {"COUNT": 6, "M": 4, "LANES": 4, "UNROLL": 6, "BLOCK": gumbel.BLOCK}
CASES += [(kernel, SAMPLED, of_samples, 4, 3) for kernel in (gumbel._mask_kernel, gumbel._gradient_kernel)]
of_groups = {"N": 2, "M": 4, "WIDTH": 2, "BLOCK": pack.BLOCK}
CASES += [(kernel, PACKED, of_groups, 4, 3) for kernel in (pack._pack_kernel, pack._unpack_kernel)]
of_counts = {"SHIFT": 16, "WIDTH": 32, "WITHIN": False, "BLOCK": select.BLOCK, "COPIES": 8, "DIGIT": 16}
CASES.append((select._histogram_kernel, COUNTED, of_counts, 8, 3))


def compiled(kernel: Any, given: dict[str, str], sizes: dict[str, Any], warps: int, stages: int) -> str:
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel, signature={name: given.get(name, "constexpr") for name in names}, constexprs=sizes,
        attrs={(i,): ALIGNED for i, name in enumerate(names) if given.get(name, "f").startswith(("*", "i"))
               and name not in ("first", "second", "share", "prefix")},
    )  # fmt: skip
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    return f"{kernel.__name__} {made.metadata.shared} {'mma' in made.asm['ptx']}"


if __name__ == "__main__":
    for case in CASES:
        sys.stdout.write(compiled(*case) + "\n")
