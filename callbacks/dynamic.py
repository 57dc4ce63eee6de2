"""Dynamic sparse training: sparse from the first step to the last, with masks that move."""

from sparsity.distributions import Distribution, Uniform
from sparsity.dynamic import Dynamic, Regrowth
from sparsity.redistribution import InPlace, Proportional
from sparsity.schedules import ConstantDrop, CosineDrop, Cubic, Time
from sparsity.scores import Gradient, Momentum, Random, Score
from sparsity.targets import Targets

from .sparsify import Sparsify


class SparseMomentum(Sparsify):
    """Sparse momentum, Dettmers & Zettlemoyer, "Sparse networks from scratch" (arXiv 1907.04840).

    After every epoch each layer drops the smallest magnitudes, half of its weights at first and ever fewer along a
    cosine; layers share the freed weights in proportion to the mean momentum of what they keep, and grow those with
    the largest momentum. Momentum is that of the optimizer, SGD's or Adam's. So the gradients and the optimizer's state
    of pruned weights stay dense: clipping by norm sees them too.

    Unlike the authors' code: the number of weights is exact at all times, a newly grown weight starts with optimizer
    state of zero, and drops are rounded down, so that no layer loses its last weight.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        drops: what fraction of the kept weights is dropped, and when; if not given,
            `CosineDrop(0.5, "1ep", 1.0, 0.005)`, the authors'.
        grow: what is grown: `Momentum()` if not given, `Gradient()` or `Random()`.
        redistribution: `Proportional(Momentum())` if not given; another score in it, or `InPlace()` for none.
        distribution: the weights each layer starts with; `Uniform()` if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        drops: ConstantDrop | None = None,
        grow: Score | None = None,
        redistribution: InPlace | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        rule = Regrowth(
            grow or Momentum(), drops or CosineDrop(0.5, "1ep", 1.0, 0.005), redistribution or Proportional(Momentum())
        )
        super().__init__(Dynamic(sparsity, rule, distribution or Uniform(), targets=targets))


class SET(Sparsify):
    """Sparse evolutionary training, Mocanu et al. (arXiv 1707.04780), as the later literature has it.

    Each layer drops its smallest magnitudes and grows as many weights at random. The original drops the smallest
    positive and the largest negative weights, a constant 30 % after each epoch.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        drops: what fraction of the kept weights is dropped, and when; RigL's `CosineDrop()` if not given.
        distribution: how many weights each layer keeps; `ERK()` if not given, the original's for matrices.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Dynamic(sparsity, Regrowth(Random(), drops), distribution, targets=targets))


class RigL(Sparsify):
    """RigL, Evci et al., "Rigging the lottery" (ICML 2020, arXiv 1911.11134).

    Every 100 steps up to 75 % of training each layer drops its smallest magnitudes, 30 % at first and fewer along a
    cosine, and grows as many weights where the gradient is largest. `drops=InTime()` is RigL-ITOP (arXiv 2102.02887).

    The gradient is the one that training has computed anyway: over the whole accumulation window and all ranks. At an
    update the authors' code skips the optimizer's step; here only the newly grown weights do not take it.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        drops: what fraction of the kept weights is dropped, and when; `CosineDrop()` if not given, `InTime()` ...
        distribution: how many weights each layer keeps; `ERK()` if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Dynamic(sparsity, Regrowth(Gradient(), drops), distribution, targets=targets))


class GraNet(Sparsify):
    """GraNet: gradual pruning with neuroregeneration, Liu et al. (NeurIPS 2021, arXiv 2106.10404).

    From a sparse start (`initial`, 0 is dense) the smallest magnitudes of the whole model go in cubic steps up to
    `end`. At each of these steps, and on to the end of training, each layer also drops its smallest magnitudes and
    grows as many weights by gradient. No layer is emptied, as it could not grow again. For a network that is already
    trained take `initial=0`: the sparse start of this and of the other methods is random, and would undo its training.

    Args:
        sparsity: fraction of zeros over all targets from `end` on, in (0, 1).
        initial: fraction of zeros at the start, in [0, sparsity].
        end: when the sparsity is reached: steps, a fraction of training, or epochs ("80ep").
        drops: what fraction of the kept weights is dropped, and when; the pruning has the same interval.
            `CosineDrop(0.5, 0.016, 1.0, 0.005)` if not given: 1,000 of the authors' 62,500 steps.
        distribution: the weights each layer starts with; `ERK()` if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        initial: float = 0.5,
        end: Time = 0.5,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        drops = drops or CosineDrop(0.5, 0.016, 1.0, 0.005)
        schedule = Cubic(start=0, end=end, every=drops.every, initial=initial)
        super().__init__(Dynamic(sparsity, Regrowth(Gradient(), drops), distribution, schedule, targets))
