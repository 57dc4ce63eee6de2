"""Supermasks: which weights of a network are kept is learned, the weights themselves never are."""

import math
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from sparsity import masks, shards
from sparsity.companion import Companion
from sparsity.distributions import Distribution, Global, Uniform
from sparsity.errors import InputError
from sparsity.learned import Learned
from sparsity.masks import Masks
from sparsity.ops import largest
from sparsity.schedules import Horizon, Plan
from sparsity.targets import Targets


class Supermask(Learned):
    """Edge-popup: Ramanujan et al., "What's hidden in a randomly weighted neural network?" (CVPR 2020, arXiv
    1911.13299).

    Each weight has a score; the weights of highest |score| in each layer are kept, as many at every step as the
    distribution gave the layer at first. Gradients go straight through to the scores, g w sign(score), which an
    optimizer like the model's moves; nothing else is trained. Families override `first_scores`, `rank` and `pull`.

    Args:
        constant: whether all weights of a layer get the magnitude sqrt(2 / fan in), and keep their signs.
    """

    gain = 1.0  # of constant weights

    def __init__(
        self,
        sparsity: float,
        constant: bool = False,
        companion: Companion | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(sparsity, distribution or Uniform(), "unstructured", targets)
        self.constant = constant
        self.learned: dict[str, Parameter] = {}  # the scores
        self._companion = companion or Companion(1.0, 1e-4)
        self._kept: dict[str, int] = {}  # weights of each layer
        self._saved: dict[str, Any] = {}

    def first_scores(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        """Scores before training, given the mask of the largest magnitudes: uniform in +-1 / sqrt(fan in)."""
        bound = 1 / math.sqrt(weight[0].numel())
        return self._uniform(name, weight.shape, bound)

    def rank(self, scores: Tensor) -> Tensor:
        """What the kept weights are the highest by."""
        return scores.abs()

    def pull(self, scores: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the scores from that of a factor on each weight."""
        return gradient * scores.sign()

    def plan(self, horizon: Horizon) -> Plan:
        self._make_optimizer()
        return super().plan(horizon)

    def first_masks(self) -> Masks:
        """All weights; and the scores at the start."""
        weights = self.weights()
        for name, weight in weights.items():
            if self.constant and weight.requires_grad:
                self._flatten(name, weight)
        full = super().first_masks()
        scores = self.scores(self.score, full, "0")
        self._kept = self._counts(scores, 1 - self.sparsity, masks.counts(full))
        self.learned = {}
        for name in weights:
            face = self.facing(name, self._whole(name)).float()
            kept = largest(face.abs(), self._kept[name])
            # Weights that no one trains have no scores to learn: their largest magnitudes stay.
            learns = weights[name].requires_grad
            first = self.first_scores(name, face, kept).to(face.device) if learns else face.abs()
            self.learned[name] = Parameter(self.facing(name, first).contiguous())
        self._make_optimizer()
        return full

    def new_masks(self, density: float, step: int) -> Masks:
        """The highest ranks of each layer."""
        return {name: largest(self.rank(each.detach()), self._kept[name]) for name, each in self.learned.items()}

    def observe(self, names: list[str]) -> None:
        """The gradients of the scores from those of the masked weights."""
        for name, weight in self._some(names):
            if weight.grad is not None:
                gradient = shards.whole(weight.grad.detach()).float() * self._whole(name).float()
                self.learned[name].grad = self.pull(self.learned[name].detach(), gradient)
        self.freeze()

    def endure(self, names: list[str]) -> None:
        super().endure(names)
        self.freeze()

    @torch.no_grad()
    def apply(self) -> None:
        """After the optimizer's step: that of the scores, new masks, and the sparse weights."""
        self._companion.step(self.learned, self.weights(), self._upkeep.optimizers)
        super().apply()

    def settle(self) -> None:
        if "dense" in self._shown.values():
            self._companion.skip()
        super().settle()

    @torch.no_grad()
    def enforce(self) -> None:
        super().enforce()
        if self.dense:  # whatever was written to them, the weights are not trained
            self._show_masked(list(self.dense))

    def check_budget(self) -> None:
        """Raises `InputError` if the sparsity cannot be met by the distribution."""
        whole = masks.full(self.weights())
        self._counts(self.scores(self.score, whole, "check"), 1 - self.sparsity, masks.counts(whole))

    def detach(self) -> None:
        super().detach()
        self.learned, self._saved = {}, {}
        self._companion.forget()

    def state_dict(self) -> dict[str, Any]:
        """Also the scores and the state of their optimizer."""
        return {
            **super().state_dict(),
            "scores": {name: each.detach().cpu() for name, each in self.learned.items()},
            "optimizer": self._companion.state_dict(self.learned),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "scores" not in state:
            raise InputError(f"the saved state has no scores, which {type(self).__name__} trains: start anew")
        self._saved = {"scores": state["scores"], "optimizer": state["optimizer"]}
        super().load_state_dict(state)

    def _unhide(self) -> None:
        super()._unhide()
        self._kept = masks.counts(self.masks)
        for name, weight in self.weights().items():
            scores = self._saved["scores"].get(name)
            if scores is None or scores.shape != weight.shape:
                raise InputError(f"the saved state has no scores of the shape {tuple(weight.shape)} for '{name}'")
            self.learned[name] = Parameter(scores.to(weight.device, copy=True))
        self._companion.load_state_dict(self._saved["optimizer"])
        self._saved = {}
        self._make_optimizer()

    def _place(self) -> None:
        super()._place()
        for name, weight in self.weights().items():
            self.learned[name].data = self.learned[name].data.to(weight.device)

    def _absorb(self, names: list[str]) -> None:
        """Nothing: dense weights stay what they are."""

    def _make_optimizer(self) -> None:
        if self.learned:
            self._companion.make(self.learned, self.weights(), self._upkeep.optimizers)

    def _flatten(self, name: str, weight: Parameter) -> None:
        face = self.facing(name, shards.whole(weight.detach()))
        size = self.gain * math.sqrt(2 / face[0].numel())
        flat = torch.where(face < 0, -size, size).to(weight.dtype)
        shards.local(weight).copy_(shards.local_part(self.facing(name, flat), weight))

    def _uniform(self, name: str, shape: torch.Size, bound: float) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/scores/{name}".encode()))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Signed(Supermask):
    """Signing the supermask: Koster et al. (ICLR 2022, arXiv 2201.13361): keep, hide, or invert.

    A kept weight is multiplied by the sign of its score. Gradients go straight through to the scores, g w. The authors
    keep what exceeds a threshold, so that the sparsity is what comes of it and of weight decay; here it is asked for,
    and as many of the largest |score| are kept. Their constants, sqrt(3 / fan in), are made for ELU.
    """

    gain = math.sqrt(1.5)

    def first_scores(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        """Xavier's uniform."""
        size = weight[0].numel() + weight.numel() // weight.shape[1]
        return self._uniform(name, weight.shape, math.sqrt(6 / size))

    def pull(self, scores: Tensor, gradient: Tensor) -> Tensor:
        return gradient

    def _passed_part(self, name: str, weight: Parameter) -> Tensor:
        signs = torch.where(self.learned[name].detach() < 0, -1, 1)
        return self.dense[name] * shards.local_part(signs, weight).to(weight.dtype)

    def _unhide(self) -> None:
        super()._unhide()
        for name, weight in self.weights().items():  # those of the model came inverted
            kept = shards.local_part(self.masks[name], weight)
            self.dense[name] = torch.where(kept, self._passed_part(name, weight), self.dense[name])


class Jackpot(Supermask):
    """Lottery jackpots: Zhang et al. (arXiv 2104.08700): a mask is searched for among the weights of a trained network.

    Scores start at 1 where a weight is among the largest magnitudes of all layers, which says how many each layer
    keeps, and at 0.99 elsewhere. After each step the mask moves towards the highest scores, by the best so many of the
    pairs of a weight to bring in and one to put out: all of them at first, none at the end of training, along half a
    cosine.
    """

    def __init__(
        self,
        sparsity: float,
        companion: Companion | None = None,
        distribution: Distribution | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(sparsity, False, companion or Companion(1.0, 5e-4), distribution or Global(), targets)
        self._length = 1

    def first_scores(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        """1 and 0.99."""
        return torch.where(kept, 1.0, 0.99)

    def rank(self, scores: Tensor) -> Tensor:
        return scores

    def pull(self, scores: Tensor, gradient: Tensor) -> Tensor:
        return gradient

    def plan(self, horizon: Horizon) -> Plan:
        if horizon.steps is None:
            raise InputError("the search is annealed over a training without end: set max_epochs or max_steps")
        self._length = horizon.steps
        return super().plan(horizon)

    def new_masks(self, density: float, step: int) -> Masks:
        """The present masks, with the best of the pairs exchanged."""
        best = super().new_masks(density, step)
        share = (1 + math.cos(math.pi * min(1.0, step / self._length))) / 2
        return {name: self._towards(self.masks[name], mask, self.learned[name].detach(), share)
                for name, mask in best.items()}  # fmt: skip

    def _towards(self, now: Tensor, best: Tensor, scores: Tensor, share: float) -> Tensor:
        coming, going = best & ~now, now & ~best
        pairs = int(coming.count_nonzero())
        if int(going.count_nonzero()) != pairs:  # before the first masks
            return best
        count = math.ceil(share * pairs)
        brought = largest(scores.masked_fill(~coming, -torch.inf), count)
        put = largest((-scores).masked_fill(~going, -torch.inf), count)
        return now & ~put | brought
