"""SparsityReport: what a run ended with, as a file, a table and a figure."""

import math
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor
from torch.nn.parameter import Parameter

from sparsity import InputError, Targets, __version__, convert, masks, page, report
from sparsity.history import History
from sparsity.traces import Traces, histograms

from .sparsify import is_tensorboard, method_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SparsityReport(Callback):
    """Writes `report.json`, `report.html` and `density.png` when a run ends, and prints a table and the path.

    They are in the log folder. `report.html` has all that a browser needs: numbers, charts of the metrics and of the
    masks over training, weights before and after, pictures of masks. Where masks were renewed more than once,
    `density_over_training.png` shows what they did. What is noted while a run goes on, metrics after each validation
    and each epoch and one histogram of each target's first weights, is in its checkpoints.

    Works beside any method and in dense runs, in `fit`, `validate` and `test`. After `fit` the densities are those of
    the masks; elsewhere a weight is pruned if it is exactly zero. `fast_dev_run` writes nothing. FLOPs are counted for
    `example_input_array` or the first tensor of a batch, one sample, and are null where the model cannot be called so.

    Args:
        recipe: the name of the run's recipe, for the report.
    """

    def __init__(self, recipe: str | None = None) -> None:
        self.recipe = recipe
        self.metrics: dict[str, float | None] = {}
        self.traces = Traces()
        self._inputs: tuple[Any, ...] | None = None
        self._result: report.Report | None = None
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # After the progress bar has ended comes the table, and into checkpoints what their own epoch has left.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        later = [self, *trainer.checkpoint_callbacks]
        trainer.callbacks = [*(each for each in callbacks if each not in later), *later]  # type: ignore[attr-defined]
        if stage == "fit":
            self.traces = Traces()
            with suppress(InputError):  # layers that `configure_model` makes are not there yet
                self.traces.before = histograms(_weights(trainer, pl_module))

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

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.traces.note(trainer.global_step, _logged(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module)
        elif not trainer.sanity_checking:
            # Metrics of training are those of the epoch before.
            found = {name: value for name, value in _logged(trainer).items() if not name.startswith("train")}
            self.traces.note(trainer.global_step, found)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._result is not None and self._path is not None:
            _print(self._result, self._path)
        self._inputs = self._path = self._result = None

    def state_dict(self) -> dict[str, Any]:
        return self.traces.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.traces.load_state_dict(state_dict)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on all ranks: it broadcasts
        if getattr(trainer, "fast_dev_run", False):
            return
        logged = _logged(trainer)
        self.metrics |= {name: value if math.isfinite(value) else None for name, value in logged.items()}
        trained = trainer.state.fn == "fit"
        if trained:
            self.traces.note(trainer.global_step, logged)
        self._write_all(trainer, pl_module, folder, trained, {})
        if trained:
            self._draw_history(trainer, folder)

    def _write_all(
        self, trainer: Trainer, pl_module: LightningModule, folder: Path, trained: bool, more: Mapping[str, Any]
    ) -> None:
        # On all ranks: weights that are spread over them are gathered, and their forward pass is counted together.
        result = {**self.describe(trainer, pl_module, trained), **more}
        self.traces.after = histograms(_weights(trainer, pl_module))
        self._write_on_rank_zero(trainer, result, _masks(trainer, pl_module, trained), folder)

    @rank_zero_only
    def _write_on_rank_zero(self, trainer: Trainer, result: report.Report, found: masks.Masks, folder: Path) -> None:
        report.save(result, folder / "report.json")
        page.save(self._page(trainer, result, found), folder / "report.html")
        self._result, self._path = result, folder / "report.json"
        if find_spec("matplotlib"):
            picture = report.figure(result)
            picture.savefig(folder / "density.png", dpi=120)
            _show(trainer, "sparsity/density", picture)

    def _page(self, trainer: Trainer, result: report.Report, found: masks.Masks) -> str:
        method = method_of(trainer)
        history = method.sparsifier.history if method else History()
        asked = [method.sparsifier.target(step) for step in history.steps] if method else []
        return page.render(result, self.traces, found, history, asked)

    @rank_zero_only
    def _draw_history(self, trainer: Trainer, folder: Path) -> None:
        method = method_of(trainer)
        if method and len(method.sparsifier.history.steps) > 1 and find_spec("matplotlib"):
            picture = method.sparsifier.history.figure()
            picture.savefig(folder / "density_over_training.png", dpi=120)
            _show(trainer, "sparsity/density_over_training", picture)

    def describe(self, trainer: Trainer, pl_module: LightningModule, trained: bool | None = None) -> report.Report:
        """The report of the model as it is now, as the dictionary that is written.

        Where it has been `trained`, in `fit` if not given, its masks are the method's.
        """
        method = method_of(trainer)
        trained = trainer.state.fn == "fit" if trained is None else trained
        weights, found = _weights(trainer, pl_module), _masks(trainer, pl_module, trained)
        sparsifier = method.sparsifier if method else None
        target, achieved = sparsifier.sparsity if sparsifier else 0.0, 1 - masks.density(found)
        pattern = sparsifier.pattern.name if sparsifier else "dense"
        turned = sparsifier.turned if sparsifier else frozenset[str]()
        layers = report.layers(found, pattern, turned)
        by_module = self._flops(pl_module)
        flops = report.layer_flops(by_module or {}, found)
        kernels = convert.kernels(pl_module, found)
        for name, row in layers.items():
            kept = int(found[name].count_nonzero())
            row["bytes"] = {"dense": report.nbytes(weights[name]), "stored": report.stored(weights[name], kept)}
            row["flops"] = {key: round(count) if by_module else None for key, count in flops[name].items()}
            row["kernel"] = kernels[name]
        return {
            "recipe": self.recipe,
            "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
            "metrics": self.metrics,
            "sparsity": {
                "target": target,
                "achieved": achieved,
                **(method.sparsifier.history.last() if method and trained else {}),
                "layers": layers,
            },
            "flops": report.total_flops(by_module, found) if by_module else {"dense": None, "sparse": None},
            "bytes": report.sizes(pl_module, found, weights),
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "pytorch_lightning": version("pytorch-lightning"), "sparsity": __version__,
            },
            "warnings": [*report.drift(target, achieved), *report.warnings(layers)],
            **(method.story() if method and trained else {}),
        }  # fmt: skip

    def finish(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, folder: Path, more: Mapping[str, Any]
    ) -> None:
        """Writes and prints the report of a training that no trainer has seen, with `more` entries."""
        self._keep_inputs(pl_module, batch)
        self._write_all(trainer, pl_module, folder, True, more)
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

    def _flops(self, pl_module: LightningModule) -> dict[str, int]:
        try:
            return report.module_flops(pl_module, self._inputs or ())
        except Exception:  # the user's forward may need anything: its signature is not ours to know
            return {}


def _show(trainer: Trainer, name: str, picture: "Figure") -> None:
    for logger in filter(is_tensorboard, trainer.loggers):
        logger.experiment.add_figure(name, picture, global_step=trainer.global_step)  # type: ignore[attr-defined]  # a TensorBoardLogger


def _weights(trainer: Trainer, pl_module: LightningModule) -> dict[str, Parameter]:
    """The targets of the run's method, or those of any where it is dense."""
    method = method_of(trainer)
    return (method.sparsifier.targets if method else Targets()).select(pl_module)


def _masks(trainer: Trainer, pl_module: LightningModule, trained: bool) -> masks.Masks:
    """Those of the method where it has trained, else what is not zero."""
    method = method_of(trainer)
    return method.sparsifier.masks if method and trained else masks.from_zeros(_weights(trainer, pl_module))


def _logged(trainer: Trainer) -> dict[str, float]:
    """What the module has logged, without what the method has."""
    logged = trainer.callback_metrics.items()
    return {name: float(value) for name, value in logged if not name.startswith("sparsity/")}


@rank_zero_only
def _print(result: report.Report, path: Path) -> None:
    Console().print(report.summary(result))
    print(f"page: {path.with_suffix('.html')}")
    print(f"report: {path}")
