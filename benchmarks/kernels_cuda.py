"""Operations on a GPU beside the dense ones of cuBLAS and torch's own sparse ones.

    python -m benchmarks.kernels_cuda            # on one GPU that nothing else uses
    python -m benchmarks.kernels_cuda --tiny     # tiny sizes, wherever it runs: tries the code, measures nothing

Each time is the median of single calls between two events, taken in turn; before each the cache of the GPU is
overwritten. Ratios are the dense time over ours.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gumbel import eager
from sparsity.ops import (
    block_sparse_linear,
    candidates,
    compressed_blocks,
    cuda,
    gumbel_nm_gradient,
    gumbel_nm_mask,
    kth_largest,
    pack_nm,
    unpack_nm,
)

RESULTS = Path(__file__).parent / "results" / "kernels_cuda.json"
DENSITIES = (0.5, 0.2, 0.1)
REPEATS = 30
FLUSH = 1 << 28  # bytes: more than a GPU's cache
Row = dict[str, Any]


def medians(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Milliseconds; where there is no GPU each is called once, and takes 0."""
    if device.type != "cuda":
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 0.0)
    found: dict[str, list[float]] = {name: [] for name in calls}
    cache = torch.empty(FLUSH, dtype=torch.int8, device=device)
    for _ in range(REPEATS + 3):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
            cache.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end))
    return {name: statistics.median(times[3:]) for name, times in found.items()}


def ratio(times: dict[str, float], dense: str, ours: str) -> float:
    return times[dense] / times[ours] if times[ours] else 0.0


def selection(size: int, device: torch.device) -> Row:
    """The value that leaves a tenth of so many above it: of random ones, and where most are zero."""
    values, k = torch.randn(size, device=device), size // 10
    pruned = values * (torch.rand(size, device=device) < 0.1)
    calls: dict[str, Callable[[], object]] = {
        "kth_largest": lambda: kth_largest([values], k), "kthvalue": lambda: values.kthvalue(size - k + 1),
        "sort": lambda: values.sort(), "kth_largest, 90 % zeros": lambda: kth_largest([pruned], k),
        "kthvalue, 90 % zeros": lambda: pruned.kthvalue(size - k + 1), "sort, 90 % zeros": lambda: pruned.sort(),
    }  # fmt: skip
    return {"elements": size, "ms": medians(calls, device)}


def blocks(size: int, batch: int, side: int, density: float, device: torch.device) -> Row:
    """A square layer in bfloat16: forward, and the whole step, beside cuBLAS and torch's BSR, which has no gradient."""
    cells = torch.rand(size // side, size // side, device=device) < density
    weight = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    weight *= cells.repeat_interleave(side, 0).repeat_interleave(side, 1)
    values, columns, starts = compressed_blocks(weight, side=side)
    x, slope = (torch.randn(batch, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    y, to_x, to_weight = torch.empty_like(slope), torch.empty_like(x), torch.empty_like(weight)
    ops = torch.ops.sparsity

    def dense_step() -> None:
        torch.mm(x, weight.t(), out=y)
        torch.mm(slope, weight, out=to_x)
        torch.mm(slope.t(), x, out=to_weight)

    def sparse_step() -> None:
        ops.blocks(x, values, columns, starts, None, size)
        ops.blocks_input(slope, values, columns, starts, size)
        ops.blocks_values(slope, x, columns, starts, side)

    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: torch.mm(x, weight.t(), out=y), "dense step": dense_step,
        "sparse": lambda: block_sparse_linear(x, values, columns, starts, size), "sparse step": sparse_step,
    }  # fmt: skip
    if device.type == "cuda":
        rows = weight.to_sparse_bsr((side, side))
        calls["torch's BSR"] = lambda: F.linear(x, rows)
    with torch.no_grad():
        error = (block_sparse_linear(x, values, columns, starts, size) - F.linear(x, weight)).float().norm()
        found = medians(calls, device)
    return {
        "size": size, "batch": batch, "side": side, "density": density, "ms": found,
        "error": float(error / F.linear(x, weight).float().norm()),
        "forward": ratio(found, "dense", "sparse"), "step": ratio(found, "dense step", "sparse step"),
    }  # fmt: skip


def bitmap(size: int, batch: int, density: float, device: torch.device) -> Row:
    """A square layer of a step of generation, by a bitmap of its kept weights."""
    weight = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    mask = torch.rand(size, size, device=device) < density
    weight *= mask
    powers = 1 << torch.arange(8, device=device)
    bits = (mask.view(size, -1, 8) * powers).sum(2).to(torch.uint8)
    counts = mask.sum(1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    x, values = torch.randn(batch, size, device=device, dtype=torch.bfloat16), weight[mask]
    calls: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, weight)}
    if cuda.serves(x):
        from sparsity.ops.cuda import bitmap as kernels

        calls["sparse"] = lambda: kernels.linear(x, values, bits, starts, None, size)
    found = medians(calls, device)
    return {"size": size, "batch": batch, "density": density, "ms": found,
            "forward": ratio(found, "dense", "sparse") if "sparse" in found else None}  # fmt: skip


def sampling(weights: int, device: torch.device) -> Row:
    """2:4 masks by Gumbel-softmax: forward, and backward alone, beside the formula in PyTorch."""
    logits = (0.01 * torch.randn(6, weights // 4, device=device)).requires_grad_()
    theirs = logits.detach().T.contiguous().requires_grad_()
    table, slopes = candidates(2, 4).to(device), torch.randn(weights // 4, 4, device=device)
    sampled = eager(theirs, table)
    with torch.no_grad():
        forward = medians({
            "eager": lambda: eager(theirs, table), "ours": lambda: gumbel_nm_mask(logits, 2, 4, 100.0, 2.0, 1),
        }, device)  # fmt: skip
    backward = medians({
        "eager": lambda: torch.autograd.grad(sampled, theirs, slopes, retain_graph=True),
        "ours": lambda: gumbel_nm_gradient(logits.detach(), slopes, 2, 4, 100.0, 2.0, 1),
    }, device)  # fmt: skip
    return {
        "weights": weights, "ms": {"forward": forward, "backward": backward},
        "forward": ratio(forward, "eager", "ours"), "backward": ratio(backward, "eager", "ours"),
    }  # fmt: skip


def packing(size: int, device: torch.device) -> Row:
    """2:4 selection and packing beside the plain formula, and torch's semi-structured product beside the dense one."""
    weight = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    values, indices = pack_nm(weight, 2, 4)
    kept = unpack_nm(values, indices, 2, 4)

    def plain() -> tuple[Tensor, Tensor]:
        groups = weight.view(-1, 4)
        places = groups.abs().topk(2).indices.sort().values
        return groups.gather(1, places), places

    calls: dict[str, Callable[[], object]] = {
        "plain": plain, "pack_nm": lambda: pack_nm(weight, 2, 4), "unpack_nm": lambda: unpack_nm(values, indices, 2, 4),
        "dense": lambda: F.linear(x, kept),
    }  # fmt: skip
    if device.type == "cuda":
        half = torch.sparse.to_sparse_semi_structured(kept)
        calls["torch's 2:4"] = lambda: F.linear(x, half)
    found = medians(calls, device)
    return {
        "size": size, "ms": found, "pack": ratio(found, "plain", "pack_nm"),
        "product": ratio(found, "dense", "torch's 2:4") if "torch's 2:4" in found else None,
    }  # fmt: skip


def measure(scale: int, device: torch.device) -> Row:
    """All tables, at sizes divided by the scale."""
    size = 8192 // scale
    sides = (128, 64, 32) if scale == 1 else (64, 32)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "cuda": torch.version.cuda, "selection": selection(100_000_000 // scale**2, device),
        "blocks": [blocks(size, size, side, density, device) for side in sides for density in DENSITIES],
        "bitmap": [bitmap(size, batch, density, device) for batch in (1, 16) for density in DENSITIES],
        "gumbel": sampling((1 << 28) // scale**2, device), "nm": packing(size, device),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="try the code at tiny sizes and write nothing")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("there is no GPU here, so nothing was measured; --tiny tries the code at tiny sizes")
    torch.manual_seed(0)
    result = measure(64 if options.tiny else 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not options.tiny:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["selection"]))
    for row in [*result["blocks"], *result["bitmap"], result["gumbel"], result["nm"]]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
