"""Masks that are learned over weights that are not."""

from sparsity.companion import Companion
from sparsity.distributions import Distribution
from sparsity.supermask import Jackpot, Signed, Supermask
from sparsity.targets import Targets

from .sparsify import Sparsify


class EdgePopup(Sparsify):
    """Edge-popup: Ramanujan et al. (CVPR 2020, arXiv 1911.13299). A network hidden in random weights.

    Each weight has a score, and the highest of each layer are kept; only scores are trained, by an optimizer like the
    model's, which clipping does not reach. Start from an untrained network; biases stay as they are, so leave them out,
    and norms without parameters are what the authors use. Frozen layers keep their largest magnitudes.

    Args:
        sparsity: fraction of zeros over all targets, in [0, 1).
        constant: whether all weights of a layer get one magnitude, sqrt(2 / fan in), and keep their signs.
        companion: learning rate, as a factor, and weight decay of the scores; `Companion(1.0, 1e-4)` if not given.
        distribution: how many weights each layer keeps: the same part of each if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        constant: bool = False,
        companion: Companion | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Supermask(sparsity, constant, companion, distribution, targets))


class SignedSupermask(Sparsify):
    """Signing the supermask: Koster et al. (ICLR 2022, arXiv 2201.13361). Weights are kept, hidden or inverted.

    Like EdgePopup, and the sign of a score is a factor of its weight. Unlike in the paper the sparsity is asked for.

    Args:
        sparsity: fraction of zeros over all targets, in [0, 1).
        constant: whether all weights of a layer get one magnitude, sqrt(3 / fan in), and keep their signs.
        companion: learning rate, as a factor, and weight decay of the scores; `Companion(1.0, 1e-4)` if not given.
        distribution: how many weights each layer keeps: the same part of each if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        constant: bool = True,
        companion: Companion | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Signed(sparsity, constant, companion, distribution, targets))


class LotteryJackpot(Sparsify):
    """Lottery jackpots: Zhang et al. (arXiv 2104.08700). A better mask for the weights of a trained network.

    The search begins at the largest magnitudes, and lasts for the whole training; the weights stay as they are. Start
    from a trained network (`--weights`). The authors leave the last layer dense (`targets`), and tune the weights for a
    few epochs afterwards, which ConstantMask does.

    Args:
        sparsity: fraction of zeros over all targets, in [0, 1).
        companion: learning rate, as a factor, and weight decay of the scores; `Companion(1.0, 5e-4)` if not given.
        distribution: how many weights each layer keeps: its share of the largest magnitudes of all if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        companion: Companion | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Jackpot(sparsity, companion, distribution, targets))
