"""What a mask costs: a Lightning training step with each callback at 90 %, over the same step without it.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --methods StaticMask SET RigL GraNet SparseMomentum --name overhead_dynamic

Each run trains on the same batches in memory and times every step, from the end of one batch to the end of the next.
`plain` is the median of the steps that renew no masks over the dense median; `amortised` puts one measured renewal into
every hundred steps; `memory` is the peak resident memory of a fresh process beyond the dense one's, in bytes per target
weight, in a run that renews masks. Peers are used as their documentation says: `ModelPruning` prunes once, at the end
of the first epoch, and `torch.nn.utils.prune.global_unstructured` before training.
"""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import prune

from callbacks import GMP, LAMP, SET, ConstantMask, GlobalMP, GraNet, OneShot, RigL, SparseMomentum, StaticMask
from sparsity import Sparsifier, models
from sparsity.schedules import CosineDrop, Linear

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Batch = tuple[Tensor, Tensor]


class Setting:
    """A network, the shape of its inputs with their batch, and how many steps a run takes, the second half timed."""

    def __init__(self, network: Callable[[], nn.Module], shape: tuple[int, ...], steps: int, clip: float = 0.0) -> None:
        self.network, self.shape, self.steps, self.clip = network, shape, steps, clip
        self.every = steps // 4  # from one renewal to the next


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


SETTINGS = {
    "LeNet-300-100": Setting(models.LeNet300100, (128, 1, 28, 28), 400),
    "ResNet-20": Setting(models.ResNet20, (32, 3, 32, 32), 48),
    "MLP 4096x4096": Setting(mlp, (128, 4096), 16),
    "MLP 4096x4096, clipping by norm": Setting(mlp, (128, 4096), 16, clip=1.0),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
}


class Task(pl.LightningModule):
    def __init__(self, setting: Setting, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = setting.network(), optimizer

    def training_step(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Loader:
    """A few batches, again and again: half the run to the epoch."""

    def __init__(self, setting: Setting) -> None:
        self.count = setting.steps // 2
        self.batches = [(torch.randn(setting.shape), torch.randint(10, setting.shape[:1])) for _ in range(4)]

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(itertools.cycle(self.batches), len(self))

    def __len__(self) -> int:
        return self.count


class Clock(pl.Callback):
    """Times the steps of the second half of the run."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.first:
            self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.ends)]


def layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def prepare(method: str, model: Task, setting: Setting) -> list[pl.Callback]:
    """The callbacks of a method; what works without one prunes the model here."""
    renewing = Linear(start=0, end=setting.steps - setting.every, every=setting.every)
    moving = CosineDrop(0.3, setting.every, 1.0, 0.1)
    if method == "ConstantMask":
        Sparsifier(0.9).attach(model)
    if method == "torch.nn.utils.prune":
        prune.global_unstructured(layers(model), pruning_method=prune.L1Unstructured, amount=0.9)
    made: dict[str, Callable[[], pl.Callback]] = {
        "OneShot": lambda: OneShot(0.9), "GMP": lambda: GMP(0.9, schedule=renewing),
        "LAMP": lambda: LAMP(0.9, schedule=renewing), "GlobalMP": lambda: GlobalMP(0.9, schedule=renewing),
        "StaticMask": lambda: StaticMask(0.9), "ConstantMask": ConstantMask,
        "SET": lambda: SET(0.9, moving), "RigL": lambda: RigL(0.9, moving), "GraNet": lambda: GraNet(0.9, drops=moving),
        "SparseMomentum": lambda: SparseMomentum(0.9, moving),
        "ModelPruning": lambda: ModelPruning(
            "l1_unstructured", parameters_to_prune=layers(model), amount=0.9,
            apply_pruning=lambda epoch: epoch == 0, use_lottery_ticket_hypothesis=False),
    }  # fmt: skip
    return [made[method]()] if method in made else []


METHODS = ["dense", "OneShot", "GMP", "LAMP", "GlobalMP", "StaticMask", "ConstantMask", "ModelPruning",
           "torch.nn.utils.prune"]  # fmt: skip
MOVING = ["SET", "RigL", "GraNet", "SparseMomentum"]
RENEWING = ["GMP", "LAMP", "GlobalMP", *MOVING]


def run(name: str, optimizer: str, method: str) -> tuple[list[float], list[float]]:
    """The seconds of the steps without a renewal of masks, and of those with one."""
    torch.manual_seed(0)
    setting = SETTINGS[name]
    clock = Clock(setting.steps // 2)
    model = Task(setting, optimizer)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(
        max_steps=setting.steps, accelerator="cpu", callbacks=[*prepare(method, model, setting), clock],
        gradient_clip_val=setting.clip or None, **quiet,
    )  # fmt: skip
    trainer.fit(model, Loader(setting))
    seconds = clock.seconds()
    # The first timed interval is the step that begins the second half.
    renewals = {i for i in range(len(seconds)) if method in RENEWING and (setting.steps // 2 + i) % setting.every == 0}
    return ([each for i, each in enumerate(seconds) if i not in renewals], [seconds[i] for i in sorted(renewals)])


def memory(name: str, optimizer: str, method: str) -> int:
    """The peak resident bytes of a fresh process that trains."""
    code = f"from benchmarks import overhead as o; o.run({name!r}, {optimizer!r}, {method!r}); print(o.peak())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return int(done.stdout.split()[-1])


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(name: str, optimizer: str, methods: list[str], repeats: int) -> dict[str, Any]:
    """All methods in turn, several times over, so that slow minutes of the machine hit them alike."""
    plain: dict[str, list[float]] = {method: [] for method in methods}
    renewing: dict[str, list[float]] = {method: [] for method in methods}
    for _, method in track(list(itertools.product(range(repeats), methods)), description=f"{name}, {optimizer}"):
        steps, renewals = run(name, optimizer, method)
        gc.collect()
        plain[method] += steps
        renewing[method] += renewals
    dense = statistics.median(plain["dense"])
    weights = sum(module.weight.numel() for module, _ in layers(SETTINGS[name].network()))  # type: ignore[misc, operator]  # a Linear's or a convolution's
    rows = {}
    for method in methods:
        step = statistics.median(plain[method])
        renewal = statistics.median(renewing[method]) if renewing[method] else None
        rows[method] = {
            "step_ms": round(1e3 * step, 3), "plain": round(step / dense, 3),
            "renewal_ms": None if renewal is None else round(1e3 * renewal, 3),
            "amortised": None if renewal is None else round((99 * step + renewal) / 100 / dense, 3),
        }  # fmt: skip
    if (name, optimizer) == ("MLP 4096x4096", "SGD"):
        base = memory(name, optimizer, "dense")
        for method in methods[1:]:
            rows[method]["memory"] = round((memory(name, optimizer, method) - base) / weights, 2)
    return {"network": name, "optimizer": optimizer, "batch": SETTINGS[name].shape[0], "weights": weights, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="the others' results stay"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS[1:], choices=[*METHODS[1:], *MOVING])
    parser.add_argument("--name", default="overhead", help="of the result file")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = [
        measure(name, optimizer, ["dense", *options.methods], options.repeats)
        for name in options.networks
        for optimizer in OPTIMIZERS
        if optimizer == "SGD" or not SETTINGS[name].clip
    ]
    path = RESULTS / f"{options.name}.json"
    known = json.loads(path.read_text())["results"] if path.exists() else []
    results += [each for each in known if each["network"] not in options.networks]
    results.sort(key=lambda each: list(SETTINGS).index(each["network"]))
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "sparsity": 0.9, "device": "cpu"}
    path.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    print(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """The ratios in Markdown: with peers the least and the greatest of our callbacks, else a column for each."""
    methods = list(results[0]["rows"])[1:]
    peers = [method for method in methods if method in METHODS[-2:]]
    heads = ["our callbacks", "with renewals"] if peers else []
    heads = ["network, optimizer", "dense step", *heads, *(f"`{method}`" for method in peers or methods)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for result in results:
        rows = result["rows"]
        ours = [rows[method] for method in methods if method not in peers]
        cells = [span(ours, "plain"), span(ours, "amortised")] if peers else []
        cells += [ratio(rows[method]) for method in peers or methods]
        name = f"{result['network']}, {result['optimizer']}"
        lines.append(f"| {name} | {rows['dense']['step_ms']:.1f} ms | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def span(rows: list[dict[str, Any]], key: str) -> str:
    found = [row[key] for row in rows if row[key] is not None]
    return f"{min(found):.2f} to {max(found):.2f}"


def ratio(row: dict[str, Any]) -> str:
    """Steps without a renewal and, where masks are renewed, amortised."""
    return f"{row['plain']:.2f}" + ("" if row["amortised"] is None else f" / {row['amortised']:.2f}")


if __name__ == "__main__":
    main()
