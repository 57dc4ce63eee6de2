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

from benchmarks import readme
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


def text(result: Row) -> str:
    """All tables, in Markdown."""
    layers = {(row["size"], row["batch"], row["density"]): row["ms"] for row in result["layers"]}
    names = ("dense", "dense, bfloat16", "sparse", "torch's CSR")
    beside = [
        f"| 4096, {batch} | " + " | ".join(f"{layers[4096, batch, 0.1][name]:.2f}" for name in names) + " |"
        for batch in (1, 32, 256)
    ]
    kinds = ("dense", "rows", "bitmap", "dense, bfloat16", "bitmap, bfloat16")
    bitmaps = [
        f"| {row['batch']}, {row['density']:g} | " + " | ".join(f"{row['ms'][kind]:.2f}" for kind in kinds) + " |"
        for row in result["bitmap"]
    ]
    cells = {(row["side"], row["density"]): f"{row['forward']:.1f} / {row['step']:.1f}" for row in result["blocks"]}
    sides = [f"| {side} | {' | '.join(cells[side, d] for d in (0.5, 0.2, 0.1))} |" for side in (16, 32, 64, 128)]
    bsr = [row["ms"]["torch's BSR"] / row["ms"]["sparse"] for row in result["blocks"]]
    networks = [
        f"| {row['network']}, {100 * row['sparsity']:g} % zeros | {row['ms']['dense, serving']:.0f} ms | "
        f"{row['serving']:.1f} | {row['ms']['dense, training']:.0f} ms | {row['training']:.1f} |"
        for row in result["networks"]
    ]
    chosen, steps, masked = result["selection"]["ms"], result["optimizers"][0], result["masked"]["ms"]
    ms = steps["ms"]
    return f"""
How many times as fast as dense, in float32, on two cores of an AMD EPYC with AVX-512: a square layer by size and rows
of the batch, at densities from 50 to 2 % (`python -m benchmarks.kernels`, [results](results/kernels_cpu.json)). First
the forward pass, then a training step: forward, the gradient of the input, and the gradient of the weight, which the
dense layer writes into memory that it had before. Calls in turn, so that none finds its numbers in the cache.

{layers_table(result["layers"], "forward")}

{layers_table(result["layers"], "step")}

The forward pass at 10 % in milliseconds, beside bfloat16 and what torch has for the same weight:

| size, batch | dense | dense in bfloat16 | `sparse_linear` | torch's CSR |
|---|---|---|---|---|
{chr(10).join(beside)}

A layer of 4096 x 4096 as a bitmap, the forward pass in milliseconds:

| batch, density | dense | `sparse_linear` | `bitmap_linear` | dense in bfloat16 | `bitmap_linear` in bfloat16 |
|---|---|---|---|---|---|
{chr(10).join(bitmaps)}

Square blocks, 4096 with a batch of 256: forward / step. torch's own BSR takes {min(bsr):.0f} to {max(bsr):.0f} times as
long as ours, and has no gradients.

| side | 50 % | 20 % | 10 % |
|---|---|---|---|
{chr(10).join(sides)}

Whole networks, AdamW and everything else included: an MLP with a hidden layer of 4096 x 4096 on batches of 128, and a
GPT of width 512 on 8 x 128 bytes, whose attention and embeddings stay dense.

| network | serving, dense | times as fast | training step, dense | times as fast |
|---|---|---|---|---|
{chr(10).join(networks)}

- The k-th largest of 50 million floats, which global pruning needs: {chosen["kth_largest"]:.0f} ms, `kthvalue`
  {chosen["kthvalue"]:.0f}, `topk` {chosen["topk"]:.0f}, `sort` {chosen["sort"]:.0f}.
- A step of AdamW on 4 million weights at 90 %: {ms["dense"]:.1f} ms dense, {ms["masked by hand"]:.1f} with masks by
  hand, {ms["sparsifier"]:.1f} with our callbacks, {ms["compact"]:.1f} with `Compact`, {ms["compact, fused"]:.1f} with
  `Compact` of a fused AdamW, whose state takes a tenth of the memory. Most of it is that gradients are masked.
- A training step of the MLP with masks and dense products: {masked["dense"]:.0f} ms without masks,
  {masked["masked"]:.0f} with them, {masked["masked, compact"]:.0f} with `Compact`.
"""


def short(result: Row) -> str:
    """The few numbers that the README has of these tables."""
    layers = {(row["size"], row["batch"], row["density"]): row for row in result["layers"]}
    networks = {(row["network"], row["sparsity"]): row for row in result["networks"]}
    lines = ["| | dense | 90 % zeros | 95 % zeros |", "|---|---|---|---|"]
    for what, name in (("forward", "forward"), ("step", "forward and backward")):
        for batch in (1, 32, 256):
            low, high = layers[4096, batch, 0.1], layers[4096, batch, 0.05]
            ms = low["ms"]["dense" if what == "forward" else "dense step"]
            ratios = f"{low[what]:.1f} x | {high[what]:.1f} x"
            lines.append(f"| a layer of 4096 x 4096, batch {batch}, {name} | {ms:.1f} ms | {ratios} |")
    for network in ("MLP", "GPT"):
        for what in ("serving", "training"):
            low, high = networks[network, 0.9], networks[network, 0.95]
            ms, ratios = low["ms"][f"dense, {what}"], f"{low[what]:.1f} x | {high[what]:.1f} x"
            lines.append(f"| {network}, {what}, all of it | {ms:.0f} ms | {ratios} |")
    masked = result["masked"]["ms"]
    alone, compact = (masked["dense"] / masked[name] for name in ("masked", "masked, compact"))
    lines.append(
        f"| MLP, training with masks and dense products | {masked['dense']:.0f} ms | "
        f"{alone:.2f} x, with `Compact` {compact:.2f} x | |"
    )
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
    print(text(result))
    readme.write("kernels", text(result), "benchmarks/README.md")
    readme.write("speed", short(result))


if __name__ == "__main__":
    main()
