"""Staged: training in stages, each with optimizers and a schedule that begin anew."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from sparsity.errors import InputError
from sparsity.stages import Stages

from .restart import Restart
from .sparsify import Sparsify


class Staged(Sparsify):
    """A method whose training is of several stages, within `max_epochs` epochs in all.

    `configure_optimizers` is asked for the schedule of one stage: while it runs, `trainer.max_epochs` and
    `estimated_stepping_batches` are those of a stage. A resumed run keeps the lengths that it was begun with.

    What the end of an epoch brings about, pruning and going back, is done before the first batch of the next one, so
    that a checkpoint of an epoch has the network that was validated in it. Methods override `stage_epochs` and
    `close_epoch`, and their sparsifiers say `ending` in the last epoch and `done` after it.
    """

    sparsifier: Stages

    def __init__(self, sparsifier: Stages) -> None:
        super().__init__(sparsifier)
        self.restart: Restart | None = None
        self.closed = 0  # the trainer's epochs that `close_epoch` has seen
        self._stage = 0  # epochs of a stage
        self._epochs: int | None = None  # the trainer's, while it is told less

    def stage_epochs(self, epochs: int) -> int:
        """How many of these epochs a stage has; raises `InputError` where there are too few."""
        raise NotImplementedError

    def close_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is over, and the next one is about to begin or training ends."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        trainer.callbacks = [_First(self), *(each for each in callbacks if not isinstance(each, _First))]  # type: ignore[attr-defined]
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            raise InputError(f"{type(self).__name__} counts epochs: set max_epochs, which is {epochs}")
        self._epochs = epochs
        # Where all stages are over, a further fit is one of its own.
        self._stage = epochs if self.sparsifier.done() else self.stage_epochs(epochs)
        trainer.fit_loop.max_epochs = self._stage

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if self._epochs is not None and "stage" in saved:
            trainer.fit_loop.max_epochs = self._stage = saved["stage"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restart = Restart(trainer)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self.closed = 0
        over = self.sparsifier.done() or (self.closed < trainer.current_epoch and self.sparsifier.ending())
        if trainer.ckpt_path and over:
            trainer.should_stop = True  # the run to resume had come to its end

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._catch_up(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._catch_up(trainer, pl_module)  # after some resumes no epoch starts
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.sparsifier.ending():
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._catch_up(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.give_back(trainer)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.give_back(trainer)
        super().teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "closed": self.closed, "stage": self._stage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.closed, self._stage = state_dict["closed"], state_dict["stage"]

    def give_back(self, trainer: Trainer) -> None:
        """The trainer's own number of epochs."""
        if self._epochs is not None:
            trainer.fit_loop.max_epochs = self._epochs
        self._epochs = None

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self.closed < trainer.current_epoch:
            self.closed += 1
            self.close_epoch(trainer, pl_module)


class _First(Callback):
    """Comes before all others, so that they see the trainer's own number of epochs."""

    def __init__(self, method: Staged) -> None:
        self.method = method

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.method.give_back(trainer)
