"""N:M sparsity on a character-level GPT: masks for a trained network, learned masks, and training through masks.

    python -m benchmarks.nm --data data/tinyshakespeare

Each seed trains one dense network; every method starts from it, and those that train have the same number of steps and
the same batches; "from scratch" starts from none, for 1,500 steps. Learned masks leave the weights as they are, and so
do all one-shot methods but "SparseGPT". Losses are in nats per byte over the whole validation and test texts. Runs
that the result file already has are not repeated.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import track
from torch import nn

from callbacks import ASP, PGF, SRSTE, STE, GumbelNM, Sparsify
from sparsity import masks
from sparsity.data import TinyShakespeare
from sparsity.distributions import Uniform
from sparsity.gumbel import Prior
from sparsity.models import GPT, LanguageModel
from sparsity.oneshot import OneShotSparsifier, SparseGPT, Wanda
from sparsity.relaxation import ExponentialDecay, Geometric, LinearDecay, Stepwise
from sparsity.scores import Magnitude, Score

RESULTS = Path(__file__).parent / "results"
DENSE_STEPS, DENSE_RATE = 4000, 2e-3
STEPS, RATE, MASK_RATE = 500, 1e-3, 1e-4  # of the methods that train weights, and of learned masks
SCRATCH, SCRATCH_STEPS = "1:8, from scratch", 1500
CONTEXT, BATCH, CALIBRATION = 64, 32, 32

ONE_SHOT: dict[str, Callable[[], Score]] = {
    "magnitude": Magnitude,
    "Wanda": Wanda,
    "SparseGPT, mask only": lambda: SparseGPT(update=False),
    "SparseGPT": SparseGPT,
}
LEARNED = {"GumbelNM": None, "GumbelNM, magnitude": "magnitude", "GumbelNM, Wanda": "Wanda",
           "GumbelNM, SparseGPT": "SparseGPT, mask only"}  # fmt: skip
TRAINED: dict[str, Callable[[str], Sparsify]] = {
    "ASP": ASP, "STE": STE, "SR-STE": SRSTE,
    "PGF, exponential": lambda pattern: PGF(pattern, ExponentialDecay()),
    "PGF, linear": lambda pattern: PGF(pattern, LinearDecay()),
    "PGF, stepwise": lambda pattern: PGF(pattern, Stepwise()),
    "PGF, geometric": lambda pattern: PGF(pattern, Geometric()),
}  # fmt: skip
FROZEN_PATTERNS = ("2:4", "1:4", "4:8")
GROUPS: dict[str, Collection[str]] = {"one-shot": ONE_SHOT, "learned": LEARNED, "trained": TRAINED}
COLOURS = {"one-shot": ("#bbbbbb", "masks at once"), "learned": ("#4477aa", "learned masks, weights frozen"),
           "trained": ("#ccbb44", "weights trained through masks")}  # fmt: skip
Case = tuple[str, str, int]


class Trained(LanguageModel):
    """The GPT with AdamW and a cosine."""

    def __init__(self, steps: int, rate: float) -> None:
        super().__init__(GPT(CONTEXT, width=96, depth=4, heads=4))
        self.steps, self.rate = steps, rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.1)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, self.rate / 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def text(data: str | None) -> TinyShakespeare:
    module = TinyShakespeare(data, CONTEXT, BATCH)
    module.setup()
    return module


def train(model: Trained, steps: int, data: TinyShakespeare, *callbacks: pl.Callback) -> None:
    trainer = pl.Trainer(
        max_steps=steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(model, data)


@torch.no_grad()
def losses(model: nn.Module, data: TinyShakespeare) -> dict[str, float]:
    """Mean cross entropy over the validation and the test text."""
    model.eval()
    found = {}
    for name, loader in (("val_loss", data.val_dataloader()), ("test_loss", data.test_dataloader())):
        total, count = 0.0, 0
        for context, following in loader:
            logits = model(context).flatten(0, 1)
            total += float(nn.functional.cross_entropy(logits, following.flatten(), reduction="sum"))
            count += following.numel()
        found[name] = total / count
    return found


def dense(seed: int, data: str | None, folder: Path) -> Path:
    """The trained dense network of a seed."""
    quiet()
    path = folder / f"dense_{seed}.pt"
    if not path.exists():
        pl.seed_everything(seed, verbose=False)
        model = Trained(DENSE_STEPS, DENSE_RATE)
        train(model, DENSE_STEPS, text(data))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return path


def loaded(seed: int, rate: float, folder: Path) -> Trained:
    """The dense network of a seed, to be trained on at a rate."""
    model = Trained(STEPS, rate)
    model.load_state_dict(torch.load(folder / f"dense_{seed}.pt", weights_only=True))
    return model


def prune(model: nn.Module, method: str, pattern: str, data: TinyShakespeare) -> masks.Masks:
    """Masks found at once, by 32 batches of the training text where the score wants them."""
    kept, group = map(int, pattern.split(":"))
    sparsifier = OneShotSparsifier(1 - kept / group, ONE_SHOT[method](), Uniform(), pattern)
    torch.manual_seed(0)
    batches = list(islice(data.train_dataloader(), CALIBRATION))
    sparsifier.batches = lambda: batches
    sparsifier.attach(model)
    return sparsifier.masks


def learned(prior: str | None, pattern: str, seed: int, data: TinyShakespeare, networks: Path) -> GumbelNM:
    """Learned masks, with the masks of a one-shot method as prior."""
    if prior is None:
        return GumbelNM(pattern, Prior(strength=0))
    file = networks / f"{prior}_{pattern}_{seed}.safetensors"
    masks.save(prune(loaded(seed, MASK_RATE, networks), prior, pattern, data), file)
    return GumbelNM(pattern, Prior(file))


def run(case: Case, folder: str | None, networks: Path) -> dict[str, Any]:
    """One network: pruned or trained from the dense one of its seed, and its losses."""
    quiet()
    method, pattern, seed = case
    data, density = text(folder), 1.0
    if pattern == SCRATCH:
        return from_scratch(method, seed, data)
    model = loaded(seed, MASK_RATE if method in LEARNED else RATE, networks)
    if method in ONE_SHOT:
        density = masks.density(prune(model, method, pattern, data))
    elif method != "dense":
        known = method in LEARNED
        callback = learned(LEARNED[method], pattern, seed, data, networks) if known else TRAINED[method](pattern)
        pl.seed_everything(seed, verbose=False)
        train(model, STEPS, data, callback)
        density = callback.sparsifier.density()
    return {"method": method, "pattern": pattern, "seed": seed, "density": density, **losses(model, data)}


def from_scratch(method: str, seed: int, data: TinyShakespeare) -> dict[str, Any]:
    """One network that is N:M from its first step on, or dense."""
    pl.seed_everything(seed, verbose=False)
    model = Trained(SCRATCH_STEPS, DENSE_RATE)
    callbacks = [] if method == "dense" else [TRAINED[method](SCRATCH.partition(",")[0])]
    train(model, SCRATCH_STEPS, data, *callbacks)
    density = callbacks[0].sparsifier.density() if callbacks else 1.0
    return {"method": method, "pattern": SCRATCH, "seed": seed, "density": density, **losses(model, data)}


def cases(seeds: list[int]) -> list[Case]:
    """All runs, those of most interest first."""
    found: list[tuple[str, str]] = [("dense", "dense")]
    found += [(method, pattern) for pattern in FROZEN_PATTERNS for method in ONE_SHOT]
    found += [(method, pattern) for pattern in ("2:4", "1:4") for method in [*LEARNED, *TRAINED]]
    found += [("GumbelNM, magnitude", "4:8"), ("GumbelNM", "4:8")]
    found += [(method, SCRATCH) for method in ("dense", "SR-STE", "PGF, exponential", "PGF, stepwise")]
    found += [(method, "1:8") for method in TRAINED]
    found += [("GumbelNM, Wanda", "4:8"), ("GumbelNM, SparseGPT", "4:8")]
    return [(*each, seed) for each in found for seed in seeds]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, and the part of the gap between magnitude and dense that is closed, per seed."""
    at = {(row["method"], row["pattern"], row["seed"]): row["val_loss"] for row in rows}
    result = []
    for method, pattern in dict.fromkeys((row["method"], row["pattern"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["pattern"]) == (method, pattern)]
        closed = []
        for row in mine:
            low, high = at.get(("dense", "dense", row["seed"])), at.get(("magnitude", pattern, row["seed"]))
            if low is not None and high is not None:
                closed.append((high - row["val_loss"]) / (high - low))
        result.append({
            "method": method, "pattern": pattern, "seeds": len(mine),
            **{f"{key}_mean": statistics.mean(row[key] for row in mine) for key in ("val_loss", "test_loss")},
            "val_loss_std": statistics.stdev(row["val_loss"] for row in mine) if len(mine) > 1 else None,
            "gap_closed": statistics.mean(closed) if closed else None,
        })  # fmt: skip
    return result


def table(result: dict[str, Any], methods: list[str], patterns: list[str]) -> str:
    """Validation losses as Markdown, methods by patterns, and the part of the gap that is closed."""
    rows = {(row["method"], row["pattern"]): row for row in result["summary"]}
    lines = ["| | " + " | ".join(patterns) + " |", "|---" * (len(patterns) + 1) + "|"]
    for method in methods:
        usual = rows.get((method, "dense"))
        cells = [cell(rows.get((method, pattern), usual)) for pattern in patterns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = "" if row["val_loss_std"] is None else f" ± {row['val_loss_std']:.3f}"
    closed = "" if row["gap_closed"] is None or row["method"] == "magnitude" else f" ({100 * row['gap_closed']:.0f} %)"
    return f"{row['val_loss_mean']:.3f}{spread}{closed}"


def figure(result: dict[str, Any], path: Path) -> None:
    """The losses of all methods by pattern, with the dense line."""
    from matplotlib.figure import Figure

    rows = result["summary"]
    lines = {row["pattern"]: row["val_loss_mean"] for row in rows if row["method"] == "dense"}
    picture = Figure(figsize=(13, 8), layout="constrained")
    places = picture.subplots(2, 3)
    for axes, pattern in zip(places.flat, [*FROZEN_PATTERNS, "1:8", SCRATCH], strict=False):
        line = lines.get(pattern, lines["dense"])
        mine = [row for row in rows if row["pattern"] == pattern and row["method"] != "dense"]
        mine.sort(key=lambda row: -row["val_loss_mean"])
        colours = [next(colour for group, (colour, _) in COLOURS.items() if row["method"] in GROUPS[group])
                   for row in mine]  # fmt: skip
        axes.barh([row["method"] for row in mine], [row["val_loss_mean"] for row in mine], color=colours,
                  xerr=[row["val_loss_std"] or 0 for row in mine])  # fmt: skip
        axes.axvline(line, color="#cc6677", linestyle="--")
        axes.set(xlabel="validation loss, nats per byte", xlim=(0.95 * line, None))
        axes.set_title(f"{pattern} (dense: {line:.3f})", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    legend = places.flat[-1]
    legend.axis("off")
    for colour, label in COLOURS.values():
        legend.bar([0], [0], color=colour, label=label)
    legend.plot([], [], color="#cc6677", linestyle="--", label="the dense network")
    legend.legend(loc="center", frameon=False, fontsize=11)
    picture.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder with input.txt; the hub if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--networks", type=Path, default=Path("runs/nm"), help="where the dense networks are kept")
    options = parser.parse_args()
    path = RESULTS / "nm.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    known = {(row["method"], row["pattern"], row["seed"]) for row in rows}
    with ProcessPoolExecutor(options.jobs) as pool:
        list(pool.map(partial(dense, data=options.data, folder=options.networks), options.seeds))
        missing = [case for case in cases(options.seeds) if case not in known]
        runs = [pool.submit(run, case, options.data, options.networks) for case in missing]
        for done in track(as_completed(runs), total=len(runs), description="N:M"):
            rows.append(done.result())
            save(path, rows)
    result = save(path, rows)
    figure(result, path.with_suffix(".png"))
    print(table(result, ["dense", *ONE_SHOT, *LEARNED], list(FROZEN_PATTERNS)))
    print(table(result, ["dense", *TRAINED], ["2:4", "1:4", "1:8", SCRATCH]))


def save(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    order = ["dense", *ONE_SHOT, *LEARNED, *TRAINED]
    patterns = ["dense", "2:4", "1:4", "4:8", "1:8", SCRATCH]
    rows.sort(key=lambda row: (order.index(row["method"]), patterns.index(row["pattern"]), row["seed"]))
    about = {"dense_steps": DENSE_STEPS, "steps": STEPS, "rate": RATE, "mask_rate": MASK_RATE,
             "scratch_steps": SCRATCH_STEPS}  # fmt: skip
    result = {**about, "torch": torch.__version__, "summary": summary(rows), "runs": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
