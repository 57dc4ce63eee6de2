"""Sensitivity: how dense each layer wants to be, found by a few clients before the others begin."""

from sparsity.distributions import ERK, Distribution
from sparsity.dynamic import Dynamic, Regrowth
from sparsity.errors import InputError
from sparsity.redistribution import Proportional
from sparsity.schedules import ConstantDrop, CosineDrop
from sparsity.scores import Momentum
from sparsity.targets import Targets


class Sensitivity(Dynamic):
    """FLASH's first stage, Babakniya et al., "Revisiting sparsity hunting in federated learning" (TMLR 2023).

    Some clients, the scouts, train with masks that move between layers, as in sparse momentum; the densities that their
    layers end with are averaged. All clients then train fixed random masks of these densities, from the weights that
    the model began with (the paper's SPDST). In a trainer of its own this is sparse momentum.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        scouts: what part of the clients scouts, at least one.
        epochs: that each scout trains.
        drops: what fraction of the kept weights a scout drops, and when, in its own steps;
            `CosineDrop(0.25, "1ep", 1.0, 0.005)` if not given.
        distribution: the weights each layer starts with; `ERK()` if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    begins_at_random = False  # with layers of other densities than it goes on with

    def __init__(
        self,
        sparsity: float,
        scouts: float = 0.1,
        epochs: int = 10,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        rule = Regrowth(Momentum(), drops or CosineDrop(0.25, "1ep", 1.0, 0.005), Proportional(Momentum()))
        super().__init__(sparsity, rule, distribution or ERK(), targets=targets)
        if not 0 < scouts <= 1 or epochs < 2:
            raise InputError(f"expected {scouts=} in (0, 1] and {epochs=} of at least 2")
        self.scouts, self.epochs = scouts, epochs
