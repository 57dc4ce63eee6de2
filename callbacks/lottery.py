"""Lottery tickets: iterative magnitude pruning with rewinding, and its average over particles."""

from functools import partial
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng

from sparsity.calibration import evaluating, recompute_norms
from sparsity.distributions import Distribution
from sparsity.lottery import Lottery, Particles
from sparsity.targets import Targets

from .passes import forward, one_loader, training_batches
from .restart import Restart
from .staged import Staged

Span = float | str


class Rounds(Staged):
    """Trains the rounds of a `Lottery`."""

    sparsifier: Lottery

    def __init__(self, sparsifier: Lottery) -> None:
        super().__init__(sparsifier)
        self._begin()

    def _begin(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._noted = False  # whether `restart` is of the moment that is rewound to
        self._metrics: dict[str, float] = {}  # of the last validation
        self._validated = -1  # its epoch

    def stage_epochs(self, epochs: int) -> int:
        """Those of a round."""
        return self.sparsifier.lengths(epochs)[0]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.restart
        super().on_fit_start(trainer, pl_module)
        if self._noted:  # it was restored
            self.restart = before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.sparsifier.averages():
            one_loader(trainer)
        if trainer.global_step == 0:
            self._begin()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if not self._noted and self.sparsifier.epoch == self.sparsifier.rewound:
            # Schedules by epoch have gone on since the last epoch ended.
            self.restart, self._noted = Restart(trainer), True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.is_last_batch:
            self.sparsifier.collect(partial(self._recompute, trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Metrics of training are those of the epoch before.
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._metrics = {name: each for name, each in found.items() if not name.startswith(("train", "sparsity/"))}
        self._validated = trainer.current_epoch

    def close_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the end of a round, and goes back to the ticket."""
        sparsifier = self.sparsifier
        row, before = self._row(trainer), (sparsifier.round, sparsifier.done())
        rewound = sparsifier.end_epoch()
        if (sparsifier.round, sparsifier.done()) != before:
            self.rows.append(row)
        if rewound and self.restart is not None:
            self.restart(trainer)

    def state_dict(self) -> dict[str, Any]:
        restart = self.restart.state_dict() if self._noted and self.restart else None
        more = {"rows": list(self.rows), "restart": restart, "validated": self._validated}
        return {**super().state_dict(), **more, "metrics": dict(self._metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.rows, self._validated = list(state_dict["rows"]), state_dict["validated"]
        self._metrics = dict(state_dict["metrics"])
        self._noted = state_dict["restart"] is not None
        if self._noted:
            self.restart = Restart.from_state(state_dict["restart"])

    def story(self) -> dict[str, Any]:
        """The rounds, each with what was measured at its end."""
        return {"rounds": self.rows}

    def _row(self, trainer: Trainer) -> dict[str, Any]:
        """What is known of the network at the end of the epoch that is being closed, validated then or not at all."""
        return {
            "round": self.sparsifier.round, "epochs": self.closed, "sparsity": 1 - self.sparsifier.density(),
            "metrics": dict(self._metrics) if self._validated == self.closed - 1 else {},
        }  # fmt: skip

    def _recompute(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with isolate_rng(), evaluating(pl_module):
            recompute_norms(pl_module, training_batches(trainer, pl_module), partial(forward, trainer))


class IterativeMagnitude(Rounds):
    """Iterative magnitude pruning with rewinding: Frankle & Carbin, "The lottery ticket hypothesis" (ICLR 2019, arXiv
    1803.03635); rewinding to a later moment: Frankle et al. (ICML 2020, arXiv 1912.05671).

    `max_epochs` is that of all rounds together, which are as long as fit into it: 90 % at a rate of 20 % are eleven
    rounds of pruning and so twelve trainings. The report has a row for each. After each pruning weights, buffers and
    schedule go back to what they were after the epochs of `rewind`, and optimizers start anew. A run can be resumed
    between rounds and inside of one.

    Args:
        sparsity: fraction of zeros over all targets in the last round, in (0, 1).
        rate: how much of what remains each round prunes.
        rewind: to which moment of the first round: epochs ("2ep") or a fraction of a round; the very start if 0.
        distribution: how many weights each layer keeps: the largest of all layers, and at least one, if not
            given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        rate: float = 0.2,
        rewind: Span = 0.0,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Lottery(sparsity, rate, rewind, None, distribution, targets))


class SWAMP(Rounds):
    """SWAMP: several networks a round, and one mask from their average.

    Choi et al., "Sparse weight averaging with multiple particles for iterative magnitude pruning" (ICLR 2024, arXiv
    2305.14852). Each round trains `particles.count` networks one after the other from the same ticket, each with
    other batches, averages the weights of all of them over their last epochs, computes the statistics of batch norms
    anew, and prunes that average; the last round's average is the result. Built from the paper's abstract: how many
    networks, how long they are averaged and that the schedule goes on as it is while they are, is ours.

    Args:
        sparsity: fraction of zeros over all targets in the last round, in (0, 1).
        rate: how much of what remains each round prunes.
        rewind: to which moment of the first round: epochs ("2ep") or a fraction of a round; the very start if 0.
        particles: `Particles()` if not given: four networks, over the last quarter of a round.
        distribution: how many weights each layer keeps: the largest of all layers, and at least one, if not
            given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        rate: float = 0.2,
        rewind: Span = 0.0,
        particles: Particles | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Lottery(sparsity, rate, rewind, particles or Particles(), distribution, targets))
