"""Nothing is left of the client before, whatever it wrote to; and models of many kinds can be shared."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from callbacks import FedDST, PruneFL, RigL, StaticMask
from sparsity import InputError, Targets
from sparsity.federated import IID, SCAFFOLD, Federation, FedLAW, Local, Outcome, Protocol, Running, simulate
from sparsity.federated.site import Site
from tests.federated.small import Model, Points, drops, model


def run(net: Any, method: Any = None, rounds: int = 3, data: Any = None, **settings: Any) -> Outcome:
    return simulate(
        net, data or Points(), method, Federation(5, 5, rounds, IID()), Protocol(Local(2)), Running(**settings), seed=1
    )


def seeded(kind: type[Model], **settings: Any) -> Model:
    torch.manual_seed(0)
    return kind(**settings)


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as Prodigy and schedule-free optimizers do, and goes on ever more slowly."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group["path"].add_(1.0)
            group["lr"] *= 0.99
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.add_(weight.grad, alpha=-group["lr"] / group["steps"] ** 0.5 / float(group["path"]) ** 0.1)


class Counted(Model):
    def configure_optimizers(self) -> Any:
        optimizer = Counting(self.parameters(), 0.1)
        optimizer.param_groups[0]["path"] = torch.ones(())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Lowest(Model):
    """Has a buffer that is infinite to begin with, and one that no checkpoint has, and writes to both."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.low: Tensor
        self.sum: Tensor
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("sum", torch.zeros(()), persistent=False)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.low.copy_(torch.minimum(self.low, batch[0].min()))
        self.sum += batch[0].mean()
        return super().training_step(batch) * (1 + 0.1 * self.low.abs() + 0.01 * self.sum)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/sum", self.sum)


@pytest.mark.parametrize("kind", [Counted, Lowest])
def test_nothing_is_left_of_the_client_before(kind: type[Model]) -> None:
    one, two = (run(seeded(kind, norm=False), workers=workers) for workers in (1, 2))
    assert torch.equal(one.state.values, two.state.values)
    assert [row["metrics"] for row in one.rows] == [row["metrics"] for row in two.rows]


def test_the_model_has_its_own_buffers_again() -> None:
    net = seeded(Lowest)
    outcome = run(net)
    assert isinstance(net, Lowest)
    assert float(net.low) == math.inf
    assert float(net.sum) == 0.0
    assert {row["metrics"]["val/sum"] for row in outcome.rows} == {0.0}


@pytest.mark.parametrize("hidden", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_a_causal_mask_is_no_reason_to_refuse_anybody(hidden: float) -> None:
    net = model()
    causal = torch.full((4, 4), hidden).triu(1)
    net.register_buffer("causal", causal)
    expected = causal.clone()
    outcome = simulate(net, Points(), None, Federation(1, 1, 2, IID()), Protocol(Local(1)), seed=1)
    assert [row["failures"] for row in outcome.rows] == [0, 0]
    assert torch.equal(causal, expected)


def test_complex_weights_are_refused() -> None:
    net = model()
    net.register_parameter("spectrum", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    with pytest.raises(InputError, match=r"\['spectrum'\] are complex"):
        run(net)


class Compiled(pl.LightningModule):
    def __init__(self, compiles: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
        self.net = torch.compile(net, backend="eager") if compiles else net

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("method", [lambda: None, lambda: StaticMask(0.5), lambda: FedDST(0.5, drops(1))])
def test_a_compiled_network_is_as_good_as_another(method: Any) -> None:
    one, two = (run(Compiled(compiles), method()) for compiles in (False, True))
    assert [row["failures"] for row in two.rows] == [0, 0, 0]
    assert torch.equal(one.state.mask, two.state.mask)
    torch.testing.assert_close(one.state.values, two.state.values)


class Two(Model):
    """Two layers of one shape, of which either may be pruned."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.other = nn.Linear(12, 12)


@pytest.mark.parametrize(("method", "data", "what"), [
    (lambda: StaticMask(0.5, targets=Targets(include=["other.weight"])), lambda: Points(), "order"),
    (lambda: StaticMask(0.5, targets=Targets(exclude=["last.weight"])), lambda: Points(), "masked"),
    (lambda: StaticMask(0.5, targets=Targets(include=["middle.weight"])), lambda: Points(48), "batch_size"),
])  # fmt: skip
def test_a_state_of_other_targets_or_batches_is_refused(method: Any, data: Any, what: str, tmp_path: Path) -> None:
    run(Two(), StaticMask(0.5, targets=Targets(include=["middle.weight"])), folder=tmp_path)
    with pytest.raises(InputError, match=f"'{what}'"):
        run(Two(), method(), data=data(), resume=tmp_path)


class Falling(Model):
    rounds = 6

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.rounds)]


class Slower(Falling):
    rounds = 7


def test_a_state_of_another_schedule_is_refused(tmp_path: Path) -> None:
    run(seeded(Falling), folder=tmp_path)
    assert run(seeded(Falling), resume=tmp_path).state.round == 3
    for net in (seeded(Slower), model()):
        with pytest.raises(InputError, match="schedule"):
            run(net, resume=tmp_path)


class Interrupted(Model):
    stops = False

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.stops:
            raise KeyboardInterrupt
        super().validation_step(batch, batch_idx)


def test_a_run_that_ended_while_it_validated_is_validated_when_it_goes_on(tmp_path: Path) -> None:
    net = seeded(Interrupted)
    federation, protocol = Federation(5, 5, 3, IID()), Protocol(Local(2))

    def stop(row: dict[str, Any]) -> None:
        net.stops = row["round"] == 1

    with pytest.raises(KeyboardInterrupt):
        simulate(net, Points(), None, federation, protocol, Running(folder=tmp_path), seed=1, on_round=stop)
    resumed, whole = run(seeded(Interrupted), resume=tmp_path), run(seeded(Interrupted))
    assert resumed.metrics == whole.metrics
    assert [row["accuracy"] for row in resumed.rows] == [row["accuracy"] for row in whole.rows]


class Late(pl.LightningModule):
    """Makes its layers in `setup`, as it would with a trainer."""

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        self.net = nn.Linear(6, 3)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_model_may_make_its_layers_in_setup() -> None:
    found = []
    for workers in (1, 2):
        torch.manual_seed(0)
        found.append(run(Late(), workers=workers))
    assert [row["failures"] for row in found[0].rows] == [0, 0, 0]
    assert torch.equal(found[0].state.values, found[1].state.values)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_masks_move_by_the_mean_gradient_of_so_many_batches(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(Model, norm=False)
    net.drop.p = 0.0
    method = FedDST(0.5, drops(1))
    batches, moves = list[Any](), list[tuple[dict[str, Tensor], Tensor, list[Any]]]()
    step, update = Model.training_step, method.sparsifier.update

    def training_step(self: Model, batch: Any) -> Tensor:
        batches.append(batch)
        return step(self, batch)

    def updated(clock: int) -> None:
        gradient = net.first.weight.grad
        assert gradient is not None
        moves.append(({n: each.clone() for n, each in net.state_dict().items()}, gradient.clone(), list(batches)))
        batches.clear()
        update(clock)

    monkeypatch.setattr(Model, "training_step", training_step)
    monkeypatch.setattr(method.sparsifier, "update", updated)
    federation = Federation(5, 1, 2, IID())
    simulate(net, Points(), method, federation, Protocol(Local(2, gradients=count)), seed=1)
    weights, found, taken = max(moves, key=lambda move: len(move[2]))
    assert len(taken) == min(count, 1 + 240 // 5 // 4), "its own batch and, of the others, an epoch at most"
    by_hand = seeded(Model, norm=False).double()
    by_hand.load_state_dict(weights)
    by_hand.eval()
    points, labels = torch.cat([batch[0] for batch in taken]), torch.cat([batch[1] for batch in taken])
    nn.functional.cross_entropy(by_hand(points.double()), labels).backward()  # type: ignore[no-untyped-call]  # torch's
    assert by_hand.first.weight.grad is not None
    torch.testing.assert_close(found, by_hand.first.weight.grad.float(), rtol=1e-4, atol=1e-6)


class Partly(Model):
    """Trains its last layer only; the others' gradients are large, and nobody's."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.last.parameters(), 0.1)


def test_what_no_optimizer_holds_neither_shortens_steps_nor_moves_masks() -> None:
    whole, frozen = seeded(Partly, norm=False), seeded(Partly, norm=False)
    for name, each in frozen.named_parameters():
        each.requires_grad_(name.startswith("last"))
    found = [
        simulate(net, Points(), None, Federation(5, 5, 2, IID()), Protocol(Local(2, clip=0.2)), seed=1)
        for net in (whole, frozen)
    ]
    torch.testing.assert_close(*(each.state.values for each in found))
    for method in (FedDST(0.5, drops(1)), PruneFL(0.5, drops(1)), RigL(0.5, drops(1))):
        first = type(method)(0.5, drops(1)).sparsifier
        Site(seeded(Partly, norm=False), first, 3, 1).close()
        run(seeded(Partly, norm=False), method)
        moved = [name for name, mask in method.sparsifier.masks.items() if not torch.equal(mask, first.masks[name])]
        assert moved in ([], ["last.weight"])


def test_learned_weights_of_clients_leave_what_is_frozen_alone() -> None:
    net = seeded(Model, norm=False)
    net.first.requires_grad_(False)
    before = net.first.weight.clone()
    simulate(net, Points(), None, Federation(5, 5, 3, IID()), Protocol(Local(1), FedLAW(0.1, 20)), seed=1)
    assert torch.equal(net.first.weight, before)


def test_learned_weights_of_clients_do_not_depend_on_the_number_of_workers() -> None:
    found = [
        simulate(
            seeded(Lowest, norm=False), Points(), None, Federation(5, 5, 3, IID()),
            Protocol(Local(2), FedLAW(0.1, 5)), Running(workers), seed=1,
        ).state.values
        for workers in (1, 2)
    ]  # fmt: skip
    assert torch.equal(*found)


class Scheduled(Model):
    """Its schedule is what a test wants."""

    made: Any = None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        found = type(self).made(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": found} if isinstance(found, dict) else ([optimizer], found)


def test_a_schedule_may_step_every_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduled, "made", lambda opt: {"scheduler": StepLR(opt, 1, 0.1), "frequency": 2})
    site = Site(seeded(Scheduled), None, 6, 1)
    rates = []
    for number in range(6):
        site.reach(number)
        rates.append(site.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize(("made", "message"), [
    (lambda optimizer: [StepLR(optimizer, 1), StepLR(optimizer, 2)], "configures 2: chain them"),
    (lambda optimizer: {"scheduler": StepLR(optimizer, 1), "interval": "step"}, "interval='step' of the schedule"),
])  # fmt: skip
def test_schedules_that_would_be_ignored_are_refused(made: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduled, "made", made)
    with pytest.raises(InputError, match=message):
        run(seeded(Scheduled))


class Stepping(Model):
    def optimizer_step(self, *args: Any, **settings: Any) -> None:
        raise AssertionError


class Noting(Model):
    """Has hooks for batches, and one that needs a trainer."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]

    def on_train_epoch_end(self) -> None:
        raise AssertionError


class Doubled(Points):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]


def test_hooks_that_change_steps_are_refused_and_others_named() -> None:
    with pytest.raises(InputError, match="would leave out Stepping's optimizer_step"):
        run(seeded(Stepping))
    with pytest.warns(UserWarning, match="Noting's on_train_epoch_end will not be called"):
        found = run(seeded(Noting, norm=False))
    by_data = run(seeded(Model, norm=False), data=Doubled())
    assert torch.equal(found.state.values, by_data.state.values), "the model's hooks for batches are called"
    assert found.metrics == by_data.metrics


class Configured(Model):
    """Makes its last layer when Lightning asks for it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.made = False

    def configure_model(self) -> None:
        if not self.made:
            self.last, self.made = nn.Linear(12, 3), True


def test_layers_that_are_made_late_are_on_the_device_too() -> None:
    net = seeded(Configured, norm=False)
    Site(net, None, 1, 1, torch.device("meta"))
    assert {each.device.type for each in net.parameters()} == {"meta"}


def test_a_model_is_configured_though_it_has_parameters() -> None:
    net = seeded(Configured)
    run(net)
    assert isinstance(net, Configured)
    assert net.made


def test_the_weight_of_controls_that_a_client_forgets_leaves_the_servers() -> None:
    method = FedDST(0.5, drops(1))
    net = seeded(Model, norm=False)
    outcome = simulate(net, Points(), method, Federation(8, 3, 8, IID()), Protocol(Local(2), SCAFFOLD()), seed=1)
    controls = outcome.state.controls
    mean = sum(each.double() for client, each in controls.items() if client >= 0) / 8
    torch.testing.assert_close(controls[-1], mean, rtol=1e-5, atol=1e-7)


class Pausing(Scheduled):
    made = staticmethod(lambda opt: [LambdaLR(opt, lambda r: float(r < 3))])


def test_controls_stay_where_no_step_was_taken() -> None:
    norms = list[float]()
    for rounds in (3, 4):
        federation, protocol = Federation(5, 5, rounds, IID()), Protocol(Local(2), SCAFFOLD())
        outcome = simulate(seeded(Pausing, norm=False), Points(), None, federation, protocol, seed=1)
        norms.append(float(outcome.state.controls[-1].norm()))
    assert norms[0] == norms[1] > 0
