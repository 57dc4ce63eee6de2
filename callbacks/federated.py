"""Methods for the clients of a federation, which also work in a trainer of their own."""

from sparsity.congruent import Congruent, Congruity
from sparsity.distributions import Distribution
from sparsity.importance import Importance
from sparsity.schedules import ConstantDrop
from sparsity.sensitivity import Sensitivity
from sparsity.targets import Targets

from .sparsify import Sparsify


class FedSGC(Sparsify):
    """FedSGC (reconstructed): masks move first where a client and the whole federation agree.

    Tian et al., "Gradient-congruity guided federated sparse training" (arXiv 2405.01189). The paper's tables were not
    available: the rule follows its abstract and public code of its first author, with exact counts. Of the weights that
    a layer drops, a part are the smallest whose direction of late is opposite to that of the last global step; of those
    that it grows, a part first where they agree. The rest go by magnitude and gradient, as in FedDST. The server of the
    paper counts clients that did not take part with the last weights: `FedAvg(residual=True)`.

    In a federation times are rounds: every 20 rounds up to two thirds of training, 10 % at first and fewer along a
    cosine. In a client's own trainer they are steps, and `sparsifier.receive` takes the server's masks and directions
    before each fit; without any it is FedDST.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        congruity: what part goes by directions; `Congruity(0.01)` if not given. `GradientCongruity()` is our own rule
            for growth, where the published one has hardly any content.
        drops: what fraction of the kept weights is dropped, and when; `CosineDrop(0.1, 20, 0.667)` if not given.
        distribution: how many weights each layer keeps; `ERK()` if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        congruity: Congruity | None = None,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Congruent(sparsity, congruity, drops, distribution, targets))


class FedDST(Sparsify):
    """FedDST: Bibikar et al., "Federated dynamic sparse training" (AAAI 2022, arXiv 2112.09824).

    Clients drop their smallest magnitudes and grow by gradient, the server averages each weight over those that keep
    it and keeps the largest of each layer. In a trainer of one's own it is RigL, but for weights that are dropped,
    which do not grow again at once. Unlike the authors' code the number of weights is exact, and the rate decays.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        drops: what fraction of the kept weights is dropped, and when; in a federation in rounds, in a trainer in
            steps. `CosineDrop(0.1, 20, 0.667)` if not given.
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
        super().__init__(Congruent(sparsity, Congruity(0.0), drops, distribution, targets))


class FLASH(Sparsify):
    """FLASH: Babakniya et al., "Revisiting sparsity hunting in federated learning" (TMLR 2023), with fixed masks.

    A part of the clients trains before the first round with masks that move between layers; all then train one random
    mask with the average of their densities, so that clients never disagree about it. Unlike the authors' code, which
    draws each weight, the number of weights is exact. In a trainer of one's own it is sparse momentum.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        scouts: what part of the clients trains before the others.
        epochs: that each of them trains.
        drops: what fraction of the kept weights they drop, and when, in their own steps;
            `CosineDrop(0.25, "1ep", 1.0, 0.005)` if not given.
        distribution: the weights each layer starts with; `ERK()` if not given.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        sparsity: float,
        scouts: float = 0.1,
        epochs: int = 10,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Sensitivity(sparsity, scouts, epochs, drops, distribution, targets))


class PruneFL(Sparsify):
    """PruneFL: Jiang et al., "Model pruning enables efficient federated learning on edge devices" (arXiv 1909.12326).

    The server moves the masks by squared gradients that clients send for all weights, pruned ones too: dense uploads
    in these rounds. At a fixed sparsity, see `sparsity.importance`. In a trainer of one's own the same, by its own
    gradients.

    Args:
        sparsity: fraction of zeros over all targets, in (0, 1).
        drops: what fraction of the kept weights is freed, and when; in a federation in rounds, in a trainer in steps.
            `CosineDrop(0.3, 50, 1.0)` if not given.
        distribution: the weights each layer starts with; `ERK()` if not given.
        targets: which parameters; all Linear and convolution weights if not given.
        times: how long one weight of a layer takes, by name, in any unit; all the same if not given.
    """

    def __init__(
        self,
        sparsity: float,
        drops: ConstantDrop | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
        times: dict[str, float] | None = None,
    ) -> None:
        super().__init__(Importance(sparsity, drops, distribution, targets, times))
