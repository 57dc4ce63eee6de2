"""SaveOnInterrupt: Ctrl-C ends training with a checkpoint."""

import signal
import threading
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

INTERRUPTED = "interrupted.ckpt"


class SaveOnInterrupt(Callback):
    """Ctrl-C ends `fit` after the optimizer's step at hand, with `checkpoints/interrupted.ckpt` to go on from.

    Anywhere else in a step a checkpoint might hold weights that are not yet masked, or gradients half applied. A second
    Ctrl-C ends at once, with no checkpoint. Where several processes train, or outside of the main thread, Ctrl-C is
    Lightning's: one process cannot tell when the others are between two steps.
    """

    def __init__(self) -> None:
        self.path: Path | None = None  # of the checkpoint, once there is one
        self._asked = False
        self._step = 0
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Last, so that all other callbacks are done with the step.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        trainer.callbacks = [*(each for each in callbacks if each is not self), self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._asked, self._step = False, trainer.global_step
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if self._asked and stepped:
            self._restore()
            self.path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / INTERRUPTED
            trainer.save_checkpoint(self.path)
            rank_zero_info(f"interrupted after step {self._step}: --ckpt_path={self.path} (or last) goes on from there")
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            self._restore()
            raise KeyboardInterrupt
        self._asked = True

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
