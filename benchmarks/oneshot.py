"""One-shot pruning of 100 million weights to 90 %: time and peak memory, LAMP, global and `global_unstructured`.

    python -m benchmarks.oneshot

Each run is a fresh process that builds the model (six linear layers of 4096 x 4096), then prunes it once. `peak` is how
far the resident memory rises above the model's own while it does, `after` how much is still taken when it is done, in
bytes per weight. Time on a quiet machine: threads that wait for other processes' make everything several times slower.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn.utils import prune

from sparsity import Sparsifier
from sparsity.distributions import ERK, Global, LayerAdaptive, Uniform
from sparsity.scores import Magnitude

RESULT = Path(__file__).parent / "results" / "oneshot.json"
LAYERS, WIDTH = 6, 4096
METHODS = ["LAMP", "global", "uniform", "ERK", "torch.nn.utils.prune.global_unstructured"]


def prune_once(method: str, model: nn.Sequential) -> Sparsifier | None:
    """Prunes the model; what holds its masks, where the model does not itself."""
    if method == METHODS[-1]:
        pairs = [(layer, "weight") for layer in model]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.9)
        return None
    how = {"LAMP": LayerAdaptive(), "global": Global(), "uniform": Uniform(), "ERK": ERK()}[method]
    sparsifier = Sparsifier(0.9, Magnitude(), how)
    sparsifier.attach(model)
    return sparsifier


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def child(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    with torch.no_grad():
        for index, layer in enumerate(model):
            layer.weight.mul_(1 + index)  # type: ignore[operator]  # layers of different scales
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, start = status("VmRSS"), time.perf_counter()
    held = prune_once(method, model)
    seconds = time.perf_counter() - start
    peak, after = status("VmHWM") - before, status("VmRSS") - before
    del held  # so long it had to hold the masks
    used: list[torch.Tensor] = [layer.weight for layer in model]  # type: ignore[misc]  # tensors, of linear layers
    zeros = sum(int((weight == 0).count_nonzero()) for weight in used)
    weights = LAYERS * WIDTH * WIDTH
    found = {"seconds": seconds, "peak": peak / weights, "after": after / weights, "zeros": zeros, "weights": weights}
    print(json.dumps(found))


def measure(method: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in track(range(options.repeats), description="one-shot"):
        for method in METHODS:
            runs[method].append(measure(method))
    base = statistics.median(run["seconds"] for run in runs[METHODS[-1]])
    rows = []
    for method, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        rows.append({
            "method": method, "seconds": round(seconds, 2), "ratio": round(seconds / base, 3),
            "peak_bytes_per_weight": round(max(run["peak"] for run in found), 2),
            "after_bytes_per_weight": round(max(run["after"] for run in found), 2),
            "sparsity": found[0]["zeros"] / found[0]["weights"],
        })  # fmt: skip
        print(rows[-1])
    about = {"weights": LAYERS * WIDTH * WIDTH, "repeats": options.repeats, "threads": torch.get_num_threads()}
    RESULT.write_text(json.dumps({"torch": torch.__version__, **about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
