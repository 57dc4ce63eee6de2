"""DryRun: what a run would prune, before it trains."""

import math

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console, Group
from rich.table import Table

from sparsity import InputError, Sparsifier, masks
from sparsity.distributions import OWL, Global, LayerAdaptive

from .sparsify import method_of

MOVES = "Layers share the total by the weights as they are now: what each keeps may change in training."


class DryRun(Callback):
    """Ends `fit` before its first step, once all that is checked before training has been checked.

    Prints the targets, how many weights each of them keeps at the end, and the steps at which masks are renewed.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        method = method_of(trainer)
        if method is None:
            raise InputError("a dry run shows what a method would prune: give one (the recipe's `sparsity:`)")
        # On all ranks: weights that are spread over them are gathered.
        _print(summary(type(method).__name__, method.sparsifier, trainer.estimated_stepping_batches))
        raise SystemExit(0)


@rank_zero_only
def _print(found: Group) -> None:
    Console().print(found)


def summary(method: str, sparsifier: Sparsifier, steps: float) -> Group:
    """The targets of an attached sparsifier, what each keeps, and when, for a terminal."""
    kept, weights = sparsifier.budget(), sparsifier.weights()
    table = Table("target", "shape", "weights", "kept at the end", "density")
    table.columns[0].overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    for name, weight in weights.items():
        size, shape = weight.numel(), " x ".join(map(str, weight.shape))
        table.add_row(name, shape, f"{size:,}", f"{kept[name]:,}", f"{kept[name] / size:.4f}")
    size, total = sum(weight.numel() for weight in weights.values()), sum(kept.values())
    table.add_section()
    table.add_row("all targets", "", f"{size:,}", f"{total:,}", f"{total / size:.4f}")
    later = total < sum(masks.counts(sparsifier.masks).values())
    spread, pattern = type(getattr(sparsifier, "first", sparsifier.distribution)).__name__, sparsifier.pattern.name
    scaled = f", scaled: {sparsifier.scaling.what}" if sparsifier.scaling else ""
    return Group(
        f"{method}, pattern {pattern}, distribution {spread}{scaled}",
        table,
        f"dense in any case: {', '.join(_others(sparsifier)) or 'biases and norms only'}",
        f"when: {_times(sparsifier, steps)}",
        *([MOVES] if later and isinstance(sparsifier.distribution, Global | LayerAdaptive | OWL) else []),
    )


def _others(sparsifier: Sparsifier) -> list[str]:
    """The parameters of two axes or more that are no targets."""
    assert sparsifier.model is not None
    taken = {id(weight) for weight in sparsifier.weights().values()}
    return [name for name, each in sparsifier.model.named_parameters() if each.ndim > 1 and id(each) not in taken]


def _times(sparsifier: Sparsifier, steps: float) -> str:
    length = f"{int(steps)}" if math.isfinite(steps) else "a training without end"
    planned = sparsifier.renewals()
    if not planned:
        return f"masks as they are, in all of {length} steps"
    if len(planned) == 1:
        return f"at step {planned[0]} of {length}"
    span = f"from step {planned[0]} to {planned[-1]} of {length}"
    return f"masks are renewed {len(planned)} times, {span}; from {sparsifier.reached()} on they have this density"
