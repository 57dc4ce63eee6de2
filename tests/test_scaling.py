"""`scaled` gives a sparse network the signals and the steps that the dense one has."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from callbacks import FLASH, GMP, LAMP, SET, ConstantMask, GraNet, OneShot, RigL, SparseMomentum, Sparsify, StaticMask
from sparsity import Horizon, InputError, Sparsifier, Targets
from sparsity.compact import Compact
from sparsity.distributions import ERK, Global, Uniform
from sparsity.masks import Masks
from sparsity.scaling import Scaling
from sparsity.schedules import ConstantDrop
from sparsity.scores import Random
from tests.nets import Batches, task, trainer

Make = Callable[..., torch.optim.Optimizer]
Gradients = dict[str, torch.Tensor]
MAKES: dict[str, Make] = {
    "SGD": lambda weights: torch.optim.SGD(weights, 1e-2), "Adam": lambda weights: torch.optim.Adam(weights, 1e-6)
}  # fmt: skip


def chain(width: int = 400, depth: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=width**-0.5)
    return nn.Sequential(*layers)


def fixed(sparsity: float = 0.8, distribution: Any = None, **more: Any) -> Sparsifier:
    return Sparsifier(sparsity, Random(), distribution or Uniform(), **more)


def spread(net: nn.Module) -> float:
    torch.manual_seed(1)
    with torch.no_grad():
        return float(net(torch.randn(200, 400)).std())


def test_signals_stay_as_large_as_in_the_dense_network() -> None:
    dense, plain, ours = chain(), chain(), chain()
    fixed().attach(plain)
    fixed().scaled("weights").attach(ours)
    assert spread(dense) == pytest.approx(1.0, abs=0.1)
    assert spread(plain) == pytest.approx(0.2**3, rel=0.15)  # six layers, each of √0.2
    assert spread(ours) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(
    "method",
    [
        lambda: fixed(0.7, ERK()), lambda: fixed(0.7, Global()), lambda: fixed(0.5, pattern="2:4"),
        lambda: fixed(0.5, ERK(), pattern="channel"), lambda: RigL(0.7).sparsifier, lambda: GraNet(0.9).sparsifier,
    ],
    ids=["ERK", "global", "2:4", "channel", "RigL", "GraNet"],
)  # fmt: skip
def test_each_layer_is_divided_by_the_root_of_what_its_mask_keeps(method: Callable[[], Sparsifier]) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(200, 12))
    before, optimizer = copy.deepcopy(net.state_dict()), torch.optim.SGD(net.parameters(), 0.1)
    sparsifier = method().scaled()
    sparsifier.attach(net, optimizer, horizon=Horizon(1000, 10))
    assert set(sparsifier.masks) == {"0.weight", "2.weight"}
    for name, value in net.state_dict().items():
        mask = sparsifier.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        torch.testing.assert_close(value, before[name] * mask / mask.double().mean().sqrt())


def test_weights_are_scaled_once() -> None:
    net = chain(20, 2)
    sparsifier = fixed().scaled()
    sparsifier.attach(net)
    before = copy.deepcopy(net.state_dict())
    state = sparsifier.state_dict()
    sparsifier.attach(net)  # trained further
    sparsifier.detach()
    sparsifier.load_state_dict(state)
    sparsifier.attach(net)  # resumed
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    fresh = chain(20, 2)
    sparsifier.detach()
    sparsifier.attach(fresh)  # another network
    assert torch.equal(fresh.state_dict()["0.weight"], before["0.weight"])


def step(make: Make, sparsity: float, what: str | None) -> float:
    """How far one step moves the outputs of a chain, as a root of the mean square."""
    net = chain()
    optimizer, sparsifier = make(net.parameters()), fixed(sparsity)
    if what:
        sparsifier.scaled(what)
    sparsifier.attach(net, optimizer)
    torch.manual_seed(2)
    inputs, wanted = torch.randn(100, 400), torch.randn(100, 400)
    before = net(inputs)
    (before - wanted).square().mean().backward()
    sparsifier.update(0)
    optimizer.step()
    sparsifier.apply()
    with torch.no_grad():
        return float((net(inputs) - before).square().mean().sqrt())


@pytest.mark.parametrize("name", MAKES)
def test_a_step_moves_outputs_as_far_as_in_the_dense_network(name: str) -> None:
    dense = step(MAKES[name], 0.0, None)
    assert step(MAKES[name], 0.8, "weights") == pytest.approx(0.2 * dense, rel=0.15)
    assert step(MAKES[name], 0.8, "both") == pytest.approx(dense, rel=0.15)


class Spy(torch.optim.SGD):
    """Notes the groups that its steps see, and counts in them, as some optimizers do."""

    seen: list[list[dict[str, Any]]]

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.seen.append([dict(group) for group in self.param_groups])
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        if len(self.seen) == self.fails_at:
            raise RuntimeError("no step")
        return super().step()

    fails_at = 0


def stepped(optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, net: nn.Module, number: int) -> Gradients:
    """One step; its gradients, as they were before they were masked."""
    net(torch.randn(5, 40)).square().mean().backward()
    found = gradients(net)
    sparsifier.update(number)
    optimizer.step()
    sparsifier.apply()
    optimizer.zero_grad()
    return found


def gradients(net: nn.Module) -> Gradients:
    return {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}


def divided(rate: float, net: nn.Module, masks: Masks, found: Gradients) -> dict[int, float]:
    """The rates of weights by their ids, of masks that move."""
    rates = {id(weight): rate for weight in net.parameters()}
    for name, weight in net.named_parameters():
        if name in masks:
            gradient = found.get(name, torch.zeros_like(weight)).double()
            kept, all_ = float(gradient[masks[name]].norm() ** 2), float(gradient.norm() ** 2)
            rates[id(weight)] = rate / max(kept / all_ if all_ else 1.0, float(masks[name].double().mean()))
    return rates


def test_groups_are_parted_for_a_step_and_whole_again() -> None:
    net = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 10))
    named = [(name, weight) for name, weight in net.named_parameters() if name != "2.bias"]
    optimizer = Spy(named, 0.1, momentum=0.9, weight_decay=0.01)
    optimizer.seen = []
    optimizer.add_param_group({"params": [("2.bias", net[2].bias)], "lr": 0.5})
    sparsifier = fixed().scaled()
    sparsifier.attach(net, optimizer)
    groups = optimizer.param_groups
    before = [{**group, "params": list(group["params"])} for group in groups]
    stepped(optimizer, sparsifier, net, 0)
    assert optimizer.param_groups is groups
    assert [{**group, "steps": 1} for group in before] == groups
    found = {name: group for group in optimizer.seen[0] for name in group["param_names"]}
    assert {n: (round(g["lr"], 9), round(g["weight_decay"], 9), g["momentum"]) for n, g in found.items()} == {
        "0.weight": (0.5, 0.002, 0.9), "0.bias": (0.1, 0.01, 0.9), "1.weight": (0.1, 0.01, 0.9),
        "1.bias": (0.1, 0.01, 0.9), "2.weight": (0.5, 0.002, 0.9), "2.bias": (0.5, 0.01, 0.9),
    }  # fmt: skip
    for name, weight in net.named_parameters():
        assert found[name]["params"][found[name]["param_names"].index(name)] is weight


def test_a_step_that_fails_leaves_the_next_one_right() -> None:
    net = nn.Linear(40, 30)
    optimizer = Spy(net.parameters(), 0.1)
    optimizer.seen, optimizer.fails_at = [], 1
    sparsifier = fixed().scaled()
    sparsifier.attach(net, optimizer)
    with pytest.raises(RuntimeError, match="no step"):
        stepped(optimizer, sparsifier, net, 0)
    stepped(optimizer, sparsifier, net, 1)
    assert [sorted(group["lr"] for group in groups) for groups in optimizer.seen] == [[0.1, 0.5]] * 2
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    optimizer.fails_at = 3
    with pytest.raises(RuntimeError, match="no step"):
        stepped(optimizer, sparsifier, net, 2)
    sparsifier.detach()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


def test_a_schedule_after_a_failed_step_sets_the_rate_that_was_asked_for() -> None:
    net = nn.Linear(40, 30)
    optimizer = Spy(net.parameters(), 0.1)
    optimizer.seen, optimizer.fails_at = [], 1
    sparsifier = fixed().scaled()
    sparsifier.attach(net, optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.raises(RuntimeError, match="no step"):
        stepped(optimizer, sparsifier, net, 0)
    assert sparsifier.scaling
    sparsifier.scaling.whole()
    schedule.step()
    stepped(optimizer, sparsifier, net, 1)
    assert sorted(group["lr"] for group in optimizer.seen[-1]) == pytest.approx([0.05, 0.25])


class Noting(torch.optim.Optimizer):
    """Plain steps, after each of which something is noted in the groups."""

    def __init__(self, weights: Any, note: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(weights, {"lr": 0.1})
        self.note = note

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(weight.grad, alpha=-group["lr"])
            self.note(group)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (lambda group: group.update(path=group.get("path", 0.0) + group["lr"]), "keeps 'path' by groups"),
        (lambda group: group.update(lr=group["lr"] / 2), "sets rates itself"),
        (lambda group: group.update(steps=group.get("steps", 0) + 1), None),
    ],
    ids=["averages", "falls", "counts"],
)
def test_optimizers_with_numbers_of_their_own(note: Callable[[dict[str, Any]], Any], message: str | None) -> None:
    net = nn.Linear(40, 30)
    optimizer, sparsifier = Noting(net.parameters(), note), fixed().scaled()
    sparsifier.attach(net, optimizer)
    if message:
        with pytest.raises(InputError, match=message):
            stepped(optimizer, sparsifier, net, 0)
        return
    for number in range(3):
        stepped(optimizer, sparsifier, net, number)
    assert [group["steps"] for group in optimizer.param_groups] == [3]


@pytest.mark.parametrize("moved", [False, True])
def test_networks_that_have_begun_are_not_scaled_again(moved: bool) -> None:
    net = chain(20, 2)
    fixed().scaled().attach(net, seed=0)
    before = copy.deepcopy(net.state_dict())
    fixed().scaled().attach(net, seed=int(moved))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name] * (value != 0))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "OneCycleLR": lambda each: torch.optim.lr_scheduler.OneCycleLR(each, 0.1, 10),
    "CyclicLR": lambda each: torch.optim.lr_scheduler.CyclicLR(each, 0.01, 0.1),
    "CosineAnnealingLR": lambda each: torch.optim.lr_scheduler.CosineAnnealingLR(each, 10, eta_min=0.05),
    "LambdaLR": lambda each: torch.optim.lr_scheduler.LambdaLR(each, [lambda step: 1 / (step + 1)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_follow_any_schedule(name: str) -> None:
    net = nn.Linear(40, 30)
    optimizer = Spy(net.parameters(), 0.1, momentum=0.9)
    optimizer.seen = []
    sparsifier = fixed().scaled()
    sparsifier.attach(net, optimizer)
    schedule = SCHEDULES[name](optimizer)
    asked = []
    for number in range(6):
        asked.append(optimizer.param_groups[0]["lr"])
        stepped(optimizer, sparsifier, net, number)
        schedule.step()
    assert len(set(asked)) > 3
    for rate, groups in zip(asked, optimizer.seen, strict=True):
        assert sorted(group["lr"] for group in groups) == pytest.approx([rate, rate / 0.2])


@pytest.mark.parametrize("method", [SparseMomentum, RigL, SET])
def test_rates_follow_masks_that_move(method: Callable[..., Sparsify]) -> None:
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    optimizer = Spy(net.parameters(), 0.1, momentum=0.9)
    optimizer.seen = []
    sparsifier = method(0.8, ConstantDrop(0.5, 2, 1.0)).scaled().sparsifier
    sparsifier.attach(net, optimizer, horizon=Horizon(10, 5))
    above = 0
    for number in range(9):
        before = sparsifier.masks
        found = stepped(optimizer, sparsifier, net, number)
        for name, mask in sparsifier.masks.items() if method is RigL else ():
            found[name][mask & ~before[name]] = 0.0  # by these no weight takes its first step
        rates = {id(weight): group["lr"] for group in optimizer.seen[-1] for weight in group["params"]}
        assert rates == pytest.approx(divided(0.1, net, sparsifier.masks, found))
        above += sum(
            rates[id(weight)] < 0.09 / float(sparsifier.masks[name].double().mean())
            for name, weight in sparsifier.weights().items()
        )
    assert above > 3  # gradients decide, not only densities


def test_the_loss_falls_as_the_dense_network_would_let_it() -> None:
    """To first order, in plain SGD: by the rate times the squares of all gradients, of pruned weights, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 200), nn.Tanh(), nn.Linear(200, 10)).double()
    x, y = torch.randn(50, 40, dtype=torch.double), torch.randn(50, 10, dtype=torch.double)
    rate = 1e-5
    optimizer = torch.optim.SGD(net.parameters(), rate)
    sparsifier = RigL(0.7, ConstantDrop(0.5, 1, 1.0)).scaled().sparsifier
    sparsifier.attach(net, optimizer, horizon=Horizon(6, 3))

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(net(x), y)

    for number in range(6):
        loss().backward()  # type: ignore[no-untyped-call]  # torch's
        sparsifier.update(number)
        optimizer.step()
        sparsifier.apply()
        optimizer.zero_grad()
    before = loss()
    before.backward()  # type: ignore[no-untyped-call]  # torch's
    all_ = sum(float(each.square().sum()) for each in gradients(net).values())
    sparsifier.update(6)
    assert sparsifier.scaling is not None
    assert min(sparsifier.scaling.kept.values()) > 0.35
    optimizer.step()
    assert before.item() - loss().item() == pytest.approx(rate * all_, rel=0.01)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_that_say_nothing_leave_the_rate_as_it_is(value: float) -> None:
    net = nn.Linear(40, 30)
    optimizer = Spy(net.parameters(), 0.1)
    optimizer.seen = []
    sparsifier = RigL(0.8, ConstantDrop(0.5, 2, 1.0)).scaled().sparsifier
    sparsifier.attach(net, optimizer, horizon=Horizon(100, 5))
    for number, full in enumerate((1.0, value)):
        net.weight.grad = torch.full_like(net.weight, 1.0)
        net.weight.grad[~sparsifier.masks["weight"]] = full
        net.weight.grad *= 1.0 if full else 0.0
        sparsifier.update(number)
        optimizer.step()
    first, second = ({round(group["lr"], 6) for group in groups} for groups in optimizer.seen)
    assert first == {0.1, 0.5}
    assert second == {0.1}


@pytest.mark.parametrize("method", [RigL, SparseMomentum])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_of_one_backward_pass_step_as_one(order: tuple[int, int], method: Callable[..., Any]) -> None:
    nets, found = [], []
    for parts in (1, 2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
        held = [net.parameters()] if parts == 1 else [net[2 * place].parameters() for place in order]
        optimizers = [torch.optim.SGD(each, 0.1, momentum=0.9) for each in held]
        sparsifier = method(0.8, ConstantDrop(0.5, 100, 1.0)).scaled().sparsifier
        sparsifier.attach(net, *optimizers, horizon=Horizon(500, 5))
        for number in range(4):
            torch.manual_seed(number)
            net(torch.randn(5, 40)).square().mean().backward()
            for optimizer in optimizers:
                sparsifier.update(number, optimizer)
                optimizer.step()
                sparsifier.apply()
            net.zero_grad()
        nets.append(net)
        found.append(sparsifier.scaling.kept)
    assert found[0] == pytest.approx(found[1])
    assert all(0 < each < 0.9 for each in found[0].values())
    for mine, its in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("method", [StaticMask, SET])
def test_a_group_without_weights_stays_one(method: Callable[..., Sparsify]) -> None:
    net = nn.Linear(40, 30)
    groups: list[dict[str, Any]] = [{"params": list(net.parameters())}, {"params": [], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 0.1)
    sparsifier = method(0.8).scaled().sparsifier
    sparsifier.attach(net, optimizer, horizon=Horizon(1000, 5))
    stepped(optimizer, sparsifier, net, 0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]


@pytest.mark.parametrize("by_name", [False, True])
def test_masks_that_a_closure_renews_count(by_name: bool) -> None:
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    optimizer = Spy(net.parameters(), 0.1, momentum=0.9)
    optimizer.seen = []
    sparsifier = SparseMomentum(0.8, ConstantDrop(0.5, 1, 1.0)).scaled().sparsifier
    sparsifier.attach(net, optimizer, horizon=Horizon(10, 5))
    whole = [1]
    for number in range(6):

        def closure(number: int = number) -> None:
            optimizer.zero_grad()
            net(torch.randn(5, 40)).square().mean().backward()
            whole.append(len(optimizer.param_groups))
            sparsifier.update(number)

        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        sparsifier.apply()
        rates = {id(weight): group["lr"] for group in optimizer.seen[-1] for weight in group["params"]}
        assert rates == pytest.approx(divided(0.1, net, sparsifier.masks, gradients(net)))
    assert set(whole) == {1}


class Rates(pl.Callback):
    """Notes the rates that each step is to have; gradients are not masked, where weights grow by momentum."""

    def __init__(self, method: Sparsify, rate: float) -> None:
        self.method, self.rate, self.seen = method, rate, list[dict[int, float]]()

    def on_train_batch_end(self, _: pl.Trainer, module: pl.LightningModule, *__: Any) -> None:
        self.seen.append(divided(self.rate, module, self.method.sparsifier.masks, gradients(module)))


def test_a_trainer_takes_its_steps_at_the_rates_of_the_masks() -> None:
    method = SparseMomentum(0.8, ConstantDrop(0.5, 3, 1.0)).scaled()
    made = []

    def make(weights: Any) -> Spy:
        made.append(Spy(weights, 0.01, momentum=0.9))
        made[-1].seen = []
        return made[-1]

    module, notes = task(1, make), Rates(method, 0.01)
    trainer(method, notes, epochs=2).fit(module, Batches())
    [optimizer] = made
    assert len(optimizer.seen) == len(notes.seen) == 12
    assert notes.seen[0] != notes.seen[-1]
    for groups, expected in zip(optimizer.seen, notes.seen, strict=True):
        assert {id(weight): group["lr"] for group in groups for weight in group["params"]} == pytest.approx(expected)
    module.training_step(next(iter(Batches())), 0).backward()  # type: ignore[no-untyped-call]  # torch's
    optimizer.step()  # of the user's own, afterwards
    assert [group["lr"] for group in optimizer.seen[-1]] == [0.01]


def test_only_targets_are_scaled() -> None:
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    before = copy.deepcopy(net.state_dict())
    sparsifier = fixed(0.5, targets=Targets(exclude=["1.weight"])).scaled("weights")
    sparsifier.attach(net)
    after = net.state_dict()
    assert torch.equal(after["1.weight"], before["1.weight"])
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * 2**0.5 * sparsifier.masks["0.weight"])


@pytest.mark.parametrize(
    "method",
    [LAMP(0.9), GMP(0.9), OneShot(0.9), ConstantMask(), FLASH(0.8), GraNet(0.9, initial=0.0)],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_do_not_begin_at_random_are_refused(method: Sparsify) -> None:
    with pytest.raises(InputError, match=f"random at first.*not for {type(method).__name__}: leave it out"):
        method.scaled()
    with pytest.raises(InputError, match="whose masks are random at first"):
        method.sparsifier.scaled()


@pytest.mark.parametrize(
    "make",
    [lambda weights: torch.optim.LBFGS(weights), lambda weights: Compact(torch.optim.SGD(weights, 0.1))],
    ids=["LBFGS", "Compact"],
)
def test_optimizers_of_one_rate_are_refused(make: Make) -> None:
    net = nn.Linear(40, 30)
    before = net.weight.detach().clone()
    with pytest.raises(InputError, match="takes no rates by layers"):
        fixed().scaled().attach(net, make(net.parameters()))
    assert torch.equal(net.weight, before)
    fixed().scaled("weights").attach(net, make(net.parameters()))


def test_what_to_scale_is_one_of_two() -> None:
    with pytest.raises(InputError, match="one of weights, both to scale, got 'rates'"):
        StaticMask(0.9).scaled("rates")


def test_detached_and_copied_it_lets_optimizers_be() -> None:
    net = nn.Linear(40, 30)
    optimizer = Spy(net.parameters(), 0.1)
    optimizer.seen = []
    sparsifier = fixed().scaled()
    sparsifier.attach(net, optimizer)
    copied = copy.deepcopy(sparsifier)
    assert isinstance(copied.scaling, Scaling)
    assert copied.scaling.what == "both"
    sparsifier.detach()
    net(torch.randn(5, 40)).square().mean().backward()
    optimizer.step()
    assert [group["lr"] for group in optimizer.seen[0]] == [0.1]


def test_set_and_static_masks_learn_at_the_dense_rate() -> None:
    """A task on which plain sparse networks have learned little after as many steps."""
    torch.manual_seed(0)
    x = torch.randn(400, 40)
    y = (x @ torch.randn(40, 5)).argmax(1)

    def loss(method: Sparsify | None) -> float:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 5))
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        sparsifier = method.sparsifier if method else None
        if sparsifier:
            sparsifier.attach(net, optimizer, horizon=Horizon(100, 10))
        for number in range(60):
            error = nn.functional.cross_entropy(net(x), y)
            error.backward()  # type: ignore[no-untyped-call]  # torch's
            if sparsifier:
                sparsifier.update(number)
            optimizer.step()
            if sparsifier:
                sparsifier.apply()
            optimizer.zero_grad()
        return error.item()

    dense = loss(None)
    for make in (lambda: StaticMask(0.9), lambda: SET(0.9, ConstantDrop(0.3, 10, 1.0))):
        assert loss(make()) - dense > 3 * abs(loss(make().scaled()) - dense)
