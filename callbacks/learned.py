"""N:M masks that follow the weights, or are trained themselves."""

from sparsity.gumbel import Annealing, Gumbel, LogitTraining, Prior
from sparsity.learned import StraightThrough
from sparsity.relaxation import ExponentialDecay, Relaxation
from sparsity.targets import Targets

from .sparsify import Sparsify


class GumbelNM(Sparsify):
    """MaskLLM: learned N:M masks, Fang et al. (NeurIPS 2024, arXiv 2409.17481).

    Each group of M weights has a logit for each of its C(M, N) masks. Training samples soft masks from them, colder and
    colder, and moves the logits, by an optimizer like the model's; evaluation, checkpoints and the end of training have
    the most likely masks. Start from a trained network. See `sparsity.gumbel.Gumbel` for what differs from the paper.

    Args:
        pattern: "1:M", "2:4", "2:8", "4:8", "2:16" (quoted): at most 128 masks per group.
        prior: what the masks are like at first; `Prior(strength=0)` for none, `Prior()`, magnitudes, if not given.
        annealing: temperature, scale and regularisation; `Annealing()`, the paper's, if not given.
        training: learning rate and weight decay of the logits; `LogitTraining()`, the paper's, if not given.
        frozen: whether nothing but the logits is trained, as in the paper.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self,
        pattern: str | int = "2:4",
        prior: Prior | None = None,
        annealing: Annealing | None = None,
        training: LogitTraining | None = None,
        frozen: bool = True,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(Gumbel(pattern, prior or Prior(), annealing, training, frozen, targets))


class SRSTE(Sparsify):
    """SR-STE: N:M masks by magnitude at every step, Zhou et al. (ICLR 2021, arXiv 2102.04010).

    All weights are trained by the gradients of the masked ones, and the pruned ones are also drawn to zero, so that
    masks settle. The authors train with SGD; under Adam the pull is rescaled with the gradient (STEP, arXiv 2302.01172,
    reports a loss of accuracy).

    Args:
        pattern: "N:M" (quoted), or "2:4T", which is 2:4 along both axes.
        decay: of pruned weights, added to their gradients; 2e-4 is the authors'.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(self, pattern: str | int = "2:4", decay: float = 2e-4, targets: Targets | None = None) -> None:
        super().__init__(StraightThrough(pattern, decay, targets=targets))


class STE(Sparsify):
    """N:M masks by magnitude at every step, with the plain straight-through gradient (Bengio et al., arXiv 1308.3432).

    Args:
        pattern: "N:M" (quoted), or "2:4T", which is 2:4 along both axes.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(self, pattern: str | int = "2:4", targets: Targets | None = None) -> None:
        super().__init__(StraightThrough(pattern, targets=targets))


class PGF(Sparsify):
    """Progressive gradient flow: from dense to N:M by decay, Bambhaniya et al. (arXiv 2402.04744).

    Either the pruned weights take part less and less, or the pattern gets there in frames. Gradients go straight
    through to all weights. Evaluation and checkpoints have the pattern that is in force at that step.

    Args:
        pattern: "N:M" (quoted).
        relaxation: `ExponentialDecay()` if not given, `LinearDecay()`, `Stepwise()` or `Geometric()`; each with
            `until`, when only the pattern is left.
        targets: which parameters; all Linear and convolution weights if not given.
    """

    def __init__(
        self, pattern: str | int = "1:8", relaxation: Relaxation | None = None, targets: Targets | None = None
    ) -> None:
        super().__init__(StraightThrough(pattern, relaxation=relaxation or ExponentialDecay(), targets=targets))
