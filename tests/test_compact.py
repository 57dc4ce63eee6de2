"""A compact optimizer takes the steps of the one that it was given, whatever the masks do meanwhile."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from callbacks import GMP, RigL
from sparsity import Horizon, InputError, Sparsifier
from sparsity.compact import Compact
from sparsity.schedules import ConstantDrop, Cubic
from tests.nets import Batches, SaveEpochs, task, trainer

Make = Callable[[Iterable[Parameter]], Optimizer]
MADE: dict[str, Make] = {
    "SGD": lambda p: SGD(p, 0.05), "momentum": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: Adam(p, 1e-2), "AdamW": lambda p: AdamW(p, 1e-2, amsgrad=True),
}  # fmt: skip
METHODS: dict[str, Callable[[], Sparsifier]] = {
    "fixed": lambda: Sparsifier(0.9),
    "gradual": lambda: Sparsifier(0.9, schedule=Cubic(end=0.8, every=3)),
    "moving": lambda: RigL(0.8, ConstantDrop(0.5, 2)).sparsifier,
}  # fmt: skip
makers = pytest.mark.parametrize("make", MADE.values(), ids=MADE)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 20), nn.ReLU(), nn.Linear(20, 4))
    return net.to(memory_format=torch.channels_last).double()  # type: ignore[call-overload,no-any-return]  # a layout


class Run:
    """Training of a network by a method, step by step."""

    def __init__(self, make: Make, method: Callable[[], Sparsifier], compact: bool, after: "Run | None" = None) -> None:
        self.net, self.sparsifier = network(), method()
        self.optimizer: Optimizer = make(self.net.parameters())
        if compact:
            self.optimizer = Compact(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        if after:  # the optimizer before its masks
            self.net.load_state_dict(after.net.state_dict())
            self.optimizer.load_state_dict(copy.deepcopy(after.optimizer.state_dict()))
            self.schedule.load_state_dict(after.schedule.state_dict())
            self.sparsifier.load_state_dict(after.sparsifier.state_dict())
        self.sparsifier.attach(self.net, self.optimizer, horizon=Horizon(20), seed=1)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=generator)
            y = torch.randint(0, 4, (8,), generator=generator)
            torch.autograd.backward(nn.functional.cross_entropy(self.net(x), y))
            self.sparsifier.update(step)
            nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
            self.optimizer.step()
            self.sparsifier.apply()
            self.optimizer.zero_grad()
            self.schedule.step()


def same(one: Run, other: Run) -> None:
    for mine, theirs in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)
    assert all(torch.equal(mask, other.sparsifier.masks[name]) for name, mask in one.sparsifier.masks.items())


def same_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    for place, mine in one["state"].items():
        assert mine.keys() == other["state"][place].keys()
        for name, value in mine.items():
            theirs = other["state"][place][name]
            assert value is theirs or torch.allclose(value, theirs, rtol=1e-10, atol=1e-14), name
    assert one["param_groups"] == other["param_groups"]


@methods
@makers
def test_the_steps_are_those_of_the_dense_optimizer(make: Make, method: Callable[[], Sparsifier]) -> None:
    dense, compact = Run(make, method, False), Run(make, method, True)
    for step in range(20):
        for run in (dense, compact):
            run.steps(step, step + 1)
        same(dense, compact)
    same_states(compact.optimizer.state_dict(), dense.optimizer.state_dict())


@methods
@pytest.mark.parametrize("before", [True, False], ids=["from compact", "from dense"])
@pytest.mark.parametrize("after", [True, False], ids=["to compact", "to dense"])
def test_a_saved_state_goes_on_in_either(method: Callable[[], Sparsifier], before: bool, after: bool) -> None:
    whole, first = Run(MADE["AdamW"], method, False), Run(MADE["AdamW"], method, before)
    whole.steps(0, 20)
    first.steps(0, 11)
    second = Run(MADE["AdamW"], method, after, first)
    second.steps(11, 20)
    same(second, whole)
    same_states(second.optimizer.state_dict(), whole.optimizer.state_dict())


def test_its_state_is_as_small_as_what_is_kept() -> None:
    run = Run(MADE["AdamW"], METHODS["fixed"], True)
    run.steps(0, 3)
    for name, weight in run.sparsifier.weights().items():
        kept = int(run.sparsifier.masks[name].sum())
        if kept <= weight.numel() / 2:
            assert run.optimizer.state[weight]["exp_avg"].shape == (kept,)
    total = sum(int(mask.sum()) for mask in run.sparsifier.masks.values())
    assert sum(len(each["exp_avg"]) for each in run.optimizer.state.values()) < 2 * total + 40


def following(optimizer: Optimizer, weight: Parameter, mask: Tensor) -> Compact:
    found = Compact(optimizer)
    found.follow(lambda: ({"weight": weight}, {"weight": mask}))
    return found


def test_dense_weights_are_stepped_as_they_are() -> None:
    weight = Parameter(torch.randn(4, 4))
    optimizer = following(AdamW([weight], 1e-2), weight, torch.ones(4, 4, dtype=torch.bool))
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].shape == (4, 4)


def test_weights_that_others_write_are_taken_as_they_are() -> None:
    weight, mask = Parameter(torch.randn(4, 4)), torch.eye(4, dtype=torch.bool)
    optimizer = following(SGD([weight], 1.0), weight, mask)
    for value in (3.0, 5.0):
        nn.init.constant_(weight, value)
        weight.grad = torch.ones(4, 4)
        optimizer.step()
        assert torch.equal(weight, value - mask.float())


def test_weights_that_lose_their_masks_are_dense_again() -> None:
    net = nn.Linear(8, 8)
    optimizer = Compact(AdamW(net.parameters(), 0.1))
    sparsifier = Sparsifier(0.9)
    sparsifier.attach(net, optimizer)
    for _ in range(2):
        net.weight.grad = torch.ones(8, 8)
        optimizer.step()
        sparsifier.detach()
    assert int((net.weight != 0).sum()) == 64
    assert optimizer.state[net.weight]["exp_avg"].shape == (8, 8)


def test_two_sparsifiers_share_an_optimizer() -> None:
    nets = [nn.Linear(8, 8), nn.Linear(8, 8)]
    optimizer = Compact(SGD([weight for net in nets for weight in net.parameters()], 0.1))
    sparsifiers = [Sparsifier(0.9), Sparsifier(0.8)]
    for net, sparsifier in zip(nets, sparsifiers, strict=True):
        sparsifier.attach(net, optimizer)
    for net in nets:
        net.weight.grad = torch.ones(8, 8)
    optimizer.step()
    for net, sparsifier in zip(nets, sparsifiers, strict=True):
        [mask] = sparsifier.masks.values()
        assert not net.weight[~mask].any()
    sparsifiers[0].masks = {"weight": torch.ones(8, 8, dtype=torch.bool)}
    optimizer.step()
    assert int((nets[0].weight != 0).sum()) == 64


def test_a_state_that_is_cleared_is_gone() -> None:
    found = []
    for compact in (False, True):
        run = Run(MADE["AdamW"], METHODS["fixed"], compact)
        run.steps(0, 3)
        run.optimizer.state.clear()
        run.steps(3, 4)
        found.append(run)
    same(*found)
    same_states(found[0].optimizer.state_dict(), found[1].optimizer.state_dict())


def test_a_state_from_before_is_taken_over_and_old_ones_load() -> None:
    weight = Parameter(torch.randn(4, 4))
    adam = AdamW([weight], 0.1)
    weight.grad = torch.ones(4, 4)
    adam.step()
    compact = Compact(adam)
    saved = compact.state_dict()
    assert saved["state"][0]["exp_avg"].shape == (4, 4)
    for name in ("foreach", "fused", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(name, None)
    compact.load_state_dict(saved)
    compact.step()
    assert int(compact.state[weight]["step"]) == 2


def test_what_an_optimizer_counts_in_its_groups_is_kept() -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # returns nothing
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1

    weight = Parameter(torch.randn(4, 4))
    optimizer = following(Counting([weight], 0.1), weight, torch.eye(4, dtype=torch.bool))
    for _ in range(3):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["k"] == 3


def test_a_network_that_changes_its_dtype() -> None:
    net = nn.Linear(8, 8)
    optimizer = Compact(SGD(net.parameters(), 0.1))
    sparsifier = Sparsifier(0.9)
    sparsifier.attach(net, optimizer)
    net.double()
    net.weight.grad = torch.ones(8, 8, dtype=torch.float64)
    optimizer.step()
    assert int((net.weight != 0).sum()) <= 7


def test_a_weight_without_a_gradient_stays() -> None:
    weight = Parameter(torch.randn(4, 4))
    optimizer = following(SGD([weight], 1.0, weight_decay=0.5), weight, torch.eye(4, dtype=torch.bool))
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)


def test_groups_and_closures() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = Compact(SGD([{"params": net[0].parameters(), "lr": 0.5}], 0.1))
    optimizer.add_param_group({"params": net[1].parameters(), "lr": 0.25})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    before = [each.detach().clone() for each in net.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(torch.ones(2, 4)).square().sum()
        torch.autograd.backward(loss)
        return loss.detach()

    assert optimizer.step(closure).item() > 0
    assert not any(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


def test_a_gradient_scaler() -> None:
    run = Run(MADE["momentum"], METHODS["fixed"], True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    weight = next(iter(run.sparsifier.weights().values()))
    before = weight.detach().clone()
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(0, 4, (8,))
    for scale in (float("inf"), 1.0):
        loss = nn.functional.cross_entropy(run.net(x), y) * scale
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        assert torch.equal(weight, before) == (scale != 1.0)


@pytest.mark.parametrize("callback", [lambda: RigL(0.8, ConstantDrop(0.3, 3)), lambda: GMP(0.8)], ids=["RigL", "GMP"])
def test_in_lightning(callback: Callable[[], Any], tmp_path: Path) -> None:
    def fit(compact: bool, folder: Path, resume: Path | None = None) -> list[Parameter]:
        def make(parameters: Iterable[Parameter]) -> Optimizer:
            adam = AdamW(parameters, 1e-2)
            return Compact(adam) if compact else adam

        module = task(make_optimizer=make)
        runner = trainer(callback(), SaveEpochs(folder), epochs=4, enable_checkpointing=True)
        runner.fit(module, Batches(), ckpt_path=resume, weights_only=True)
        return list(module.parameters())

    dense, compact = fit(False, tmp_path / "dense"), fit(True, tmp_path / "compact")
    for mine, theirs in zip(compact, dense, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)
    for folder, whole in (("compact", compact), ("dense", dense)):
        goes_on = fit(True, tmp_path / "part", tmp_path / folder / "1.ckpt")
        for mine, theirs in zip(goes_on, whole, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_what_needs_more_than_it_keeps_is_refused() -> None:
    from callbacks import STE, SparseMomentum

    net = nn.Linear(8, 8)
    optimizer = Compact(SGD(net.parameters(), 0.1, momentum=0.9))
    for method in (SparseMomentum(0.5), STE("2:4")):
        with pytest.raises(InputError, match="Compact"):
            method.sparsifier.attach(net, optimizer, horizon=Horizon(1000, 100))
    with pytest.raises(InputError, match="keep its state_dict"):
        copy.deepcopy(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer, method
    gc.collect()
    assert gone() is None
