"""Sampling of N:M masks, against the plain formula, `gumbel_softmax(logits) @ candidates`, and that compiled.

    python -m benchmarks.gumbel

Time is the least of several repeats in one process, one thread; memory is the highest of a fresh process beyond the
logits and their gradient, for the mask and everything needed to get there and back.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.ops import candidates, gumbel_nm_mask

RESULTS = Path(__file__).parent / "results"
PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 8)]
SCALE, TEMPERATURE = 100.0, 2.0


def eager(logits: Tensor, table: Tensor) -> Tensor:
    """MaskLLM's formula: [groups, candidates] to [groups, m]."""
    return torch.nn.functional.gumbel_softmax(logits * SCALE, tau=TEMPERATURE) @ table


def setting(how: str, n: int, m: int, weights: int) -> tuple[Tensor, Callable[[], Tensor]]:
    """The logits, and what samples a mask from them."""
    table = candidates(n, m)
    logits = 0.01 * torch.randn(len(table), weights // m)
    if how == "ours":
        logits.requires_grad_()
        return logits, lambda: gumbel_nm_mask(logits, n, m, SCALE, TEMPERATURE, seed=1)
    logits = logits.T.contiguous().requires_grad_()
    function = torch.compile(eager) if how == "compiled" else eager
    return logits, lambda: function(logits, table)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found[2:])


def times(how: str, n: int, m: int, weights: int, repeats: int) -> dict[str, float]:
    """Forward, and forward and backward."""
    logits, sample = setting(how, n, m, weights)
    upstream = torch.randn(weights // m, m)

    def both() -> None:
        logits.grad = None
        torch.autograd.backward(sample(), upstream)

    with torch.no_grad():
        forward = seconds(sample, repeats)
    return {"forward": forward, "both": seconds(both, repeats)}


def peak(how: str, n: int, m: int, weights: int) -> float:
    """Bytes per weight beyond logits and gradient, in a process of its own."""
    code = f"from benchmarks.gumbel import measure; measure({how!r}, {n}, {m}, {weights})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    return float(done.stdout) / weights


def measure(how: str, n: int, m: int, weights: int) -> None:
    torch.set_num_threads(1)
    logits, sample = setting(how, n, m, weights)
    upstream = torch.ones(1, 1).expand(weights // m, m)
    _, small = setting(how, n, m, 1 << 12)
    torch.autograd.backward(small(), torch.ones(4096 // m, m))  # loads what is loaded at first use
    Path("/proc/self/clear_refs").write_text("5")  # the highest is from now on
    before = resident("VmRSS")
    torch.autograd.backward(sample(), upstream)
    print(resident("VmHWM") - before - logits.nbytes)  # the gradient is of the logits' size


def resident(which: str) -> int:
    """Bytes, now or at the highest."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{which}:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| pattern | | eager, ms | compiled | ours | ours over eager | bytes per weight: eager, ours |")
    print("|---|---|---|---|---|---|---|")
    for n, m in PATTERNS:
        found = {how: times(how, n, m, options.weights, options.repeats) for how in ("eager", "compiled", "ours")}
        memory = {how: peak(how, n, m, 8 * options.weights) for how in ("eager", "ours")}
        rows.append({"pattern": f"{n}:{m}", "seconds": found, "bytes_per_weight": memory})
        for kind in ("forward", "both"):
            one = {how: 1000 * each[kind] for how, each in found.items()}
            print(
                f"| {n}:{m} | {kind} | {one['eager']:.1f} | {one['compiled']:.1f} | {one['ours']:.1f} | "
                f"{one['eager'] / one['ours']:.1f} x | {memory['eager']:.1f}, {memory['ours']:.1f} |"
            )
    about = {"weights": options.weights, "threads": 1, "torch": torch.__version__}
    (RESULTS / "gumbel.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
