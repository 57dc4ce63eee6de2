"""One-shot pruning: once, and then training goes on."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from sparsity.calibration import Calibration
from sparsity.distributions import Distribution, Uniform
from sparsity.errors import InputError
from sparsity.oneshot import OneShotSparsifier
from sparsity.patterns import NM, parse
from sparsity.schedules import Constant, Once, Time
from sparsity.scores import Magnitude, Score
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets

from .passes import forward, training_batches, training_loss
from .sparsify import Sparsify

Batches = Callable[[], Iterable[Any]]


class OneShot(Sparsify):
    """Prunes once, before the first step if not told otherwise, and keeps the masks.

    With `Wanda()`, `SparseGPT()`, `OWL()` or a `Calibration`, a trained network is pruned block by block by what its
    layers are given on some batches of the training data: `python train.py oneshot`, or at the start of a `fit`. With
    `SNIP()`, `GraSP()` or `SynFlow()` a network is pruned before it is trained, the first two by such batches too.

    Args:
        sparsity: fraction of zeros over all targets, in [0, 1).
        at: when: optimizer steps (100), a fraction of training (0.5) or epochs ("5ep"); 0 where data is needed.
        score: how much each weight matters; `Magnitude()` if not given.
        distribution: how many weights each layer keeps; `Global()` if not given, `Uniform()` for Wanda and SparseGPT.
        pattern: "unstructured", "row", "2:4" (quoted), "4x4" or "channel"; if not given, what the score compares.
        calibration: how many batches, and whether to permute channels and to recompute batch norms.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        at: Time = 0,
        score: Score | None = None,
        distribution: Distribution | None = None,
        pattern: str | int | None = None,
        calibration: Calibration | None = None,
        targets: Targets | None = None,
    ) -> None:
        with_data = OneShotSparsifier(sparsity, score, distribution, pattern, calibration, targets)
        if not with_data.needs_data() and calibration is None:
            super().__init__(Sparsifier(sparsity, score, distribution, with_data.pattern.name, Once(at), targets))
            return
        if at != 0:
            raise InputError(f"at={at!r}: pruning by data is done before training (at=0), of a trained network")
        super().__init__(with_data)

    def prune(self, pl_module: LightningModule, batches: Batches | None = None) -> None:
        """Prunes the model to the full sparsity at once, outside of any training, by these batches."""
        if isinstance(self.sparsifier, OneShotSparsifier):
            self.sparsifier.batches, self.sparsifier.loss = batches, training_loss
        super().prune(pl_module)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self.sparsifier, OneShotSparsifier):
            self.sparsifier.batches = lambda: training_batches(trainer, pl_module)
            self.sparsifier.forward = partial(forward, trainer)
            self.sparsifier.loss = partial(_loss, trainer)
        super()._attach(trainer, pl_module)


def _loss(trainer: Trainer, model: nn.Module, batch: Any) -> Tensor:
    with trainer.precision_plugin.forward_context():
        return training_loss(model, batch)


class ASP(Sparsify):
    """One-shot N:M by magnitude, then training goes on: NVIDIA's recipe for 2:4 (Mishra et al., arXiv 2104.08378).

    Start from a trained network (`--weights`), and train as it was trained.

    Args:
        pattern: "N:M" (quoted), or "2:4T", which is 2:4 along both axes.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(self, pattern: str | int = "2:4", targets: Targets | None = None) -> None:
        shape = parse(pattern)
        if not isinstance(shape, NM):
            raise InputError(f'ASP prunes to "N:M" or "2:4T", got "{shape.name}": OneShot takes any pattern')
        super().__init__(Sparsifier(1 - shape.n / shape.m, Magnitude(), Uniform(), pattern, Constant(), targets))
