"""SaveOnInterrupt: Ctrl-C ends training with a checkpoint."""

import os
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
    Lightning's: one process cannot tell when the others are between two steps. The workers of a loader are told, too:
    forked ones go on, as on Linux; those that are spawned end, and the run with them.
    """

    def __init__(self) -> None:
        self.path: Path | None = None  # of the checkpoint, once there is one
        self._asked = False
        self._step = 0
        self._active = False
        self._before: Any = None  # what Ctrl-C does outside of training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Last, so that all other callbacks are done with the step.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        trainer.callbacks = [*(each for each in callbacks if each is not self), self]  # type: ignore[attr-defined]
        self._asked, self.path = False, None
        if stage == "fit" and trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            before, self._active = signal.signal(signal.SIGINT, self._ask), True
            if self._before is None:  # else a run before this one was interrupted, and `before` is ours
                self._before = before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if self._asked and stepped:
            self._end()
            self.path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / INTERRUPTED
            trainer.save_checkpoint(self.path)
            rank_zero_info(f"interrupted after step {self._step}: --ckpt_path={self.path} (or last) goes on from there")
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        if self._asked:
            rank_zero_info("Ctrl-C came after the last step: training has ended, and nothing is left to go on with")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()
        self._before = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _ask(self, number: int, frame: Any) -> None:
        if not self._active:  # Lightning has put this back, which it found when it began
            if callable(self._before):
                self._before(number, frame)
            return
        if self._asked:
            self._end()
            raise KeyboardInterrupt
        self._asked = True
        os.write(2, b"\nCtrl-C: training ends after this step, with a checkpoint; once more: at once, without\n")

    def _end(self) -> None:
        """What Ctrl-C did before, it does again."""
        if self._before is not None:
            self._active = False
            signal.signal(signal.SIGINT, self._before)
