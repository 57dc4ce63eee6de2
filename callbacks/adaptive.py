"""Pruning by a growing penalty: HyperSparse, and L1 and L2 in its place."""

import math
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from sparsity.adaptive import ADAPTIVE, FINE_TUNING, Adaptive, Phases
from sparsity.distributions import Distribution
from sparsity.errors import InputError
from sparsity.penalties import Penalty
from sparsity.targets import Targets

from .judge import Judge
from .passes import one_loader
from .staged import Staged

CYCLED = ("lr", "momentum", "betas")


class HyperSparse(Staged):
    """HyperSparse: Glandorf, Kaiser & Rosenhahn, "HyperSparse neural networks" (ICCVW 2023, arXiv 2308.07163).

    After a dense warm-up a penalty draws small weights to zero, more with every epoch, until the network is as good on
    the training data when it is pruned as while it trains; the best such network is pruned and fine-tuned. See
    `sparsity.adaptive.Adaptive`. `max_epochs` is the most that the three phases may take together; fine-tuning takes
    just the epochs it is given, and training ends with it.

    The learning rate is constant, each optimizer's own, until fine-tuning begins, which starts with fresh optimizers
    and the schedule from its first step. `configure_optimizers` is asked for a schedule of the fine-tuning: while it
    runs, `trainer.max_epochs` and `estimated_stepping_batches` are those of that phase.

    The penalty is part of the gradient: clipping bounds both together, and Adam scales both, so that its strength means
    something else there; the paper's is for SGD. Differences from the authors' code: exact counts and at least one
    weight in each layer, a longest phase, no selection by test accuracy, and the scale is renewed every 50 steps.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        penalty: `HyperSparsity()` if not given, `Lasso()` or `Ridge()`; each with `strength` and `growth` per epoch.
        phases: `Phases()` if not given: 20 % warm-up, 50 % fine-tuning.
        measure: what the two networks are compared by, on the training data: "accuracy" or "loss".
        distribution: how many weights each layer keeps: the largest of all layers if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    sparsifier: Adaptive

    def __init__(
        self,
        sparsity: float,
        penalty: Penalty | None = None,
        phases: Phases | None = None,
        measure: str = "accuracy",
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Adaptive(sparsity, penalty, phases, distribution, targets))
        self.judge = Judge(measure)
        self.measured: dict[str, float] = {}  # the last two qualities
        self._restarted = False
        self._schedules: list[Any] = []  # those that wait for the fine-tuning

    def stage_epochs(self, epochs: int) -> int:
        """Those of the fine-tuning."""
        return self.sparsifier.phases.epochs(epochs)[1]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization and (trainer.lr_scheduler_configs or self.judge.measure == "loss"):
            raise InputError(
                "with manual optimization HyperSparse can neither hold the module's own schedules until fine-tuning "
                'begins nor read its loss: leave the schedules out, and take measure="accuracy"'
            )
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        one_loader(trainer)
        if trainer.global_step == 0:
            self._restarted = False
        if not self._restarted:
            self._suspend(trainer)
            self.judge.watch(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.judge.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.judge.see(trainer, outputs, batch)

    def close_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges the network in the phase of regularisation, and begins the fine-tuning after it."""
        adaptive = self.sparsifier.phase == ADAPTIVE
        self.sparsifier.end_epoch(*(self._qualities(trainer, pl_module) if adaptive else ()))
        if self.sparsifier.phase == FINE_TUNING and not self._restarted:
            self.judge.forget()
            self._resume_schedules(trainer)
            assert self.restart is not None
            self.restart(trainer)
            self._restarted = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.judge.forget()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._resume_schedules(trainer)
        self.judge.forget()
        super().teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "restarted": self._restarted, "judge": self.judge.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._restarted = state_dict["restarted"]
        self.judge.load_state_dict(state_dict["judge"])

    def story(self) -> dict[str, Any]:
        """What the report says of the phases."""
        return {"phases": self.sparsifier.story()}

    def _qualities(self, trainer: Trainer, pl_module: LightningModule) -> tuple[float, float]:
        """Of the network pruned now, and of the one that has been trained in this epoch."""
        dense = self.judge.running(trainer)
        if not (math.isfinite(dense) and self.sparsifier.finite()):
            return math.nan, math.nan
        with self.sparsifier.pruned():
            pruned = self.judge.of(trainer, pl_module)
        self.measured = {"sparsity/quality_pruned": pruned, "sparsity/quality_dense": dense}
        for logger in trainer.loggers:
            logger.log_metrics(self.measured, step=trainer.global_step)
        return pruned, dense

    def _suspend(self, trainer: Trainer) -> None:
        """Takes the schedules away from the trainer: the learning rate is the optimizers' own."""
        self._schedules, trainer.strategy.lr_scheduler_configs = trainer.strategy.lr_scheduler_configs, []
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if "max_lr" in group:  # cyclic schedules write over what the group had, momentum too
                    group.update({key: optimizer.defaults[key] for key in CYCLED if key in group})
                else:
                    group["lr"] = group.get("initial_lr", group["lr"])

    def _resume_schedules(self, trainer: Trainer) -> None:
        if self._schedules:
            trainer.strategy.lr_scheduler_configs = self._schedules
        self._schedules = []
