"""Gradual magnitude pruning: masks that grow sparser while the network trains."""

from sparsity.distributions import Distribution, Global, LayerAdaptive, Uniform
from sparsity.schedules import Cubic, Schedule
from sparsity.scores import Magnitude
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets

from .sparsify import Sparsify


class GMP(Sparsify):
    """Gradual magnitude pruning, Zhu & Gupta, "To prune, or not to prune" (arXiv 1710.01878).

    The smallest magnitudes of each layer go, the same fraction in every layer, in cubic steps over the first three
    quarters of training. Unlike the original, pruned weights hold zero and do not return.

    Args:
        sparsity: fraction of zeros over all targets at the end of the schedule, in [0, 1).
        schedule: when, and how sparse; `Cubic()` if not given.
        distribution: how many weights each layer keeps; `Uniform()` if not given.
        pattern: "unstructured", "2:4" (quoted), "4x4" or "channel".
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        schedule: Schedule | None = None,
        distribution: Distribution | None = None,
        pattern: str | int = "unstructured",
        targets: Targets | None = None,
    ) -> None:
        super().__init__(
            Sparsifier(sparsity, Magnitude(), distribution or Uniform(), pattern, schedule or Cubic(), targets)
        )


class LAMP(Sparsify):
    """Layer-adaptive magnitude pruning, Lee et al. (ICLR 2021, arXiv 2010.07611).

    Each weight scores its square over the sum of all squares of its layer that are at least as large; the highest
    scores of the whole model stay, so every layer gets its own sparsity and none is emptied. Inside a layer the scores
    have the order of the magnitudes, so this is magnitude pruning with the counts of `LayerAdaptive`.

    The paper prunes a trained network in rounds of 20 %, training on after each: `schedule=Iterative()`. Without a
    schedule it is gradual (`Cubic()`); `Once()` is one-shot. A single run keeps one optimizer, where the authors' code
    makes a new one every round.

    Args:
        sparsity: fraction of zeros over all targets at the end of the schedule, in [0, 1).
        schedule: when, and how sparse; `Cubic()` if not given.
        pattern: "unstructured", "2:4" (quoted), "4x4" or "channel".
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        schedule: Schedule | None = None,
        pattern: str | int = "unstructured",
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Sparsifier(sparsity, Magnitude(), LayerAdaptive(), pattern, schedule or Cubic(), targets))


class GlobalMP(Sparsify):
    """Global magnitude pruning with a minimum per layer, Gupta et al. (arXiv 2209.14624).

    The largest magnitudes of the whole model stay, and every layer keeps at least `minimum` of them.

    Args:
        sparsity: fraction of zeros over all targets at the end of the schedule, in [0, 1).
        minimum: the least each layer keeps, as a fraction of all target weights (0.0005, from the authors' code);
            0 is plain global magnitude pruning, which can empty a layer.
        schedule: when, and how sparse; `Cubic()` if not given.
        pattern: "unstructured", "2:4" (quoted), "4x4" or "channel".
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        minimum: float = 0.0005,
        schedule: Schedule | None = None,
        pattern: str | int = "unstructured",
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Sparsifier(sparsity, Magnitude(), Global(minimum), pattern, schedule or Cubic(), targets))
