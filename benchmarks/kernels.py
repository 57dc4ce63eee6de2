"""Operations on kept weights beside the dense ones: what they take, and from which density on they pay.

    python -m benchmarks.kernels                 # on the CPU, all cores; nothing else should run

Each ratio is the dense time over ours, of medians of calls in turn, in one process. Dense steps write their gradients
into memory that they had before, which is kinder to them than autograd is. `step` is forward, the gradient of the
input, and the gradient of the weight or of its kept places.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity import Sparsifier, advice, models
from sparsity.compact import Compact
from sparsity.convert import to_sparse
from sparsity.distributions import Uniform
from sparsity.ops import (
    bitmap_linear,
    block_sparse_linear,
    compressed,
    compressed_bitmap,
    compressed_blocks,
    kth_largest,
    native,
    sparse_linear,
)

RESULTS = Path(__file__).parent / "results" / "kernels_cpu.json"
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
SHAPES = ((1024, 1), (1024, 32), (1024, 256), (4096, 1), (4096, 32), (4096, 256))
Row = dict[str, Any]


def medians(calls: dict[str, Callable[[], object]], seconds: float = 0.5) -> dict[str, float]:
    return advice.medians(calls, torch.device("cpu"), seconds)


def dense_step(x: Tensor, slope: Tensor, weight: Tensor) -> Callable[[], object]:
    """Forward, and both gradients, into memory that is there."""
    y, to_x, to_weight = torch.empty_like(slope), torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        torch.mm(x, weight.t(), out=y)
        torch.mm(slope, weight, out=to_x)
        torch.mm(slope.t(), x, out=to_weight)

    return run


def selection(size: int) -> Row:
    """The value that leaves a tenth of so many above it."""
    values, k = torch.randn(size), size // 10
    calls: dict[str, Callable[[], object]] = {
        "kth_largest": lambda: kth_largest([values], k), "kthvalue": lambda: values.kthvalue(size - k + 1),
        "topk": lambda: values.topk(k), "sort": lambda: values.sort(),
    }  # fmt: skip
    return {"elements": size, "ms": medians(calls, 2.0)}


def layer(size: int, batch: int, density: float) -> Row:
    """A square layer: forward, and the whole step."""
    weight = torch.randn(size, size) * (torch.rand(size, size) < density)
    values, columns, starts = compressed(weight)
    x, slope = torch.randn(batch, size), torch.randn(batch, size)
    rows = weight.to_sparse_csr()
    narrow, narrow_x = weight.bfloat16(), x.bfloat16()

    def sparse_step() -> None:
        sparse_linear(x, values, columns, starts)
        torch.ops.sparsity.linear_input(slope, values, columns, starts, size)
        torch.ops.sparsity.linear_values(slope, x, columns, starts)

    with torch.no_grad():
        found = medians({
            "dense": lambda: F.linear(x, weight), "sparse": lambda: sparse_linear(x, values, columns, starts),
            "torch's CSR": lambda: F.linear(x, rows), "dense, bfloat16": lambda: F.linear(narrow_x, narrow),
            "dense step": dense_step(x, slope, weight), "sparse step": sparse_step,
        })  # fmt: skip
    return {
        "size": size, "batch": batch, "density": density, "ms": found, "forward": found["dense"] / found["sparse"],
        "step": found["dense step"] / found["sparse step"],
    }  # fmt: skip


def bitmap(size: int, batch: int, density: float) -> Row:
    """The forward pass of the same layer as a bitmap, in float32 and bfloat16, beside compressed rows."""
    weight = torch.randn(size, size) * (torch.rand(size, size) < density)
    x, rows, bits = torch.randn(batch, size), compressed(weight), compressed_bitmap(weight)
    narrow, narrow_x, narrow_bits = weight.bfloat16(), x.bfloat16(), (bits[0].bfloat16(), *bits[1:])
    with torch.no_grad():
        found = medians({
            "dense": lambda: F.linear(x, weight), "rows": lambda: sparse_linear(x, *rows),
            "bitmap": lambda: bitmap_linear(x, *bits), "dense, bfloat16": lambda: F.linear(narrow_x, narrow),
            "bitmap, bfloat16": lambda: bitmap_linear(narrow_x, *narrow_bits),
        })  # fmt: skip
    return {
        "size": size, "batch": batch, "density": density, "ms": found, "forward": found["dense"] / found["bitmap"],
        "forward, bfloat16": found["dense, bfloat16"] / found["bitmap, bfloat16"],
    }  # fmt: skip


def blocks(size: int, batch: int, side: int, density: float) -> Row:
    """The same layer in blocks."""
    cells = torch.rand(size // side, size // side) < density
    weight = torch.randn(size, size) * cells.repeat_interleave(side, 0).repeat_interleave(side, 1)
    values, columns, starts = compressed_blocks(weight, side=side)
    x, slope = torch.randn(batch, size), torch.randn(batch, size)
    rows = weight.to_sparse_bsr((side, side))

    def sparse_step() -> None:
        block_sparse_linear(x, values, columns, starts, size)
        torch.ops.sparsity.blocks_input(slope, values, columns, starts, size)
        torch.ops.sparsity.blocks_values(slope, x, columns, starts, side)

    with torch.no_grad():
        found = medians({
            "dense": lambda: F.linear(x, weight),
            "sparse": lambda: block_sparse_linear(x, values, columns, starts, size),
            "torch's BSR": lambda: F.linear(x, rows), "dense step": dense_step(x, slope, weight),
            "sparse step": sparse_step,
        })  # fmt: skip
    return {
        "size": size, "batch": batch, "side": side, "density": density, "ms": found,
        "forward": found["dense"] / found["sparse"], "step": found["dense step"] / found["sparse step"],
    }  # fmt: skip


def optimizers(size: int, sparsity: float) -> Row:
    """A step of AdamW alone on one weight: dense, with its masks by hand, by the sparsifier, and compact."""
    calls: dict[str, Callable[[], object]] = {}
    bytes_of: dict[str, int] = {}
    for kind in ("dense", "masked by hand", "sparsifier", "compact", "compact, fused"):
        net = nn.Linear(size, size, bias=False)
        [weight] = net.parameters()
        adam: torch.optim.Optimizer = torch.optim.AdamW([weight], 1e-4, fused=True if "fused" in kind else None)
        adam = Compact(adam) if "compact" in kind else adam
        sparsifier = Sparsifier(sparsity)
        sparsifier.attach(net, adam)
        weight.grad = torch.randn(size, size)
        calls[kind] = stepping(kind, weight, adam, sparsifier)
        calls[kind]()
        bytes_of[kind] = sum(each.numel() * each.element_size() for each in adam.state[weight].values())
    return {"weights": size * size, "sparsity": sparsity, "ms": medians(calls, 2.0), "state": bytes_of}


def stepping(
    kind: str, weight: nn.Parameter, adam: torch.optim.Optimizer, sparsifier: Sparsifier
) -> Callable[[], object]:
    [mask] = sparsifier.masks.values()

    def by_hand() -> None:
        assert weight.grad is not None
        weight.grad.mul_(mask)
        adam.step()
        with torch.no_grad():
            for tensor in (weight, adam.state[weight]["exp_avg"], adam.state[weight]["exp_avg_sq"]):
                tensor.mul_(mask)

    def by_sparsifier() -> None:
        sparsifier.update(1)
        adam.step()
        sparsifier.apply()

    plain: dict[str, Callable[[], object]] = {"dense": lambda: adam.step(), "masked by hand": by_hand}
    return plain.get(kind, by_sparsifier)


def masked_network(sparsity: float) -> Row:
    """A training step of the dense arithmetic: without masks, with them, and with a compact optimizer."""
    calls: dict[str, Callable[[], object]] = {}
    x, y = torch.randn(128, 1024), torch.randint(0, 10, (128,))
    for kind in ("dense", "masked", "masked, compact"):
        net = MLP()
        adam: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
        adam = Compact(adam) if kind == "masked, compact" else adam
        sparsifier = Sparsifier(sparsity, distribution=Uniform())
        if kind != "dense":
            sparsifier.attach(net, adam)
        calls[kind] = training(net, x, y, adam, sparsifier if kind != "dense" else None)
    return {"network": "MLP", "sparsity": sparsity, "ms": medians(calls, 2.0)}


class MLP(nn.Sequential):
    """Three layers of 4096."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


def network(name: str, sparsity: float) -> Row:
    """A whole network: serving, and a training step with AdamW, beside the dense one."""
    torch.manual_seed(0)
    net: nn.Module
    if name == "MLP":
        net, x, y = MLP(), torch.randn(128, 1024), torch.randint(0, 10, (128,))
    else:
        net, x, y = (
            models.GPT(width=512, depth=4, heads=8),
            torch.randint(0, 256, (8, 128)),
            torch.randint(0, 256, (8, 128)),
        )
    sparsifier = Sparsifier(sparsity, distribution=Uniform())
    sparsifier.attach(net)
    sparse = to_sparse(net, sparsifier.masks)
    calls: dict[str, Callable[[], object]] = {}
    for kind, model in (("dense", net), ("sparse", sparse)):
        calls[f"{kind}, serving"] = serving(model, x)
        calls[f"{kind}, training"] = training(model, x, y, torch.optim.AdamW(model.parameters(), 1e-4))
    found = medians(calls, 2.0)
    return {
        "network": name, "sparsity": sparsity, "ms": found,
        "serving": found["dense, serving"] / found["sparse, serving"],
        "training": found["dense, training"] / found["sparse, training"],
    }  # fmt: skip


def serving(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(x)
            return found

    return run


def training(
    model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier | None = None
) -> Callable[[], object]:
    def run() -> None:
        logits = model(x)
        torch.autograd.backward(F.cross_entropy(logits.flatten(0, -2), y.flatten()))
        if sparsifier:
            sparsifier.update(1)
        optimizer.step()
        if sparsifier:
            sparsifier.apply()
        optimizer.zero_grad(set_to_none=False)  # gradients stay where they are: kinder to large dense ones

    return run


def layers_table(rows: list[Row], what: str) -> str:
    """Ratios in Markdown: layers by densities."""
    lines = ["| size, batch | dense, ms | " + " | ".join(f"{density:g}" for density in DENSITIES) + " |"]
    lines.append("|---" * (len(DENSITIES) + 2) + "|")
    for size, batch in SHAPES:
        mine = {row["density"]: row for row in rows if (row["size"], row["batch"]) == (size, batch)}
        dense = statistics.median(row["ms"]["dense" if what == "forward" else "dense step"] for row in mine.values())
        cells = " | ".join(f"{mine[density][what]:.2f}" for density in DENSITIES)
        lines.append(f"| {size}, {batch} | {dense:.2f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore", "Sparse (CSR|BSR) tensor support is in beta")
    torch.manual_seed(0)
    cases = [(*shape, density) for shape in SHAPES for density in DENSITIES]
    result: dict[str, Any] = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "native": native.library() is not None,
        "capability": torch.backends.cpu.get_cpu_capability(), "selection": selection(50_000_000),
        "layers": [layer(*case) for case in track(cases, "layers")],
        "bitmap": [bitmap(4096, batch, d) for batch in (1, 4, 32) for d in (0.5, 0.2, 0.1)],
        "blocks": [blocks(4096, 256, side, d) for side in (16, 32, 64, 128) for d in (0.5, 0.2, 0.1)],
        "optimizers": [optimizers(2048, s) for s in (0.9, 0.95)], "masked": masked_network(0.9),
        "networks": [network(name, s) for name in ("MLP", "GPT") for s in (0.9, 0.95)],
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["selection"]))
    for what in ("forward", "step"):
        print(f"{what}\n{layers_table(result['layers'], what)}")
    for row in [*result["bitmap"], *result["blocks"], *result["optimizers"], result["masked"], *result["networks"]]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
