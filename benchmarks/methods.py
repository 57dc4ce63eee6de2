"""Every method on one small task: LeNet-300-100 on scikit-learn's digits, offline, in minutes.

    python -m benchmarks.methods

Three seeds of each, beside a dense line. From scratch: 60 epochs in all, whatever stages a method divides them into.
From a dense network of those 60 epochs: 20 more, also for the dense line; methods that prune at once do without them.
Federated: 20 clients of two classes each, 5 in a round, 60 rounds of 3 epochs. SGD with Nesterov momentum and a cosine;
the federated clients without a cosine. Nothing is tuned per method, and nothing is chosen by the test set of 359
images, which is read once per network: of what is closer than a point this says nothing. The benchmarks in the
literature's protocols are apart.

Results are kept as they come; a call that is repeated runs what is missing, and writes the table of the README.
"""

import argparse
import copy
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from rich.progress import track

from benchmarks import readme
from callbacks import (
    ASP,
    FLASH,
    GMP,
    LAMP,
    PGF,
    SET,
    SRSTE,
    STE,
    SWAMP,
    EdgePopup,
    FedDST,
    FedSGC,
    GlobalMP,
    GraNet,
    GumbelNM,
    HyperSparse,
    IterativeMagnitude,
    LotteryJackpot,
    OneShot,
    PruneFL,
    RigL,
    SignedSupermask,
    SparseMomentum,
    Sparsify,
    StaticMask,
)  # fmt: skip
from sparsity import data, models
from sparsity.congruent import Congruity
from sparsity.federated import Federation, Local, Pathological, Protocol, simulate
from sparsity.initial import SNIP, GraSP, SynFlow
from sparsity.oneshot import SparseGPT, Wanda
from sparsity.schedules import CosineDrop, Cubic

PATH = Path(__file__).parent / "results" / "methods.json"
EPOCHS, MORE = 60, 20
SPARSITY = 0.95
FEDERATED = 0.8

Make = Callable[[], Sparsify | None]
SCRATCH: dict[str, Make] = {
    "dense": lambda: None,
    "GMP": lambda: GMP(SPARSITY, Cubic(0.1, 0.7)),
    "LAMP": lambda: LAMP(SPARSITY, Cubic(0.1, 0.7)),
    "GlobalMP": lambda: GlobalMP(SPARSITY, schedule=Cubic(0.1, 0.7)),
    "HyperSparse": lambda: HyperSparse(SPARSITY),
    "IterativeMagnitude": lambda: IterativeMagnitude(SPARSITY, rate=1 - (1 - SPARSITY) ** (1 / 4)),
    "SWAMP": lambda: SWAMP(SPARSITY, rate=1 - (1 - SPARSITY) ** (1 / 4)),
    "SparseMomentum": lambda: SparseMomentum(SPARSITY),
    "RigL": lambda: RigL(SPARSITY, CosineDrop(0.3, 0.02)),
    "SET": lambda: SET(SPARSITY, CosineDrop(0.3, 0.02)),
    "GraNet": lambda: GraNet(SPARSITY, initial=0.5),
    "OneShot, SynFlow": lambda: OneShot(SPARSITY, score=SynFlow()),
    "OneShot, SNIP": lambda: OneShot(SPARSITY, score=SNIP()),
    "OneShot, GraSP": lambda: OneShot(SPARSITY, score=GraSP()),
    "StaticMask": lambda: StaticMask(SPARSITY),
    "EdgePopup": lambda: EdgePopup(0.5),
    "SignedSupermask": lambda: SignedSupermask(0.5),
}
TRAINED: dict[str, Make] = {
    "dense, longer": lambda: None,
    "OneShot": lambda: OneShot(SPARSITY),
    "LotteryJackpot": lambda: LotteryJackpot(0.9),
    "ASP, 2:4": lambda: ASP("2:4"),
    "STE, 2:4": lambda: STE("2:4"),
    "SRSTE, 2:4": lambda: SRSTE("2:4"),
    "PGF, 2:4": lambda: PGF("2:4"),
    "GumbelNM, 2:4": lambda: GumbelNM("2:4"),
}
AT_ONCE: dict[str, Make] = {
    "OneShot, magnitude, 2:4, at once": lambda: OneShot(0.5, pattern="2:4"),
    "OneShot, Wanda, 2:4, at once": lambda: OneShot(0.5, score=Wanda(), pattern="2:4"),
    "OneShot, SparseGPT, 2:4, at once": lambda: OneShot(0.5, score=SparseGPT(), pattern="2:4"),
}
MOVES = CosineDrop(0.2, 5, 0.667)
CLIENTS: dict[str, Make] = {
    "FedAvg, dense": lambda: None,
    "FedSGC": lambda: FedSGC(FEDERATED, Congruity(0.4), MOVES),
    "FedDST": lambda: FedDST(FEDERATED, MOVES),
    "PruneFL": lambda: PruneFL(FEDERATED, CosineDrop(0.3, 15, 1.0)),
    "FLASH": lambda: FLASH(FEDERATED),
    "StaticMask, federated": lambda: StaticMask(FEDERATED),
}


def larger(make: Make) -> Make:
    """The same from larger first weights."""
    return lambda: cast("Sparsify", make()).scaled("weights")


LARGER = {f"{name}, scaled weights": larger(SCRATCH[name]) for name in ("RigL", "SET", "StaticMask")}
LARGER_CLIENTS = {
    f"{name}, scaled weights": larger(CLIENTS[name]) for name in ("FedSGC", "FedDST", "StaticMask, federated")
}
GROUPS = {
    "scratch": SCRATCH, "scaled": LARGER, "trained": TRAINED, "at once": AT_ONCE, "federated": CLIENTS,
    "federated, scaled": LARGER_CLIENTS,
}  # fmt: skip


class Digit(models.Classifier):
    """SGD with Nesterov momentum, and a cosine where there is a trainer."""

    def __init__(self) -> None:
        super().__init__(models.LeNet300100(inputs=64))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
        if self._trainer is None:  # a client of a federation
            return optimizer
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def run(seed: int, group: str) -> list[dict[str, Any]]:
    """All methods of a group, in the order of their names, from one seed."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    dense = None
    if group in ("trained", "at once"):
        dense, _ = trained(None, seed, EPOCHS)
    for name, make in GROUPS[group].items():
        method = make()
        if group.startswith("federated"):
            accuracy = federated(method, seed)
        elif group == "at once":
            accuracy = pruned(method, seed, dense)
        else:
            _, accuracy = trained(method, seed, MORE if dense else EPOCHS, dense)
        achieved = 1 - method.sparsifier.density() if method else 0.0
        rows.append(
            {"group": group, "method": name, "seed": seed, "sparsity": round(achieved, 4), "test_acc": accuracy}
        )
    return rows


def trained(method: Sparsify | None, seed: int, epochs: int, start: Digit | None = None) -> tuple[Digit, float]:
    """A network, trained, and its accuracy on the test images."""
    pl.seed_everything(seed, verbose=False)
    module = copy.deepcopy(start) if start else Digit()
    runner = trainer(epochs, [method] if method else [])
    runner.fit(module, data.Digits())
    return module, tested(runner, module)


def pruned(method: Sparsify | None, seed: int, dense: Digit | None) -> float:
    """The accuracy of the dense network after pruning it, without any more training."""
    assert method is not None
    pl.seed_everything(seed, verbose=False)
    module, digits = copy.deepcopy(dense), data.Digits()
    assert module is not None
    digits.setup("fit")
    method.prune(module, lambda: (digits.on_after_batch_transfer(batch, 0) for batch in digits.train_dataloader()))
    return tested(trainer(1, []), module)


def federated(method: Sparsify | None, seed: int) -> float:
    pl.seed_everything(seed, verbose=False)
    federation = Federation(clients=20, per_round=5, rounds=60, partition=Pathological(classes=2))
    outcome = simulate(Digit(), data.Digits(batch_size=16), method, federation, Protocol(Local(epochs=3)), seed=seed)
    return round(outcome.metrics["test/acc"], 6)


def trainer(epochs: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", limit_val_batches=0, callbacks=callbacks, **quiet)


def tested(runner: pl.Trainer, module: Digit) -> float:
    [found] = runner.test(module, data.Digits(), verbose=False)
    return round(found["test/acc"], 6)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method, in the order above."""
    result = []
    for group, methods in GROUPS.items():
        for method in methods:
            mine = [row for row in runs if (row["group"], row["method"]) == (group, method)]
            if mine:
                found = [row["test_acc"] for row in mine]
                result.append({
                    "group": group, "method": method, "seeds": len(mine), "sparsity": mine[0]["sparsity"],
                    "test_acc_mean": statistics.mean(found),
                    "test_acc_std": statistics.stdev(found) if len(found) > 1 else None,
                })  # fmt: skip
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The summary in Markdown."""
    lines = ["| method | training | zeros | test accuracy, % |", "|---|---|---|---|"]
    how = {
        "scratch": f"{EPOCHS} epochs",
        "scaled": f"{EPOCHS} epochs",
        "trained": f"dense, then {MORE}",
        "at once": "dense",
        "federated": "60 rounds",
        "federated, scaled": "60 rounds",
    }
    for row in rows:
        spread = "" if row["test_acc_std"] is None else f" ± {100 * row['test_acc_std']:.1f}"
        name = f"**{row['method']}**" if row["sparsity"] == 0 else row["method"]
        zeros = f"{100 * row['sparsity']:.0f} %"
        lines.append(f"| {name} | {how[row['group']]} | {zeros} | {100 * row['test_acc_mean']:.1f}{spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(PATH.read_text())["runs"] if PATH.exists() else []
    known = {(row["seed"], row["group"]) for row in runs}
    cases = [(seed, group) for seed in options.seeds for group in options.groups if (seed, group) not in known]
    with ProcessPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(run, *case) for case in cases]
        for done in track(as_completed(jobs), total=len(jobs), description="methods"):
            runs += done.result()
            PATH.write_text(json.dumps({"torch": torch.__version__, "summary": summary(runs), "runs": runs}) + "\n")
    print(table(summary(runs)))
    readme.write("methods", table(summary(runs)))


if __name__ == "__main__":
    main()
