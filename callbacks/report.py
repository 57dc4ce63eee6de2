"""SparsityReport: what a run ended with, as a file, a table and a figure."""

import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor

from sparsity import Targets, __version__, masks, report

from .sparsify import Sparsify, is_tensorboard

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SparsityReport(Callback):
    """Writes `report.json` and `density.png` into the log folder when a run ends, and prints a table and the path.

    Where masks were renewed more than once, `density_over_training.png` shows what they did.

    Works beside any method and in dense runs, in `fit`, `validate` and `test`. After `fit` the densities are those of
    the masks; elsewhere a weight is pruned if it is exactly zero. `fast_dev_run` writes nothing. FLOPs are counted for
    `example_input_array` or the first tensor of a batch, one sample, and are null where the model cannot be called so.

    Args:
        recipe: the name of the run's recipe, for the report.
    """

    def __init__(self, recipe: str | None = None) -> None:
        self.recipe = recipe
        self.metrics: dict[str, float | None] = {}
        self._inputs: tuple[Any, ...] | None = None
        self._result: report.Report | None = None
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Last, so that the table comes after the progress bar has ended.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        trainer.callbacks = [*(each for each in callbacks if each is not self), self]  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._keep_inputs(pl_module, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._keep_inputs(pl_module, batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._keep_inputs(pl_module, batch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._result is not None and self._path is not None:
            _print(self._result, self._path)
        self._inputs = self._path = self._result = None

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on all ranks: it broadcasts
        if getattr(trainer, "fast_dev_run", False):
            return
        logged = trainer.callback_metrics.items()
        self.metrics |= {name: _finite(value) for name, value in logged if not name.startswith("sparsity/")}
        # On all ranks: weights that are spread over them are gathered, and their forward pass is counted together.
        self._write_on_rank_zero(trainer, self.describe(trainer, pl_module), folder)
        if trainer.state.fn == "fit":
            self._draw_history(trainer, folder)

    @rank_zero_only
    def _write_on_rank_zero(self, trainer: Trainer, result: report.Report, folder: Path) -> None:
        report.save(result, folder / "report.json")
        self._result, self._path = result, folder / "report.json"
        if find_spec("matplotlib"):
            picture = report.figure(result)
            picture.savefig(folder / "density.png", dpi=120)
            _show(trainer, "sparsity/density", picture)

    @rank_zero_only
    def _draw_history(self, trainer: Trainer, folder: Path) -> None:
        method = _method(trainer)
        if method and len(method.sparsifier.history.steps) > 1 and find_spec("matplotlib"):
            picture = method.sparsifier.history.figure()
            picture.savefig(folder / "density_over_training.png", dpi=120)
            _show(trainer, "sparsity/density_over_training", picture)

    def describe(self, trainer: Trainer, pl_module: LightningModule, trained: bool | None = None) -> report.Report:
        """The report of the model as it is now, as the dictionary that is written.

        Where it has been `trained`, in `fit` if not given, its masks are the method's.
        """
        method = _method(trainer)
        trained = trainer.state.fn == "fit" if trained is None else trained
        targets = method.sparsifier.targets if method else Targets()
        weights = targets.select(pl_module)
        found = method.sparsifier.masks if method and trained else masks.from_zeros(weights)
        sparsifier = method.sparsifier if method else None
        pattern = sparsifier.pattern.name if sparsifier else "dense"
        turned = sparsifier.turned if sparsifier else frozenset[str]()
        layers = report.layers(found, pattern, turned)
        return {
            "recipe": self.recipe,
            "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
            "metrics": self.metrics,
            "sparsity": {
                "target": method.sparsifier.sparsity if method else 0.0,
                "achieved": 1 - masks.density(found),
                **(method.sparsifier.history.last() if method and trained else {}),
                "layers": layers,
            },
            "flops": self._flops(pl_module, found),
            "bytes": report.sizes(pl_module, found, weights),
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "pytorch_lightning": version("pytorch-lightning"), "sparsity": __version__,
            },
            "warnings": report.warnings(layers),
            **(method.story() if method and trained else {}),
        }  # fmt: skip

    def finish(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, folder: Path, more: Mapping[str, Any]
    ) -> None:
        """Writes and prints the report of a training that no trainer has seen, with `more` entries."""
        self._keep_inputs(pl_module, batch)
        self._write_on_rank_zero(trainer, {**self.describe(trainer, pl_module, True), **more}, folder)
        self.teardown(trainer, pl_module, "fit")

    def _keep_inputs(self, pl_module: LightningModule, batch: Any) -> None:
        if self._inputs is not None:
            return
        example = pl_module.example_input_array
        if example is not None:
            self._inputs = example if isinstance(example, tuple) else (example,)
        else:
            first = batch[0] if isinstance(batch, list | tuple) and batch else batch
            self._inputs = (first[:1].clone(),) if isinstance(first, Tensor) and first.ndim else ()

    def _flops(self, pl_module: LightningModule, found: masks.Masks) -> Mapping[str, int | None]:
        try:
            return report.flops(pl_module, self._inputs or (), found)
        except Exception:  # the user's forward may need anything: its signature is not ours to know
            return {"dense": None, "sparse": None}


def _method(trainer: Trainer) -> Sparsify | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return next((callback for callback in callbacks if isinstance(callback, Sparsify)), None)


def _show(trainer: Trainer, name: str, picture: "Figure") -> None:
    for logger in filter(is_tensorboard, trainer.loggers):
        logger.experiment.add_figure(name, picture, global_step=trainer.global_step)  # type: ignore[attr-defined]  # a TensorBoardLogger


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


@rank_zero_only
def _print(result: report.Report, path: Path) -> None:
    Console().print(report.summary(result))
    print(f"report: {path}")
