"""The Sparsifier: it owns the masks of one model. Three verbs: attach, update, apply."""

from bisect import bisect_right
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from sparsity import masks, patterns, shards
from sparsity.compact import Compact
from sparsity.distributions import Distribution, Global
from sparsity.errors import InputError
from sparsity.history import History
from sparsity.masks import Masks
from sparsity.ops import all_finite
from sparsity.scaling import Scaling
from sparsity.schedules import Constant, Horizon, Plan, Schedule
from sparsity.scores import Magnitude, Random, Score, Scores
from sparsity.targets import Targets, is_transposed, refuse_shared_memory
from sparsity.upkeep import Upkeep


class Sparsifier:
    """Keeps a model at the sparsity that a schedule asks for. It works in any training loop:

        sparsifier = Sparsifier(0.9, schedule=Cubic())
        sparsifier.attach(model, optimizer, horizon=Horizon(steps=1000))
        for step, batch in enumerate(batches):
            loss(model, batch).backward()
            sparsifier.update(step)  # renews the masks when due, masks the gradients
            optimizer.step()
            sparsifier.apply()  # pruned weights and their optimizer state are exactly zero
            optimizer.zero_grad()

    `sparsity` is the fraction of zeros over all targets at the end of the schedule: absolute, never compounding.
    Weights hold their zeros, so the model stays a plain dense model with its own `state_dict` keys. A pruned weight
    does not return. Families of methods override `first_masks` and `new_masks`. `history` holds what each renewal did.
    """

    needs_training = False  # whether masks are found while training only
    keeps_state = False  # whether pruned weights keep their optimizer state, because it is the signal to grow by

    def __init__(
        self,
        sparsity: float,
        score: Score | None = None,
        distribution: Distribution | None = None,
        pattern: str | int = "unstructured",
        schedule: Schedule | None = None,
        targets: Targets | None = None,
    ) -> None:
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
            raise InputError(f"sparsity is the fraction of zeros and must lie in [0, 1), got {sparsity!r}")
        self.sparsity = float(sparsity)
        self.score = score or Magnitude()
        self.distribution = distribution or Global()
        self.pattern = patterns.parse(pattern)
        self.schedule = schedule or Constant()
        self.targets = targets or Targets()
        self.masks: Masks = {}
        self.seed = 0
        self.renewed = -1  # the planned step of the last renewal
        self.history = History()
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self.turned: frozenset[str] = frozenset()  # those whose first axis is the input's
        self._sharded: list[Any] = []  # FSDP2's modules
        self._upkeep = Upkeep()
        self._plan: Plan = {}
        self._steps: list[int] = []
        self.model: nn.Module | None = None  # the one whose targets `weights` are
        self._model: nn.Module | None = None  # the one whose masks these are
        self._loaded = False
        self.scaling: Scaling | None = None

    @property
    def begins_at_random(self) -> bool:
        """Whether masks are random at first, and sparse from then on."""
        return isinstance(self.score, Random) and type(self.schedule) is Constant

    def scaled(self, what: str = "both") -> Self:
        """The same method with first weights, and learning rates, to match what the masks leave.

        `what`: "both", or "weights" alone. See `Scaling`. Raises `InputError` for methods whose masks are not random at
        first.
        """
        if not self.begins_at_random:
            raise InputError(
                "weights and rates are scaled for methods whose masks are random at first, such as StaticMask, SET or "
                f"RigL; {type(self).__name__} by {type(self.score).__name__} is none"
            )
        self.scaling = Scaling(what, moving=self.needs_training)
        return self

    def attach(self, model: nn.Module, *optimizers: Optimizer, horizon: Horizon | None = None, seed: int = 0) -> None:
        """Finds the targets, plans the updates, and prunes what is due before the first step.

        `horizon` is the length of training, which times given as fractions or epochs need; `seed` makes the random
        choices, the same on every rank. Masks that were loaded, or that this sparsifier already holds for this very
        model, are kept. Raises `InputError` for everything that could not be met later, before any training.
        """
        shards.refuse_flattened(model)
        self.model = model
        self._sharded = [each for each in model.modules() if hasattr(each, "reshard") and hasattr(each, "unshard")]
        weights = self.targets.select(model)
        refuse_shared_memory(model, weights, optimizers)
        self._owners = {name: _owner(model, weight) for name, weight in weights.items()}
        self.turned = frozenset(name for name, (module, _) in self._owners.items() if is_transposed(module))
        for name, weight in weights.items():
            self.pattern.check(name, tuple(self.facing(name, weight).shape))
        self._upkeep = Upkeep(*optimizers, keeps_state=self.keeps_state)
        compact = [each for each in optimizers if isinstance(each, Compact)]
        if compact and any(shards.is_spread(weight) for weight in weights.values()):
            raise InputError(
                "Compact takes whole weights, and these are spread over processes: take the optimizer itself"
            )
        if compact and self.keeps_state:
            raise InputError(f"{type(self).__name__} needs the state of pruned weights, which Compact does not keep")
        if self.scaling:
            self.scaling.check(optimizers)
        self._plan = self.plan(horizon or Horizon())
        self._steps = sorted(self._plan)
        loaded, self._loaded = self._loaded, False
        fresh = self.scaling is not None and not loaded and model is not self._model
        before = {name: int(weight.count_nonzero()) for name, weight in weights.items()} if fresh else {}
        if loaded:
            self.masks = self._placed(self.masks)
        elif model is not self._model:
            self.seed, self.renewed, self.history = seed, -1, History()
            self.masks = self.first_masks()
        else:  # on another device, perhaps
            self.masks = {name: self.masks[name].to(weight.device) for name, weight in weights.items()}
        self._model = model
        renews = not self.score.needs_gradient and not loaded
        if not (renews and self._due(0) == self.last_renewal()):  # that renewal finds out by itself
            self.check_budget()
        if renews:
            self._renew_if_due(0)
        if self.scaling and fresh:
            self.scaling.begin(self.weights(), self.masks, before)
        self.enforce()
        if self.scaling:
            self.scaling.follow(optimizers, lambda: (self.weights(), self.masks))
        for optimizer in compact:
            optimizer.follow(lambda: (self.weights(), self.masks), by=self)

    def detach(self) -> None:
        """Forgets the model, its optimizers and the masks."""
        if self.scaling:
            self.scaling.leave()
        self.model, self._model, self._owners, self._upkeep = None, None, {}, Upkeep()
        self.masks, self.renewed, self.history, self._loaded = {}, -1, History(), False

    def update(self, step: int, optimizer: Optimizer | None = None) -> None:
        """After backward and before the optimizer's step number `step`: renews the masks when due, masks the gradients.

        Where a gradient of the model is not finite, the masks stay as they are and the renewal is made up for at the
        next step. With an `optimizer`, of several, it is the gradients of the weights that this one steps.
        """
        if self._due(step) is not None and self._gradients_are_finite():
            self._renew_if_due(step)
        weights = self.held(optimizer)
        masked = not self.keeps_state
        with self.scaling.measuring(weights, self.masks, masked) if self.scaling else nullcontext():
            self._upkeep.mask_gradients(weights, self.masks)

    def apply(self) -> None:
        """After the optimizer's step: pruned weights and all of their optimizer state are exactly zero.

        Where `Upkeep` can tell that the step has left them so, nothing is written.
        """
        self._upkeep.after_step(self.weights(), self.masks)

    def begin(self, step: int) -> None:
        """Training begins or goes on at this step, where a trainer counts on over several fits."""

    def relax(self) -> None:
        """Before the forward pass of training. Methods that train through more than the masks keep show it here."""

    def settle(self) -> None:
        """After a batch, also one whose step was skipped: methods that showed more than the masks keep end it here."""

    def enforce(self) -> None:
        """At any time, whoever wrote to the weights: pruned weights and their optimizer state become exactly zero."""
        self._reshard()
        self._upkeep.enforce(self.weights(), self.masks)

    def stored(self, name: str, value: Tensor) -> Tensor:
        """What a checkpoint has of a weight: an averaging callback may have put its own in the model's place."""
        mask = self.masks[name].to(value.device)
        # Weights that are spread over processes are the model's own: no averaging callback has them.
        if shards.is_spread(value) or not bool(value[~mask].any()):
            return value
        return torch.where(mask, value, 0)

    def density(self) -> float:
        """The fraction of target weights that the masks keep."""
        return masks.density(self.masks)

    def target(self, step: int) -> float:
        """The sparsity that the schedule asks for at a step."""
        entry = bisect_right(self._steps, step) - 1
        return self._plan[self._steps[entry]] if entry >= 0 else 0.0

    def renewals(self) -> list[int]:
        """The steps at which renewals are planned, in order."""
        return list(self._steps)

    def last_renewal(self) -> int:
        """The step of the last planned renewal, -1 where none is planned."""
        return self._steps[-1] if self._steps else -1

    def reached(self) -> int:
        """The step at which the plan first asks for its highest sparsity, -1 where nothing is planned."""
        return min((step for step, level in self._plan.items() if level == max(self._plan.values())), default=-1)

    def explored(self) -> float:
        """The fraction of target weights that have been trained at any time: pruned ones do not return."""
        if self.history.rows:
            return self.history.rows[0][1]
        return self.density() if self.renewed == 0 else 1.0

    def weights(self) -> dict[str, Parameter]:
        """The target parameters by name, as the model holds them now."""
        return {name: getattr(module, leaf) for name, (module, leaf) in self._owners.items()}

    def held(self, optimizer: Optimizer | None) -> dict[str, Parameter]:
        """Those that this optimizer steps; all of them if there is none."""
        weights = self.weights()
        if optimizer is None:
            return weights
        stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        return {name: weight for name, weight in weights.items() if id(weight) in stepped}

    def scores(self, score: Score, among: Masks, draw: str) -> Scores:
        """A score of all targets, outputs before inputs; `draw` names the random numbers."""
        weights, optimizers = self.weights(), self._upkeep.optimizers
        return Scores(score, weights, among, f"{self.seed}/{draw}", optimizers, self.turned)

    def facing(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a target's shape with outputs on axis 0 and inputs on axis 1; again, it is as it was."""
        return tensor.transpose(0, 1) if name in self.turned else tensor

    def plan(self, horizon: Horizon) -> Plan:
        """The sparsity from each step of renewal on."""
        return self.schedule.plan(self.sparsity, horizon)

    def first_masks(self) -> Masks:
        """The masks before the first renewal."""
        return masks.full(self.weights())

    def new_masks(self, density: float, step: int) -> Masks:
        """The masks of a renewal that keeps this density; the present ones where they are already that sparse."""
        if round(density * self._size()) >= sum(masks.counts(self.masks).values()):
            return self.masks
        scores = self.scores(self.score, self.masks, str(step))
        found = self.pattern.masks(scores, self._counts(scores, density, masks.counts(self.masks)))
        return {name: self.facing(name, mask).contiguous() for name, mask in found.items()}

    def renew(self, found: Masks, step: int) -> None:
        """Takes over the masks of the renewal planned for a step, and zeroes what they prune."""
        before, self.masks, self.renewed = self.masks, found, step
        self.enforce()
        self.history.record(step, found, before, self.explored())

    def adopt(self, found: Masks, renewed: int) -> None:
        """Takes over masks that come from elsewhere, such as a server's, as those of the renewal at a step.

        Nothing is written: the weights are expected to come with them. The next `attach` keeps the masks, whatever its
        model.
        """
        self.masks, self.renewed, self.history = dict(found), renewed, History()
        self._loaded = True

    def check_budget(self) -> None:
        """Raises `InputError` if the final sparsity cannot be met by the distribution and the pattern."""
        self.budget()

    def budget(self) -> dict[str, int]:
        """How many weights each target keeps at the final sparsity.

        What the masks have if they are that sparse. Else the distribution's word: where it goes by values, by those
        that the weights have now, and training moves it.
        """
        kept = masks.counts(self.masks)
        if sum(kept.values()) <= round((1 - self.sparsity) * self._size()):
            return kept
        whole = masks.full(self.weights())
        return self._counts(self.scores(self.score, whole, "check"), 1 - self.sparsity, masks.counts(whole))

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during training: tensors and primitives, one bit per target weight."""
        return {
            "masks": masks.to_state(self.masks), "renewed": self.renewed, "seed": self.seed,
            "sparsity": self.sparsity, "history": self.history.state_dict(),
            **({"scaled": self.scaling.what} if self.scaling else {}),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state; before `attach`, which then checks it against the model, or after."""
        restored = masks.from_state(state["masks"])
        self.masks, self.renewed, self.seed = restored, int(state["renewed"]), int(state["seed"])
        if "history" in state:
            self.history.load_state_dict(state["history"])
        if self._model is None:
            self._loaded = bool(restored)  # a state from before the first attach holds no masks
        else:
            self.masks = self._placed(restored)
            self.enforce()

    def _placed(self, restored: Masks) -> Masks:
        """Restored masks of the targets, checked against the model and on its devices."""
        weights = self.weights()
        masks.check(restored, weights, "the saved state")
        return {name: restored[name].to(weight.device) for name, weight in weights.items()}

    def _due(self, step: int) -> int | None:
        """The planned step of the renewal that is due and not yet made."""
        entry = bisect_right(self._steps, step) - 1
        return self._steps[entry] if entry >= 0 and self._steps[entry] > self.renewed else None

    @torch.no_grad()
    def _renew_if_due(self, step: int) -> None:
        planned = self._due(step)
        if planned is not None:
            self.renew(self.new_masks(1 - self._plan[planned], planned), planned)

    def _counts(self, scores: Scores, density: float, most: dict[str, int]) -> dict[str, int]:
        """How many weights each layer keeps: the distribution's word, within what the pattern and `most` allow."""
        return self.pattern.fit(self.distribution(scores, density), scores.shapes, most)

    def _reshard(self) -> None:
        """FSDP2 leaves the weights of its root whole after an evaluation: parts are what is written to."""
        for module in self._sharded:
            module.reshard()

    def _size(self) -> int:
        return sum(weight.numel() for weight in self.weights().values())

    def _gradients_are_finite(self) -> bool:
        gradients = (weight.grad for optimizer in self._upkeep.optimizers for group in optimizer.param_groups
                     for weight in group["params"] if weight.grad is not None)  # fmt: skip
        finite = all(all_finite(shards.local(gradient)) for gradient in gradients)
        return shards.all_agree(finite, list(self.weights().values()))


def _owner(model: nn.Module, weight: Parameter) -> tuple[nn.Module, str]:
    return next(
        (module, leaf)
        for module in model.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter is weight
    )
