"""One-shot pruning: once, and then training goes on."""

from sparsity.distributions import Distribution, Uniform
from sparsity.errors import InputError
from sparsity.patterns import NM, parse
from sparsity.schedules import Constant, Once, Time
from sparsity.scores import Magnitude, Score
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets

from .sparsify import Sparsify


class OneShot(Sparsify):
    """Prunes once, before the first step if not told otherwise, and keeps the masks.

    Args:
        sparsity: fraction of zeros over all targets, in [0, 1).
        at: when: optimizer steps (100), a fraction of training (0.5) or epochs ("5ep").
        score: how much each weight matters; `Magnitude()` if not given.
        distribution: how many weights each layer keeps; `Global()` if not given.
        pattern: "unstructured", "2:4" (quoted), "4x4" or "channel".
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        at: Time = 0,
        score: Score | None = None,
        distribution: Distribution | None = None,
        pattern: str | int = "unstructured",
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Sparsifier(sparsity, score, distribution, pattern, Once(at), targets))


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
