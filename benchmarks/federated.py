"""Accuracy against rounds and against bytes: sparse federated methods beside dense ones, on non-IID clients.

    python -m benchmarks.federated mnist --data data/mnist
    python -m benchmarks.federated mnist_long --data data/mnist    # 150 rounds instead of 60
    python -m benchmarks.federated mnist_falling --data data/mnist    # at a rate that falls from 0.01 to 0
    python -m benchmarks.federated cifar10 --data data/cifar10
    python -m benchmarks.federated cifar10_fast --data data/cifar10       # at a rate of 0.02 instead of 0.01
    python -m benchmarks.federated cifar10_falling --data data/cifar10    # at one that falls from 0.02 to 0

100 clients, 10 of them in a round, two epochs each, plain averages; networks and other settings are those of FedDST's
code, whose clients train five epochs in 400 rounds. Masks move every fifth round, in the first two thirds, unless a row
says otherwise. Every run has the same clients, rounds and order of batches for its seed. A tenth of the training images
is held out: curves are of these, every fifth round. The test set is read once, after the last round. Results are kept
as they come; a call that is repeated runs what is missing.

Rows with `scaled weights` begin with larger ones (`scaled("weights")`), those called `scaled` have learning rates to
match, too (`scaled()`), so that a sparse layer learns as fast as a dense one. Those called `even` give all layers
nearly the same density (`ScaledERK`, FedDST's), those called `ER` denser convolutions; the others have ERK. Where masks
move they move a tenth of the weights, or 5 or 1 % where a row says so: what FedDST's authors took for MNIST and for
CIFAR-10. `seldom`: three tenths, after each quarter of the rounds. `nine`: weights grow by the gradients of nine
batches.

With few classes a client, accuracy goes up and down from round to round: `late` is the mean over the measurements of
the last quarter of the rounds. `FedAvg then` is that of FedAvg over the quarter of its rounds before it had sent as
many bytes as the method in all of its own, or, where that lies between two measurements, the second of them.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from rich.progress import track
from torch import nn

from benchmarks import readme
from callbacks import FedDST, FedSGC, PruneFL, StaticMask
from sparsity import data, memory, models
from sparsity.congruent import Congruity, GradientCongruity
from sparsity.data.images import Images
from sparsity.distributions import ER, Distribution, ScaledERK
from sparsity.federated import Dirichlet, FedAvg, Federation, Local, Pathological, Protocol, Running, simulate
from sparsity.federated.partition import Partition
from sparsity.federated.report import figure
from sparsity.schedules import CosineDrop

RESULTS = Path(__file__).parent / "results"
EVERY = 5  # rounds from one move of masks, or one measurement, to the next


class Setting(NamedTuple):
    """A network, its data, and a protocol."""

    network: Callable[[], nn.Module]
    images: Callable[[str | None], Images]
    rounds: int
    rate: float
    falls: bool = False  # to zero with the last round, along half a cosine


SETTINGS = {
    "mnist": Setting(models.FedMNISTNet, lambda folder: data.MNIST(folder, 50), 60, 0.01),
    "mnist_long": Setting(models.FedMNISTNet, lambda folder: data.MNIST(folder, 50), 150, 0.01),
    "mnist_falling": Setting(models.FedMNISTNet, lambda folder: data.MNIST(folder, 50), 60, 0.01, True),
    "cifar10": Setting(models.FedCIFARNet, lambda folder: data.CIFAR10(folder, 50, augment=False), 100, 0.01),
    "cifar10_fast": Setting(models.FedCIFARNet, lambda folder: data.CIFAR10(folder, 50, augment=False), 100, 0.02),
    "cifar10_falling": Setting(models.FedCIFARNet, lambda f: data.CIFAR10(f, 50, augment=False), 100, 0.02, True),
}
PARTITIONS: dict[str, Callable[[], Partition]] = {
    "two classes": lambda: Pathological(2),
    "Dirichlet 0.1": lambda: Dirichlet(0.1),
    "Dirichlet 0.5": lambda: Dirichlet(0.5),
}


Method = Callable[[float], Any]
Methods = dict[str, tuple[Method, Protocol]]
LOCAL = Protocol(Local(2))
SHARES = (0.1, 0.4, 1.0)  # of what moves, by congruity
OFTEN = CosineDrop(0.1, EVERY, 2 / 3)
DENSE: Methods = {"FedAvg": (lambda _: None, LOCAL), "FedProx": (lambda _: None, Protocol(Local(2, proximal=0.1)))}


def sparse(distribution: Distribution | None = None) -> Methods:
    """Methods whose layers have these densities, ERK's if not given."""
    prunefl = CosineDrop(0.3, 5 * EVERY, 1.0)
    found: dict[str, Method] = {
        "static": lambda sparsity: StaticMask(sparsity, distribution),
        "PruneFL": lambda sparsity: PruneFL(sparsity, prunefl, distribution),
    }
    return {name: (make, LOCAL) for name, make in found.items()} | moving(OFTEN, distribution)


def moving(drops: CosineDrop, distribution: Distribution | None = None, protocol: Protocol = LOCAL) -> Methods:
    """Those whose clients move masks."""

    def congruent(share: float) -> Method:
        return lambda sparsity: FedSGC(sparsity, Congruity(share), drops, distribution)

    found: Methods = {"FedDST": (lambda sparsity: FedDST(sparsity, drops, distribution), protocol)}
    return found | {f"FedSGC, {share:g}": (congruent(share), protocol) for share in SHARES}


def scaled(methods: Methods, label: str, what: str = "both") -> Methods:
    def one(make: Method) -> Method:
        return lambda sparsity: make(sparsity).scaled(what)

    return {f"{name}, {label}": (one(make), protocol) for name, (make, protocol) in methods.items()}


SELDOM, NINE = CosineDrop(0.3, 0.25, 1.0), Protocol(Local(2, gradients=9))
METHODS: Methods = {
    **DENSE,
    **sparse(),
    "FedSGC, by gradient": (lambda sparsity: FedSGC(sparsity, GradientCongruity(0.4), OFTEN), LOCAL),
    "FedSGC, residual": (
        lambda sparsity: FedSGC(sparsity, Congruity(0.4), OFTEN), Protocol(Local(2), FedAvg(residual=True))
    ),
    **scaled(sparse(), "scaled weights", "weights"),
    **scaled(sparse(ScaledERK()), "scaled weights, even", "weights"),
    **scaled(sparse(), "scaled"),
    **scaled(sparse(ScaledERK()), "scaled, even"),
    **scaled(moving(CosineDrop(0.05, EVERY, 2 / 3), ScaledERK()), "scaled, even, 5 %"),
    **scaled(moving(CosineDrop(0.01, EVERY, 2 / 3), ScaledERK()), "scaled, even, 1 %"),
    **scaled(moving(SELDOM, ScaledERK()), "scaled, even, seldom"),
    **scaled(moving(SELDOM, ScaledERK(), NINE), "scaled, even, seldom, nine"),
    **scaled(sparse(ER()), "scaled, ER"),
    **scaled(moving(SELDOM, ER(), NINE), "scaled, ER, seldom, nine"),
}  # fmt: skip


DRAWN = (  # as many lines as can be told apart
    "FedAvg", "static", "FedDST", "FedSGC, 0.4", "static, scaled, even", "FedDST, scaled, even",
    "FedSGC, 0.4, scaled, even", "static, scaled, ER", "FedDST, scaled, ER, seldom, nine",
    "FedSGC, 0.4, scaled, ER, seldom, nine",
)  # fmt: skip


class Trained(models.Classifier):
    """SGD with momentum, as in FedDST's code."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.network())
        self.setting = setting

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.setting.rate, momentum=0.9, weight_decay=1e-3)
        if not self.setting.falls:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.setting.rounds)]


Case = tuple[str, str, float, int]  # partition, method, sparsity, seed


def run(name: str, case: Case, folder: str | None) -> dict[str, Any]:
    """One federation, trained and tested."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    memory.keep_freed()
    setting, (split, method, sparsity, seed) = SETTINGS[name], case
    pl.seed_everything(seed, verbose=False)
    make, protocol = METHODS[method]
    outcome = simulate(
        Trained(setting), setting.images(folder),
        make(sparsity), Federation(100, 10, setting.rounds, PARTITIONS[split]()), protocol,
        Running(evaluate_every=EVERY), seed=seed,
    )  # fmt: skip
    kept = ("round", "accuracy", "bytes_up", "bytes_down", "clients", "failures")
    return {
        "partition": split, "method": method, "sparsity": sparsity, "seed": seed,
        **{name: round(value, 6) for name, value in outcome.metrics.items()},
        "bytes": sum(row["bytes_up"] + row["bytes_down"] for row in outcome.rows),
        "rows": [{name: row[name] for name in kept} for row in outcome.rows],
    }  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, bytes in parts of dense FedAvg's, and FedAvg at as many bytes."""
    result = []
    dense = {(run["partition"], run["seed"]): run for run in runs if run["method"] == "FedAvg"}
    for split, method, sparsity in dict.fromkeys((run["partition"], run["method"], run["sparsity"]) for run in runs):
        mine = [run for run in runs if (run["partition"], run["method"], run["sparsity"]) == (split, method, sparsity)]
        beside = [(run, dense[split, run["seed"]]) for run in mine if (split, run["seed"]) in dense]
        accuracies = [run["test/acc"] for run in mine]
        result.append({
            "partition": split, "method": method, "sparsity": sparsity, "seeds": len(mine),
            "test_acc_mean": statistics.mean(accuracies),
            "test_acc_std": statistics.stdev(accuracies) if len(mine) > 1 else None,
            "late_acc_mean": statistics.mean(map(late, mine)),
            "late_acc_std": statistics.stdev(map(late, mine)) if len(mine) > 1 else None,
            "megabytes": statistics.mean(run["bytes"] for run in mine) / 1e6,
            "of_fedavg": statistics.mean(run["bytes"] / other["bytes"] for run, other in beside) if beside else None,
            "fedavg_then": statistics.mean(by_then(other, run["bytes"]) for run, other in beside) if beside else None,
        })  # fmt: skip
    return result


def late(run: dict[str, Any], until: int | None = None) -> float:
    """The mean accuracy on the held-out images over a quarter of the rounds: the last ones, or those before a round."""
    rows = run["rows"][: until or len(run["rows"])]
    measured: list[float] = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    return statistics.mean(measured[-max(1, len(run["rows"]) // 4 // EVERY) :])


def by_then(run: dict[str, Any], sent: float) -> float:
    """`late` at the first measurement at which a run has sent as many bytes, or else at its last one."""
    total = 0
    for place, row in enumerate(run["rows"]):
        total += row["bytes_up"] + row["bytes_down"]
        if total >= sent and row["accuracy"] is not None:
            return late(run, place + 1)
    return late(run)


def table(rows: list[dict[str, Any]]) -> str:
    """The summary in Markdown."""
    lines = ["| clients | method | zeros | seeds | late | test | MB | of FedAvg's | FedAvg then |", "|---" * 9 + "|"]
    for row in rows:
        found = [spread(row[f"{name}_acc_mean"], row[f"{name}_acc_std"]) for name in ("late", "test")]
        share = "" if row["of_fedavg"] is None else f"{row['of_fedavg']:.3f} | {100 * row['fedavg_then']:.2f}"
        lines.append(
            f"| {row['partition']} | {row['method']} | {100 * row['sparsity']:g} % | "
            f"{row['seeds']} | {' | '.join(found)} | {row['megabytes']:.1f} | {share} |"
        )
    return "\n".join(lines)


def spread(mean: float, std: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", help="a folder of parquet files; downloaded if not given")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--partitions", nargs="+", choices=PARTITIONS, default=list(PARTITIONS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args()
    path = RESULTS / f"federated_{options.setting}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    known = {(row["partition"], row["method"], row["sparsity"], row["seed"]) for row in runs}
    cases = [
        (split, method, sparsity, seed) for seed in options.seeds for split in options.partitions
        for method in options.methods for sparsity in ([0.0] if method in DENSE else options.sparsities)
    ]  # fmt: skip
    with ProcessPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(run, options.setting, case, options.data) for case in cases if case not in known]
        for done in track(as_completed(jobs), total=len(jobs), description=options.setting):
            runs.append(done.result())
            save(path, options.setting, runs)
    rows = save(path, options.setting, runs)["summary"]
    print(table(rows))
    draw(path, runs)
    readme.write(f"federated {options.setting.replace('_', ' ')}", table(rows), "benchmarks/README.md")


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """A figure for each partition, at the highest sparsity, of the first seed."""
    for split in dict.fromkeys(row["partition"] for row in runs):
        mine = [row for row in runs if row["partition"] == split and row["seed"] == runs[0]["seed"]]
        highest = max(row["sparsity"] for row in mine)
        shown = [row for row in mine if row["sparsity"] in (0.0, highest) and row["method"] in DRAWN]
        curves = {row["method"]: row["rows"] for row in shown}
        name = f"{path.stem}_{split.replace(' ', '_').replace('.', '')}.png"
        figure(curves).savefig(path.with_name(name), dpi=110)


def save(path: Path, name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    splits, methods = list(PARTITIONS), list(METHODS)
    runs.sort(key=lambda r: (splits.index(r["partition"]), r["sparsity"], methods.index(r["method"]), r["seed"]))
    setting = SETTINGS[name]
    about = {"setting": name, "rounds": setting.rounds, "rate": setting.rate, "torch": torch.__version__}
    result = {**about, "summary": summary(runs), "runs": runs}
    path.write_text(json.dumps(result) + "\n")
    return result


if __name__ == "__main__":
    main()
