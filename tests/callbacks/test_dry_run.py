"""A dry run ends before the first step and tells the exact budget."""

import io

import pytest
import pytorch_lightning as pl
from rich.console import Console

from callbacks import LAMP, DryRun, RigL, Sparsify, StaticMask
from callbacks.dry_run import MOVES, summary
from sparsity import InputError, masks
from sparsity.distributions import erk
from sparsity.schedules import CosineDrop, Cubic
from tests.nets import Batches, task, trainer


def dry(method: Sparsify) -> pl.LightningModule:
    module = task()
    with pytest.raises(SystemExit) as ended:
        trainer(method, DryRun()).fit(module, Batches())
    assert ended.value.code == 0
    return module


def told(method: Sparsify) -> str:
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(summary("M", method.sparsifier, 18))
    return console.export_text()


def test_it_trains_nothing_and_tells_each_target(capsys: pytest.CaptureFixture[str]) -> None:
    method = LAMP(0.9)
    module, before = dry(method), task().state_dict()
    assert all((value == before[name]).all() for name, value in module.state_dict().items())
    out = capsys.readouterr().out
    assert all(name in out for name in method.sparsifier.masks)


def test_the_budget_sums_to_what_is_asked_for_while_masks_are_still_full() -> None:
    method = LAMP(0.9)
    dry(method)
    assert method.sparsifier.density() == 1
    size = sum(mask.numel() for mask in method.sparsifier.masks.values())
    assert sum(method.sparsifier.budget().values()) == round(0.1 * size)
    assert MOVES in told(method)


@pytest.mark.parametrize("method", [StaticMask(0.8), RigL(0.8, CosineDrop(0.3, 2, 0.75))])
def test_masks_that_are_sparse_from_the_start_have_the_budget_already(method: Sparsify) -> None:
    dry(method)
    shapes = {name: tuple(mask.shape) for name, mask in method.sparsifier.masks.items()}
    assert method.sparsifier.budget() == masks.counts(method.sparsifier.masks) == erk(shapes, 0.2)
    assert MOVES not in told(method)


def test_parameters_that_are_no_targets_are_named() -> None:
    method = StaticMask(0.8, targets=None)
    method.sparsifier.targets.exclude.append("net.head.weight")
    dry(method)
    assert "dense in any case: net.head.weight" in told(method)


def test_what_would_be_refused_in_training_is_refused() -> None:
    with pytest.raises(InputError, match="after the end of training"):
        trainer(LAMP(0.9, Cubic(0, 500, 5)), DryRun()).fit(task(), Batches())


def test_a_dense_run_has_nothing_to_show() -> None:
    with pytest.raises(InputError, match="give one"):
        trainer(DryRun()).fit(task(), Batches())


def test_a_training_without_end_has_a_budget_too() -> None:
    method = StaticMask(0.8)
    with pytest.raises(SystemExit):
        trainer(method, DryRun(), epochs=-1).fit(task(), Batches())
