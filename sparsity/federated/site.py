"""Site: where clients train, one after the other, in one model for the life of a process."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsity.errors import InputError
from sparsity.federated.layout import Layout
from sparsity.schedules import Horizon
from sparsity.sensitivity import Sensitivity
from sparsity.sparsifier import Sparsifier


class Source:
    """A Lightning data module's training samples by index, and its validation and test batches.

    Batches are made as its own loader makes them, of its size and by its collate function, and go through its hooks
    for the transfer to a device.
    """

    def __init__(self, data: Any, device: torch.device) -> None:
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        self.data, self.device, self.dataset = data, device, loader.dataset
        if loader.batch_size is None or not hasattr(self.dataset, "__getitem__"):
            raise InputError(
                f"clients hold samples by index: {type(data).__name__} has to have a train_dataloader of a map-style "
                f"dataset and a batch_size, got {type(self.dataset).__name__} in batches of {loader.batch_size}"
            )
        self.batch_size, self._collate = loader.batch_size, loader.collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, indices: Tensor, generator: torch.Generator | None = None) -> Iterator[Any]:
        """The samples of these indices once, in an order that the generator draws; in theirs without one."""
        order = indices if generator is None else indices[torch.randperm(len(indices), generator=generator)]
        for part in torch.split(order, self.batch_size):
            yield self._moved(self._collate(self._samples(part.tolist())))

    def evaluation(self, stage: str) -> Iterator[Any]:
        """The batches of the "validation" or the "test" split."""
        self.data.setup("test" if stage == "test" else "fit")
        for batch in self.data.test_dataloader() if stage == "test" else self.data.val_dataloader():
            yield self._moved(batch)

    def _samples(self, places: list[int]) -> Any:
        at_once = getattr(self.dataset, "__getitems__", None)
        return at_once(places) if at_once else [self.dataset[place] for place in places]

    def _moved(self, batch: Any) -> Any:
        if self.device.type != "cpu":
            batch = self.data.transfer_batch_to_device(batch, self.device, 0)
        return self.data.on_after_batch_transfer(self.data.on_before_batch_transfer(batch, 0), 0)


class Site:
    """A Lightning module with its optimizer and its method, for many clients in turn.

    The module's `training_step` and `configure_optimizers` are used without a trainer; what they log is collected. A
    schedule counts rounds: all clients of a round have the same learning rate. The method's steps are rounds too.
    """

    def __init__(self, model: Any, sparsifier: Sparsifier | None, rounds: int, seed: int) -> None:
        if not getattr(model, "automatic_optimization", True):
            raise InputError(f"{type(model).__name__} optimizes by hand: clients need automatic_optimization")
        self.model, self.sparsifier = model, sparsifier
        self.log = Log(model)
        scouts = isinstance(sparsifier, Sensitivity)
        self._begun = {name: value.detach().clone() for name, value in model.state_dict().items() if scouts}
        self.optimizer, self._schedule = _optimizer(model)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._scheduled = 0
        self.rounds, self.seed = rounds, seed
        if sparsifier is not None:
            self.attach(sparsifier)
        self.layout = Layout(model, sparsifier.masks if sparsifier else ())

    @property
    def mask(self) -> Tensor:
        """The present masks as a vector."""
        return self.layout.mask(self.sparsifier.masks if self.sparsifier else {})

    def attach(self, sparsifier: Sparsifier) -> None:
        """Prunes by this method from now on."""
        self.sparsifier = sparsifier
        sparsifier.detach()
        sparsifier.attach(self.model, self.optimizer, horizon=Horizon(self.rounds, 1), seed=self.seed)

    def begin(self, number: int) -> None:
        """A client begins in this round: its optimizer is fresh, at the learning rate of the round."""
        while self._scheduled < number:
            self._step_schedule()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.optimizer.state.clear()
        self.optimizer.zero_grad()
        self.model.train()

    def loss(self, batch: Any, number: int) -> Tensor | None:
        """The loss of `training_step`, None where it skips the batch."""
        found = _call(self.model.training_step, batch, number)
        loss: Tensor | None = found["loss"] if isinstance(found, dict) else found
        return loss

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Any], stage: str) -> dict[str, float]:
        """What `validation_step` or `test_step` log, over all batches."""
        self.model.eval()
        step = self.model.test_step if stage == "test" else self.model.validation_step
        with self.log:
            for number, batch in enumerate(batches):
                self.log.size = _size(batch)
                _call(step, batch, number)
        self.model.train()
        return self.log.means()

    def restart(self) -> None:
        """The model as it came, before anything was pruned; where there are scouts, who need it."""
        self.model.load_state_dict(self._begun)

    def close(self) -> None:
        """Gives the model its own `log` back."""
        self.log.close()

    def _step_schedule(self) -> None:
        self._scheduled += 1
        if self._schedule is None:
            return
        # A schedule warns where no step of its optimizer came first, and those of clients are steps of fresh ones.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's own mark
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self._schedule.step()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]


class Log:
    """Takes the place of a module's `log`, which needs a trainer, and averages what it is given by batch size."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.size = model, 1
        self._open = False
        self._sums: dict[str, tuple[float, int]] = {}
        self._metrics: dict[str, Any] = {}
        model.log, model.log_dict = self.note, self._note_all  # type: ignore[assignment]  # a Lightning module's

    def __enter__(self) -> None:
        self._open, self._sums, self._metrics = True, {}, {}

    def __exit__(self, *_: object) -> None:
        self._open = False

    def note(self, name: str, value: Any, *_: Any, **settings: Any) -> None:
        """What `log` does; outside of an evaluation nothing is kept."""
        if not self._open:
            if hasattr(value, "reset"):
                value.reset()
        elif hasattr(value, "compute"):
            self._metrics[name] = value
        else:
            size = settings.get("batch_size") or self.size
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value) * size, count + size)

    def means(self) -> dict[str, float]:
        """All that has been logged, by name."""
        found = {name: total / count for name, (total, count) in self._sums.items()}
        for name, metric in self._metrics.items():
            found[name] = float(metric.compute())
            metric.reset()
        return found

    def close(self) -> None:
        """The module's own `log` is back."""
        del self.model.log, self.model.log_dict

    def _note_all(self, values: Any, *positions: Any, **settings: Any) -> None:
        for name, value in values.items():
            self.note(name, value, *positions, **settings)


def _optimizer(model: Any) -> tuple[Optimizer, Any]:
    """What `configure_optimizers` gives: one optimizer, and a schedule or None."""
    found = model.configure_optimizers()
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
    schedule = schedules[0] if schedules else None
    return found, schedule["scheduler"] if isinstance(schedule, dict) else schedule


def _call(step: Any, batch: Any, number: int) -> Any:
    """A step of a Lightning module, which may or may not take the number of the batch."""
    return step(batch, number) if "batch_idx" in inspect.signature(step).parameters else step(batch)


def _size(batch: Any) -> int:
    first = next(iter(batch.values() if isinstance(batch, dict) else batch), None) if not _is(batch) else batch
    return len(first) if isinstance(first, Tensor) and first.ndim else 1


def _is(batch: Any) -> bool:
    return isinstance(batch, Tensor)
