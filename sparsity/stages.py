"""Stages: training in parts that each begin anew, counted in whole epochs."""

from sparsity.errors import InputError
from sparsity.schedules import Horizon
from sparsity.sparsifier import Sparsifier


class Stages(Sparsifier):
    """A sparsifier that is told of the end of every epoch, and knows which one is the last."""

    needs_training = True

    def ending(self) -> bool:
        """Whether the present epoch is the last one of all."""
        raise NotImplementedError(f"{type(self).__name__} does not say when it ends")

    def done(self) -> bool:
        """Whether all stages are over."""
        raise NotImplementedError(f"{type(self).__name__} does not say when it ends")


def whole_epochs(horizon: Horizon) -> tuple[int, int]:
    """How many epochs training has, and steps each; raises `InputError` where that cannot be told."""
    if horizon.steps is None or not horizon.per_epoch:
        raise InputError(
            "stages are counted in epochs of a training with an end: set max_epochs, and limit_train_batches where the "
            "loader has no length"
        )
    return horizon.steps // horizon.per_epoch, horizon.per_epoch
