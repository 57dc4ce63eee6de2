"""Site: where clients train, one after the other, in one model for the life of a process."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sparsity.errors import InputError
from sparsity.federated.chance import seed_all
from sparsity.federated.layout import Layout
from sparsity.federated.log import Log, batch_size
from sparsity.federated.source import defines
from sparsity.schedules import Horizon
from sparsity.sensitivity import Sensitivity
from sparsity.sparsifier import Sparsifier
from sparsity.targets import clean

STEPS = ("backward", "configure_gradient_clipping", "lr_scheduler_step", "optimizer_step", "optimizer_zero_grad")
HOOKS = (
    "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "on_fit_start",
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end",
    "on_train_end", "on_fit_end",
)  # fmt: skip
PLAIN = (bool, int, float, str, tuple, type(None))  # what nobody can write to


class Site:
    """A Lightning module with its optimizer and its method, for many clients in turn.

    The module's `training_step` and `configure_optimizers` are used without a trainer; what they log is collected. A
    schedule counts rounds: all clients of a round have the same learning rate. The method's steps are rounds too.
    """

    def __init__(
        self, model: Any, sparsifier: Sparsifier | None, rounds: int, seed: int, device: torch.device | None = None
    ) -> None:  # fmt: skip
        _check(model)
        model.to(device)
        self.model, self.sparsifier = model, sparsifier
        self.rounds, self.seed = rounds, seed
        self._modes = {module: module.training for module in model.modules()}
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        scouts = isinstance(sparsifier, Sensitivity)
        self._begun = {name: value.detach().clone() for name, value in model.state_dict().items() if scouts}
        self.optimizer, self._schedule, self._frequency = _optimizer(model)
        self._groups = self._settings()
        self.settings = {str(place): _numbers_in(group) for place, group in enumerate(self.optimizer.param_groups)}
        self.stepped = [each for group in self.optimizer.param_groups for each in group["params"]]
        self._scheduled = 0
        self.schedule = _described(self._schedule, self._frequency) if self._schedule else None
        if sparsifier is not None:
            self.attach(sparsifier)
        self.layout = Layout(model, sparsifier.masks if sparsifier else _matrices(model), self.stepped)
        shared = {id(each) for each in self.layout.tensors.values()}
        self._own = [(buffer, value) for buffer, value in buffers if id(buffer) not in shared]
        self._everything = torch.ones(self.layout.masked, dtype=torch.bool)
        self._parameters = list({id(each): each for each in (*model.parameters(), *self.stepped)}.values())
        self.log = Log(model)

    @property
    def mask(self) -> Tensor:
        """The present masks as a vector; all True where nothing prunes."""
        if self.sparsifier is None:
            return self._everything
        return self.layout.mask(self.sparsifier.masks)

    def attach(self, sparsifier: Sparsifier) -> None:
        """Prunes by this method from now on."""
        self.sparsifier = sparsifier
        sparsifier.detach()
        sparsifier.attach(self.model, self.optimizer, horizon=Horizon(self.rounds, 1), seed=self.seed)

    def reach(self, number: int) -> None:
        """A round begins: the schedule has taken a step for each round before, or for every few, its `frequency`."""
        while self._schedule is not None and self._scheduled < number // self._frequency:
            try:
                self._step_schedule()
            except Exception as error:
                raise InputError(
                    f"{type(self._schedule).__name__} cannot take its step for round {number}: {error}. In a "
                    "federation schedules count rounds"
                ) from error

    def begin(self) -> None:
        """A client begins: nothing is left of the one before."""
        if self.sparsifier is not None and self.sparsifier.scaling:
            self.sparsifier.scaling.whole()
        self._restore_groups()
        self.optimizer.state.clear()
        self.clear()
        self._restore_own()
        self._restore_modes()

    def clear(self) -> None:
        """No parameter has a gradient, those that the optimizer does not hold included."""
        for parameter in self._parameters:
            parameter.grad = None

    def loss(self, batch: Any, number: int) -> Tensor | None:
        """The loss of `training_step`, None where it skips the batch."""
        found = _call(self.model.training_step, batch, number)
        loss: Tensor | None = found["loss"] if isinstance(found, dict) else found
        return loss

    @torch.no_grad()
    def evaluate(self, loaders: list[Iterator[Any]], stage: str) -> dict[str, float]:
        """What `validation_step` or `test_step`, and the hooks around them, log over the batches of all loaders."""
        seed_all(self.seed)
        self._restore_own()
        name = "test" if stage == "test" else "validation"
        self.model.eval()
        with self.log:
            getattr(self.model, f"on_{name}_epoch_start")()
            for place, batches in enumerate(loaders):
                self.log.loader = place if len(loaders) > 1 else None
                for number, batch in enumerate(batches):
                    self.log.size = batch_size(batch)
                    _call(getattr(self.model, f"{name}_step"), batch, number, place)
                if len(loaders) > 1:
                    self.log.compute()
            self.log.loader = None
            getattr(self.model, f"on_{name}_epoch_end")()
        self._restore_modes()
        return self.log.results()

    def restart(self) -> None:
        """The model as it came, before anything was pruned; where there are scouts, who need it."""
        self.model.load_state_dict(self._begun)

    def close(self) -> None:
        """The model is the user's again: its own `log`, its modes, no gradients; and so is the optimizer."""
        self.begin()
        if self.sparsifier is not None and self.sparsifier.scaling:
            self.sparsifier.scaling.leave()
        self.log.close()

    def _settings(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What the optimizer's groups say beside their parameters: numbers and texts, and what can be written to."""
        found = []
        for group in self.optimizer.param_groups:
            plain = {name: value for name, value in group.items() if isinstance(value, PLAIN)}
            others = group.keys() - plain.keys() - {"params"}
            found.append((plain, {name: deepcopy(group[name]) for name in others}))
        return found

    def _restore_groups(self) -> None:
        """Some optimizers count in their groups; schedules set rates there."""
        for group, (plain, others) in zip(self.optimizer.param_groups, self._groups, strict=True):
            for name in group.keys() - plain.keys() - others.keys() - {"params"}:
                del group[name]
            group.update(plain)
            if others:
                group.update(deepcopy(others))

    @torch.no_grad()
    def _restore_own(self) -> None:
        """Buffers that clients do not share are as they were in the beginning."""
        for buffer, value in self._own:
            buffer.copy_(value)

    def _restore_modes(self) -> None:
        for module, training in self._modes.items():
            if module.training != training:  # modules are slow to set
                module.training = training

    def _step_schedule(self) -> None:
        # A schedule warns where no step of its optimizer came first, and those of clients are steps of fresh ones.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's own mark
        self._restore_groups()
        self._schedule.step()
        self._scheduled += 1
        self._groups = self._settings()


def _check(model: Any) -> None:
    name = type(model).__name__
    if not getattr(model, "automatic_optimization", True):
        raise InputError(f"{name} optimizes by hand: clients need automatic_optimization")
    own = [hook for hook in STEPS if defines(model, hook)]
    if own:
        raise InputError(
            f"clients take steps of their own, which would leave out {name}'s {', '.join(own)}: do without"
        )
    silent = [hook for hook in HOOKS if defines(model, hook)]
    if silent:
        warnings.warn(f"clients have no trainer: {name}'s {', '.join(silent)} will not be called", stacklevel=2)
    if defines(model, "setup"):
        model.setup("fit")
    if defines(model, "configure_model"):
        model.configure_model()
    if next(model.parameters(), None) is None:
        raise InputError(f"{name} has no parameters: there is nothing to train")


def _matrices(model: Any) -> list[str]:
    """What is sent as weights where nothing prunes: of the rest precision does not matter."""
    return [clean(name) for name, weight in model.named_parameters() if weight.ndim > 1]


def _optimizer(model: Any) -> tuple[Optimizer, Any, int]:
    """What `configure_optimizers` gives: an optimizer, a schedule or None, and for how many rounds it takes a step."""
    try:
        found = model.configure_optimizers()
    except RuntimeError as error:
        raise InputError(f"configure_optimizers has to do without a trainer in a federation: {error}") from error
    schedules: list[Any] = []
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list | tuple):
        found, schedules = found
    if isinstance(found, list | tuple):
        if len(found) != 1:
            raise InputError(f"clients train with one optimizer, {type(model).__name__} configures {len(found)}")
        [found] = found
    if isinstance(found, dict):
        schedules = [found["lr_scheduler"]] if "lr_scheduler" in found else schedules
        found = found["optimizer"]
    if not isinstance(found, Optimizer):
        raise InputError(f"configure_optimizers of {type(model).__name__} was to give an optimizer, got {found!r}")
    if len(schedules) > 1:
        raise InputError(
            f"clients have one schedule, {type(model).__name__} configures {len(schedules)}: chain them, by "
            "SequentialLR or ChainedScheduler"
        )
    [schedule] = schedules or [None]
    about = schedule if isinstance(schedule, dict) else {"scheduler": schedule}
    if isinstance(about["scheduler"], ReduceLROnPlateau):
        raise InputError("ReduceLROnPlateau waits for a metric, which no round gives it: take a schedule of rounds")
    if about.get("interval", "epoch") != "epoch":
        raise InputError(
            f"interval={about['interval']!r} of the schedule counts steps of one training, and clients begin anew in "
            'each round: leave it out, or take "epoch", and let the schedule count rounds'
        )
    return found, about["scheduler"], about.get("frequency", 1)


def _described(schedule: Any, frequency: int) -> dict[str, Any]:
    """A schedule's class and the numbers that it begins with, some of which change with its steps."""
    numbers = {n: value for n, value in vars(schedule).items() if isinstance(value, int | float) and n[0] != "_"}
    return {"class": type(schedule).__name__, "frequency": frequency, **numbers}


def _numbers_in(group: dict[str, Any]) -> dict[str, Any]:
    """What a group of an optimizer says beside its parameters, rates that are tensors as numbers."""
    found = {name: value for name, value in group.items() if name != "params"}
    return {n: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for n, v in found.items()}


def _call(step: Callable[..., Any], batch: Any, *numbers: int) -> Any:
    """A step of a Lightning module, which may or may not take the numbers of the batch and of its loader."""
    return step(batch, *numbers[: _numbers_of(step)])


def _numbers_of(step: Callable[..., Any]) -> int:
    function = getattr(step, "__func__", step)
    if function not in _NUMBERED:
        parameters = inspect.signature(step).parameters
        loader = "dataloader_idx" in parameters
        _NUMBERED[function] = 2 if loader else int("batch_idx" in parameters or len(parameters) > 1)
    return _NUMBERED[function]


_NUMBERED: dict[Any, int] = {}
