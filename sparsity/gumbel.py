"""Learned N:M masks: a categorical distribution over the masks of each group, trained by gradient (MaskLLM)."""

import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parameter import Parameter

from sparsity import checkpoints, masks, shards
from sparsity.companion import Companion
from sparsity.distributions import Uniform
from sparsity.errors import InputError
from sparsity.learned import Learned, learnable
from sparsity.masks import Masks
from sparsity.ops import best_nm_mask, candidates, gumbel_nm_gradient, gumbel_nm_mask
from sparsity.patterns import NM, from_groups, to_groups
from sparsity.schedules import Horizon, Plan
from sparsity.targets import Targets

MOST = 128  # candidates of a group
FORMAT = "sparsity-logits-1"


class Prior:
    """What the masks are like before training.

    Args:
        file: a mask file (`sparsity.masks.save`; `oneshot` writes one), or logits to start from: a file of
            `Gumbel.save_logits`, or a checkpoint of GumbelNM. None takes the largest magnitudes of each group.
        strength: how far a mask moves the logits, in units of their deviation; 3 in the paper. 0 has no prior.
    """

    def __init__(self, file: str | Path | None = None, strength: float = 3.0) -> None:
        if strength < 0:
            raise InputError(f"the prior's strength must be 0 or more, got {strength}")
        self.file, self.strength = file, strength


class Annealing:
    """How sampling changes from the first to the last step, linearly; the defaults are the paper's.

    Args:
        temperature: of the softmax, at the start and at the end; low ones give masks that are nearly hard.
        scale: the factor of the logits beside the noise; too high explores nothing, too low never settles.
        energy: weight, at the start, of the sum of squares of what the masks keep, which is to be high; 0 at the end.
            It is a sum over all targets, so that its due weight depends on the size of the network.
    """

    def __init__(
        self,
        temperature: tuple[float, float] = (4.0, 0.05),
        scale: tuple[float, float] = (100.0, 500.0),
        energy: float = 1e-5,
    ) -> None:
        if min(*temperature, *scale) <= 0 or energy < 0:
            raise InputError(f"expected {temperature=} and {scale=} above 0 and {energy=} of 0 or more")
        self.temperature, self.scale, self.energy = tuple(temperature), tuple(scale), energy

    def at(self, part: float) -> tuple[float, float, float]:
        """Temperature, scale and weight of the energy, after this part of training."""
        part = min(1.0, part)
        (hot, cold), (low, high) = self.temperature, self.scale
        return hot + part * (cold - hot), low + part * (high - low), self.energy * (1 - part)


class LogitTraining:
    """How the logits are trained: by an optimizer of the class and the settings of the model's.

    Args:
        rate: times the learning rate that the model's optimizer has at each step.
        weight_decay: of the logits, which draws the masks of a group towards equal odds.
        deviation: of the normal logits at the start.
    """

    def __init__(self, rate: float = 10.0, weight_decay: float = 0.1, deviation: float = 0.01) -> None:
        if rate <= 0 or weight_decay < 0 or deviation <= 0:
            raise InputError(f"expected {rate=} and {deviation=} above 0 and {weight_decay=} of 0 or more")
        self.rate, self.weight_decay, self.deviation = rate, weight_decay, deviation


class Gumbel(Learned):
    """Trains logits of the C(M, N) masks that each group of M weights can have, with the weights frozen or not.

    In training the weights are multiplied by soft masks, a Gumbel-softmax over the candidates (MaskLLM, Fang et al.,
    NeurIPS 2024, arXiv 2409.17481); the most likely masks hold everywhere else. The logits are float32 whatever the
    model is; they are no parameters of it. Their gradient follows from that of the masked weights, so that nothing is
    added to the model's graph, and the noise from seed and step, so that nothing of it is stored and all ranks draw the
    same. Unlike the authors' code: one draw lasts for a whole accumulation window, and the same one under activation
    checkpointing.
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
        self.nm = learnable(pattern)
        _check(self.nm)
        super().__init__(1 - self.nm.n / self.nm.m, Uniform(), pattern, targets)
        self.prior, self.annealing, self.training = prior, annealing or Annealing(), training or LogitTraining()
        self.frozen = frozen
        self.logits: dict[str, Parameter] = {}
        self._length = 1
        self._companion = Companion(self.training.rate, self.training.weight_decay)
        self._drawn: dict[str, int] = {}  # the step whose sample each weight is shown by
        self._saved: dict[str, Any] = {}

    def plan(self, horizon: Horizon) -> Plan:
        if horizon.steps is None:
            raise InputError("sampling is annealed over a training without end: set max_epochs or max_steps")
        self._length = horizon.steps
        self._make_optimizer()
        return super().plan(horizon)

    def first_masks(self) -> Masks:
        """All weights; and the logits at the start, by the prior."""
        full = super().first_masks()
        kind, found = _read(self.prior.file) if self.prior and self.prior.file else ("masks", None)
        self.logits = {name: self._start(name, weight, kind, found) for name, weight in self.weights().items()}
        self._make_optimizer()
        return full

    def new_masks(self, density: float, step: int) -> Masks:
        """The most likely mask of each group."""
        return {name: self._as_weight(name, best_nm_mask(each, *self._nm)) for name, each in self.logits.items()}

    @torch.no_grad()
    def relax(self) -> None:
        """The weights times soft masks, where the logits are being trained."""
        self._reshard()
        names = [
            name for name, each in self._some(self._companion.names) if each.requires_grad and self._is_masked(name)
        ]
        self._absorb(names)
        for name, weight in self._some(names):
            self._drawn[name] = self.step
            torch.mul(self.dense[name], self._soft_mask(name, weight), out=shards.local(weight))
            self._shown[name] = "relaxed"

    def observe(self, names: list[str]) -> None:
        """The gradients of the logits from those of the masked weights, d loss / d mask = d loss / d (w mask) * w."""
        for name, weight in self._some(names):
            if weight.grad is None or name not in self._companion.names:
                continue
            if name not in self._drawn:
                raise InputError(
                    "masks were not sampled for this step: call relax() before the forward pass of each training step"
                )
            temperature, scale, energy = self._sampling(name)
            # The energy is the sum of (w mask)^2; w mask is what stands in the model.
            of_mask = (weight.grad - 2 * energy * weight) if energy else weight.grad
            of_mask = shards.whole(of_mask.detach()).float() * self._whole(name).float()
            groups = to_groups(self.facing(name, of_mask), self.nm.m)
            self.logits[name].grad = gumbel_nm_gradient(
                self.logits[name].detach(), groups, *self._nm, scale, temperature, self._draw(name)
            )
            if not self.frozen:
                shards.local(weight.grad).mul_(self._soft_mask(name, weight))
        if self.frozen:
            self.freeze()

    def endure(self, names: list[str]) -> None:
        super().endure(names)
        if self.frozen:
            self.freeze()

    @torch.no_grad()
    def apply(self) -> None:
        """After the optimizer's step: that of the logits, new masks, and the sparse weights."""
        self._companion.step(self.logits, self.weights(), self._upkeep.optimizers)
        for name in self._stepping:
            self._drawn.pop(name, None)
        super().apply()

    def settle(self) -> None:
        if "dense" in self._shown.values():
            self._companion.skip()
        super().settle()

    @torch.no_grad()
    def enforce(self) -> None:
        super().enforce()
        if self.frozen and self.dense:  # an average of masked weights, such as an EMA has, is none of them
            self._show_masked(list(self.dense))

    def detach(self) -> None:
        super().detach()
        self.logits, self._drawn, self._saved = {}, {}, {}
        self._companion.forget()

    def save_logits(self, path: str | Path) -> None:
        """Writes the logits to a safetensors file, for another run to start from: `Prior(file=path)`."""
        contents = {name: logits.detach().cpu() for name, logits in self.logits.items()}
        save_file(contents, path, metadata={"format": FORMAT, "pattern": self.nm.name})

    def state_dict(self) -> dict[str, Any]:
        """Also the logits and the state of their optimizer."""
        return {
            **super().state_dict(),
            "logits": {name: each.detach().cpu() for name, each in self.logits.items()},
            "optimizer": self._companion.state_dict(self.logits),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = {"logits": state.get("logits", {}), "optimizer": state.get("optimizer", {})}
        super().load_state_dict(state)

    def _unhide(self) -> None:
        super()._unhide()
        saved, self._saved = self._saved, {}
        self.logits = {}
        for name, weight in self.weights().items():
            self.logits[name] = self._checked(name, weight, saved["logits"].get(name), "the saved state")
        self._companion.load_state_dict(saved["optimizer"])
        self._make_optimizer()

    def _place(self) -> None:
        super()._place()
        for name, weight in self.weights().items():
            self.logits[name].data = self.logits[name].data.to(weight.device)

    def _is_masked(self, name: str) -> bool:
        return self._shown[name] == "masked"

    def _absorb(self, names: list[str]) -> None:
        super()._absorb([name for name in names if not self.frozen or self._is_masked(name)])

    @property
    def _nm(self) -> tuple[int, int]:
        return self.nm.n, self.nm.m

    def _start(self, name: str, weight: Parameter, kind: str, found: dict[str, Tensor] | None) -> Parameter:
        """The first logits of a weight."""
        if kind == "logits":
            assert found is not None
            return self._checked(name, weight, found.get(name), f"'{self.prior.file if self.prior else None}'")
        n, m = self._nm
        generator = torch.Generator().manual_seed(self._draw(name))
        table = candidates(n, m)
        shape = (len(table), weight.numel() // m)
        logits = torch.randn(shape, generator=generator).mul_(self.training.deviation).to(weight.device)
        if self.prior and self.prior.strength:
            if found is None:
                mask = self.nm.best(self.facing(name, self._whole(name)).abs())
            else:
                mask = self.facing(name, self._given(name, weight, found))
            alike = table.to(logits) @ to_groups(mask, m).T.to(logits) - n * n / m
            logits += alike * logits.std() * self.prior.strength
        return Parameter(logits)

    def _given(self, name: str, weight: Tensor, found: dict[str, Tensor]) -> Tensor:
        if name not in found or found[name].shape != weight.shape:
            raise InputError(f"the prior has no mask of the shape {tuple(weight.shape)} for '{name}'")
        return found[name].to(weight.device)

    def _checked(self, name: str, weight: Tensor, logits: Tensor | None, source: str) -> Parameter:
        n, m = self._nm
        shape = (len(candidates(n, m)), weight.numel() // m)
        if logits is None or tuple(logits.shape) != shape:
            raise InputError(
                f"{source} has no logits of shape {shape} for '{name}', which {self.nm.name} needs: "
                f"found {'none' if logits is None else tuple(logits.shape)}"
            )
        if logits.dtype != torch.float32:
            raise InputError(
                f"{source} has logits in {logits.dtype} for '{name}', float32 is expected: their updates are small"
            )
        return Parameter(logits.to(weight.device, copy=True))

    def _make_optimizer(self) -> None:
        self._drawn = {}
        if self.logits:
            self._companion.make(self.logits, self.weights(), self._upkeep.optimizers)

    def _sampling(self, name: str) -> tuple[float, float, float]:
        return self.annealing.at(self._drawn[name] / max(1, self._length - 1))

    def _draw(self, name: str) -> int:
        return zlib.crc32(f"{self.seed}/{self._drawn.get(name, 'start')}/{name}".encode())

    def _soft_mask(self, name: str, weight: Tensor) -> Tensor:
        """The part of the mask of this step that belongs to this process."""
        temperature, scale, _ = self._sampling(name)
        soft = gumbel_nm_mask(self.logits[name].detach(), *self._nm, scale, temperature, self._draw(name))
        return shards.local_part(self._as_weight(name, soft).to(weight.dtype), weight)

    def _as_weight(self, name: str, groups: Tensor) -> Tensor:
        shape = tuple(self.facing(name, self.weights()[name]).shape)
        return self.facing(name, from_groups(groups, shape)).contiguous()


def _check(pattern: NM) -> None:
    """Raises `InputError` for a pattern with too many candidates."""
    if type(pattern) is not NM:
        raise InputError(f'masks are learned for patterns "N:M", got "{pattern.name}"')
    count = math.comb(pattern.m, pattern.n)
    if count > MOST:
        each = count / pattern.m
        raise InputError(
            f"{pattern.name} has {count:,} candidates, {each:,.0f} logits per weight: with Adam that is "
            f"{16 * each:,.0f} bytes per weight; choose one with at most {MOST}, such as 1:M, 2:4, 2:8, 4:8 or 2:16"
        )


def _read(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """What a prior's file holds: "masks" or "logits", by parameter name."""
    if Path(path).suffix in (".ckpt", ".pt"):
        saved = checkpoints.read(path).get("callbacks", {}).get("Sparsify", {}).get("sparsifier", {})
        if "logits" not in saved:
            raise InputError(f"'{path}' holds no logits: give a checkpoint of GumbelNM, or a mask file")
        return "logits", saved["logits"]
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                return "logits", {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError):
        pass  # the reader of masks says what is wrong
    return "masks", masks.load(path)
