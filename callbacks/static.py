"""Masks that never change: random ones from the start, or those that a model already has."""

from sparsity.constant import Kept
from sparsity.distributions import ERK, Distribution
from sparsity.schedules import Constant
from sparsity.scores import Random
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets

from .sparsify import Sparsify


class StaticMask(Sparsify):
    """A random sparse network from the first step on: the baseline of every sparse training method.

    Args:
        sparsity: fraction of zeros over all targets, in [0, 1).
        distribution: how many weights each layer keeps: `ERK()` if not given, `ER()`, `Uniform()` ...
        pattern: "unstructured", "2:4" (quoted), "4x4" or "channel".
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        distribution: Distribution | None = None,
        pattern: str | int = "unstructured",
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Sparsifier(sparsity, Random(), distribution or ERK(), pattern, Constant(), targets))


class ConstantMask(Sparsify):
    """Keeps a network that is already pruned, by whatever means, sparse while it trains on.

    Args:
        file: a mask file (`sparsity.masks.save`); None keeps what is exactly zero in the model's weights.
        sparsity: what the masks are expected to have, to the nearest percent; None takes what is there.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(self, file: str | None = None, sparsity: float | None = None, targets: Targets | None = None) -> None:
        super().__init__(Kept(file, sparsity, targets))
