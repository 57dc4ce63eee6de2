"""One update of dynamic sparse training over 25 million weights, beside the same update by `torch.topk` and by a sort.

    python -m benchmarks.regrow

Six matrices of 2048 x 2048 at 90 % sparsity; 30 % of the kept weights are dropped and grown anew in each. All ways
start from the same weights, gradients and masks and take turns; the masks of RigL, of topk and of the sort are
compared. Each layer is done alone, so topk and the sort have no more to hold than ours. Times are medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from sparsity import Horizon
from sparsity.dynamic import Dynamic, Regrowth
from sparsity.redistribution import Proportional
from sparsity.schedules import ConstantDrop
from sparsity.scores import Gradient, Momentum, Random

RESULT = Path(__file__).parent / "results" / "regrow.json"
LAYERS, SIZE, FRACTION = 6, 2048, 0.3
RULES: dict[str, Callable[[], Regrowth]] = {
    "RigL": lambda: Regrowth(Gradient(), ConstantDrop(FRACTION, 1, 1.0)),
    "SET": lambda: Regrowth(Random(), ConstantDrop(FRACTION, 1, 1.0)),
    "SparseMomentum": lambda: Regrowth(Momentum(), ConstantDrop(FRACTION, 1, 1.0), Proportional()),
}


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The layers with a gradient and a momentum, as in the middle of training."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    return model, optimizer


def ours(name: str) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Seconds of one update, and the masks before and after it."""
    model, optimizer = network()
    sparsifier = Dynamic(0.9, RULES[name]())
    sparsifier.attach(model, optimizer, horizon=Horizon(steps=100))
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    before = sparsifier.masks
    start = time.perf_counter()
    sparsifier.update(1)
    return time.perf_counter() - start, before, sparsifier.masks


def by_topk(values: Tensor, count: int) -> Tensor:
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().topk(count, sorted=False).indices] = True
    return mask.view(values.shape)


def by_sort(values: Tensor, count: int) -> Tensor:
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().argsort(descending=True)[:count]] = True
    return mask.view(values.shape)


@torch.no_grad()
def plain(select: Callable[[Tensor, int], Tensor], before: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """RigL's update as one would write it: the two selections, new masks, zeroed weights, momentum and gradients."""
    model, optimizer = network()
    for name, weight in model.named_parameters():
        for tensor in (weight, optimizer.state[weight]["momentum_buffer"]):
            tensor.mul_(before[name])
        weight.grad = torch.randn_like(weight)
    found = {}
    start = time.perf_counter()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        kept = int(before[name].sum())
        moved = int(FRACTION * kept)
        stays = select(weight.abs().masked_fill(~before[name], -1), kept - moved)
        mask = stays | select(weight.grad.abs().masked_fill(stays, -1), moved)
        for tensor in (weight, optimizer.state[weight]["momentum_buffer"], weight.grad):
            tensor.mul_(mask)
        found[name] = mask
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    seconds: dict[str, list[float]] = {name: [] for name in (*RULES, "torch.topk", "torch.sort")}
    same = True
    for _ in track(range(parser.parse_args().repeats)):
        for name in RULES:
            taken, before, after = ours(name)
            seconds[name].append(taken)
            if name == "RigL":
                start, wanted = before, after
        for name, select in (("torch.topk", by_topk), ("torch.sort", by_sort)):
            taken, found = plain(select, start)
            seconds[name].append(taken)
            same &= all(torch.equal(mask, wanted[layer]) for layer, mask in found.items())
    medians = {name: round(statistics.median(each), 3) for name, each in seconds.items()}
    result = {
        "weights": LAYERS * SIZE**2, "sparsity": 0.9, "fraction": FRACTION, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "same masks": same, "seconds": medians,
        "ratio to torch.topk": {name: round(each / medians["torch.topk"], 2) for name, each in medians.items()},
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
