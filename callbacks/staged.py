"""Staged: training in stages, each with optimizers and a schedule that begin anew."""

from typing import Any

from pytorch_lightning import LightningModule, Trainer

from sparsity.errors import InputError

from .restart import Restart
from .sparsify import Sparsify


class Staged(Sparsify):
    """A method whose training is of several stages, within `max_epochs` epochs in all.

    `configure_optimizers` is asked for the schedule of one stage: while it runs, `trainer.max_epochs` and
    `estimated_stepping_batches` are those of a stage. Methods override `stage_epochs`, and go back to `restart`.
    """

    def __init__(self, sparsifier: Any) -> None:
        super().__init__(sparsifier)
        self.restart: Restart | None = None
        self._epochs: int | None = None  # the trainer's, while it is told less

    def stage_epochs(self, epochs: int) -> int:
        """How many of these epochs a stage has; raises `InputError` where there are too few."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            raise InputError(f"{type(self).__name__} counts epochs: set max_epochs, which is {epochs}")
        self._epochs = epochs
        trainer.fit_loop.max_epochs = self.stage_epochs(epochs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back(trainer)
        self.restart = Restart(trainer)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path and self.sparsifier.done():  # type: ignore[attr-defined]  # of all that have stages
            trainer.should_stop = True  # the run to resume had come to its end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back(trainer)
        super().teardown(trainer, pl_module, stage)

    def _give_back(self, trainer: Trainer) -> None:
        """The trainer's own number of epochs."""
        if self._epochs is not None:
            trainer.fit_loop.max_epochs = self._epochs
        self._epochs = None
