"""Straight-through and learned masks: each step by hand, or through autograd of the explicit model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from callbacks import ASP, SRSTE, GumbelNM
from sparsity import Horizon, InputError, Sparsifier, masks
from sparsity.gumbel import Annealing, Gumbel, LogitTraining, Prior
from sparsity.learned import Learned, StraightThrough
from sparsity.ops import gumbel_nm_mask
from sparsity.patterns import NM, nm_mask, to_groups
from sparsity.relaxation import ExponentialDecay, Geometric, LinearDecay, Relaxation, Stepwise
from tests.nets import Batches, SaveEpochs, Task, adamw, sgd, task, trainer

HORIZON = Horizon(steps=20, per_epoch=10)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def batch(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 8, generator=generator), torch.randn(size, 4, generator=generator)


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]), data[1])


def step(model: nn.Module, sparsifier: Learned, optimizer: torch.optim.Optimizer, number: int, *more: Any) -> None:
    sparsifier.relax()
    for data in more or (batch(number),):
        torch.autograd.backward(loss(model, data) / len(more or (0,)))
    sparsifier.update(number)
    optimizer.step()
    sparsifier.apply()
    optimizer.zero_grad()


def test_sr_ste_by_hand() -> None:
    """w <- w - lr (dL/dw~ + decay (1 - mask) w) for all weights, and the model shows mask * w."""
    model, decay, lr = net(), 0.3, 0.1
    by_hand = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    sparsifier = StraightThrough("2:4", decay)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    sparsifier.attach(model, optimizer, horizon=HORIZON)
    for number in range(5):
        kept = {n: nm_mask(w, 2, 4) if w.ndim == 2 else torch.ones_like(w) > 0 for n, w in by_hand.items()}
        shown = {n: (w * kept[n]).requires_grad_() for n, w in by_hand.items()}
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.detach(), shown[name].detach())
        data = batch(number)
        torch.autograd.backward(nn.functional.mse_loss(functional_call(model, shown, (data[0],)), data[1]))
        for name, value in by_hand.items():
            gradient = shown[name].grad
            assert gradient is not None
            value -= lr * (gradient + decay * value * ~kept[name])
        step(model, sparsifier, optimizer, number)
    for name, dense in sparsifier.dense.items():
        torch.testing.assert_close(dense, by_hand[name])


@pytest.mark.parametrize("frozen", [True, False])
def test_logits_gradients_are_autograds(frozen: bool) -> None:
    """The loss and the energy of the explicit model, w times sampled masks, through autograd in one graph."""
    model, energy = net(), 0.05
    annealing = Annealing((2.0, 0.5), (3.0, 9.0), energy)
    sparsifier = Gumbel("2:4", Prior(), annealing, LogitTraining(deviation=0.5), frozen)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(model, optimizer, horizon=HORIZON, seed=4)
    for number in range(3):
        temperature, scale, weight_of_energy = annealing.at(number / 19)
        sparsifier.relax()
        dense = {name: w.clone().requires_grad_() for name, w in sparsifier.dense.items()}
        logits = {name: each.detach().clone().requires_grad_() for name, each in sparsifier.logits.items()}
        shown = {
            name: w * gumbel_nm_mask(logits[name], 2, 4, scale, temperature, sparsifier._draw(name)).view(w.shape)
            for name, w in dense.items()
        }
        data = batch(number)
        total = nn.functional.mse_loss(functional_call(model, shown, (data[0],)), data[1])
        retained = sum((dense[name].detach() * (shown[name] / dense[name])).square().sum() for name in dense)
        torch.autograd.backward(total - weight_of_energy * retained, inputs=list(logits.values()), retain_graph=True)

        torch.autograd.backward(loss(model, data))
        sparsifier.update(number)
        for name, each in sparsifier.logits.items():
            torch.testing.assert_close(each.grad, logits[name].grad, rtol=1e-4, atol=1e-6)
        for name, parameter in model.named_parameters():
            if name in dense and not frozen:
                assert parameter.grad is not None
                # The energy trains the masks alone.
                [plain] = torch.autograd.grad(total, dense[name], retain_graph=True)
                torch.testing.assert_close(parameter.grad, plain, rtol=1e-4, atol=1e-6)
            elif frozen and parameter.grad is not None:
                assert not parameter.grad.any()
        optimizer.step()
        sparsifier.apply()
        optimizer.zero_grad()


def methods() -> dict[str, Any]:
    return {
        "SR-STE": lambda: StraightThrough("2:4", 2e-4),
        "PGF": lambda: StraightThrough("1:4", relaxation=LinearDecay(0.7)),
        "Gumbel": lambda: Gumbel("2:4", Prior()),
        "Gumbel, weights too": lambda: Gumbel("1:4", frozen=False),
    }


every = pytest.mark.parametrize("name", methods())


def train(name: str, windows: int = 1, seed: int = 0, model: nn.Module | None = None) -> tuple[nn.Module, Learned]:
    model = model or net()
    sparsifier: Learned = methods()[name]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier.attach(model, optimizer, horizon=HORIZON, seed=seed)
    for number in range(8):
        data = batch(number, 12)
        parts = [(x, y) for x, y in zip(data[0].chunk(windows), data[1].chunk(windows), strict=True)]
        step(model, sparsifier, optimizer, number, *parts)
    return model, sparsifier


@every
def test_an_accumulation_window_is_one_large_batch(name: str) -> None:
    (whole, one), (parted, other) = train(name), train(name, windows=3)
    for first, second in zip(whole.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert masks.fingerprint(one.masks) == masks.fingerprint(other.masks)


class Checkpointed(nn.Module):
    """The same network, whose forward pass is run again in the backward pass."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return result


@every
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    plain, _ = train(name)
    again, _ = train(name, model=Checkpointed(net()))
    # Names, and with them the noise, differ; learned masks are compared under the same names.
    if not name.startswith("Gumbel"):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    else:
        first, _ = train(name, model=Wrapped(net()))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


class Wrapped(Checkpointed):
    """The same names, and no checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


@every
def test_state_goes_on_exactly(name: str) -> None:
    model = net()
    sparsifier: Learned = methods()[name]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier.attach(model, optimizer, horizon=HORIZON, seed=3)
    for number in range(5):
        step(model, sparsifier, optimizer, number)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    again, resumed = net(7), methods()[name]()
    second = torch.optim.AdamW(again.parameters(), 1e-2)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    resumed.attach(again, second, horizon=HORIZON, seed=99)
    for number in range(5, 12):
        step(model, sparsifier, optimizer, number)
        step(again, resumed, second, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(sparsifier.dense[n], resumed.dense[n]) for n in sparsifier.dense)
    if isinstance(sparsifier, Gumbel) and isinstance(resumed, Gumbel):
        assert all(torch.equal(sparsifier.logits[n], resumed.logits[n]) for n in sparsifier.logits)


@every
def test_evaluation_is_deterministic_and_exact(name: str) -> None:
    model, sparsifier = train(name)
    sparsifier.relax()
    if name != "SR-STE":
        assert sum(int(w.count_nonzero()) for w in sparsifier.weights().values()) > 0
    sparsifier.enforce()
    first = model(batch()[0])
    sparsifier.enforce()
    assert torch.equal(first, model(batch()[0]))
    assert isinstance(sparsifier.pattern, NM)
    n, m = sparsifier.pattern.n, sparsifier.pattern.m
    for key, weight in sparsifier.weights().items():
        assert ((weight.view(-1, m) != 0).sum(1) <= n).all()
        assert (sparsifier.masks[key].view(-1, m).sum(1) == n).all()


@every
def test_a_skipped_step_changes_nothing(name: str) -> None:
    model, sparsifier = train(name)
    before = copy.deepcopy((model.state_dict(), sparsifier.dense, sparsifier.masks))
    sparsifier.relax()
    torch.autograd.backward(loss(model, batch()))
    sparsifier.update(8)
    sparsifier.settle()  # no step, no apply
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[1][key]) for key, value in sparsifier.dense.items())
    assert all(torch.equal(value, before[2][key]) for key, value in sparsifier.masks.items())


def test_frozen_weights_stay() -> None:
    model = net()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    _, sparsifier = train("Gumbel", model=model)
    for name, weight in model.named_parameters():
        kept = sparsifier.masks.get(name, torch.ones(1))
        assert torch.equal(weight.detach(), start[name] * kept), f"{name} moved"
    prior = {name: nm_mask(start[name], 2, 4) for name in sparsifier.masks}
    assert masks.fingerprint(sparsifier.masks) != masks.fingerprint(prior), "nothing was learned"


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_a_strong_prior_decides_the_first_masks(pattern: str, tmp_path: Path) -> None:
    n, m = map(int, pattern.split(":"))
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    given = {
        name: NM(n, m).best(torch.rand(weight.shape, generator=generator))
        for name, weight in model.named_parameters()
        if weight.ndim == 2
    }
    masks.save(given, tmp_path / "masks.safetensors")
    sparsifier = Gumbel(pattern, Prior(tmp_path / "masks.safetensors", strength=30.0))
    sparsifier.attach(model, torch.optim.SGD(model.parameters(), 0.1), horizon=HORIZON)
    assert masks.fingerprint(sparsifier.masks) == masks.fingerprint(given)


def test_magnitudes_are_the_prior_of_the_callback_and_none_is_random() -> None:
    def first(prior: Prior) -> masks.Masks:
        model = nn.Sequential(nn.Linear(64, 64))
        sparsifier = Gumbel("2:4", prior)
        sparsifier.attach(model, torch.optim.SGD(model.parameters(), 0.1), horizon=HORIZON)
        best = nm_mask(sparsifier.dense["0.weight"], 2, 4)
        alike = (best & sparsifier.masks["0.weight"]).sum() / best.sum()
        return {"alike": alike}

    assert float(first(Prior())["alike"]) > 0.9
    assert 0.4 < float(first(Prior(strength=0))["alike"]) < 0.6


def test_logits_of_one_task_start_another(tmp_path: Path) -> None:
    model, method = task(), GumbelNM("2:4")
    runner = trainer(method)
    runner.fit(model, Batches())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    method.sparsifier.save_logits(tmp_path / "a.safetensors")  # type: ignore[attr-defined]  # a Gumbel's
    for file in ("a.ckpt", "a.safetensors"):
        other, started = task(1), Gumbel("2:4", Prior(tmp_path / file))
        started.attach(other, sgd(other.parameters()), horizon=HORIZON)
        assert masks.fingerprint(started.masks) == masks.fingerprint(method.sparsifier.masks)


def test_logits_in_bfloat16_or_of_another_pattern_are_refused(tmp_path: Path) -> None:
    sparsifier = Gumbel("2:4")
    model = net()
    sparsifier.attach(model, sgd(model.parameters()), horizon=HORIZON)
    sparsifier.save_logits(tmp_path / "a.safetensors")
    half = {name: each.bfloat16() for name, each in load_file(tmp_path / "a.safetensors").items()}
    save_file(half, tmp_path / "b.safetensors", metadata={"format": "sparsity-logits-1"})
    with pytest.raises(InputError, match=r"logits in torch.bfloat16 for '0.weight', float32 is expected"):
        Gumbel("2:4", Prior(tmp_path / "b.safetensors")).attach(model, sgd(model.parameters()), horizon=HORIZON)
    with pytest.raises(InputError, match=r"no logits of shape \(4, 24\) for '0.weight', which 1:4 needs"):
        Gumbel("1:4", Prior(tmp_path / "a.safetensors")).attach(model, sgd(model.parameters()), horizon=HORIZON)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("4:16", r"4:16 has 1,820 candidates, 114 logits per weight: with Adam that is 1,820 bytes per weight"),
        ("16:32", r"16:32 has 601,080,390 candidates"),
        ("2:4T", r'masks are learned for patterns "N:M", got "2:4T"'),
        ("4x4", r'masks are learned for patterns "N:M" and "2:4T", got "4x4"'),
        (124, r'got the number 124: .*; write "2:4"'),
        ("4:2", r"0 < N < M"),
    ],
)
def test_patterns_that_cannot_be_learned(pattern: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GumbelNM(pattern)


def test_the_largest_patterns_are_learned() -> None:
    for pattern in ("2:16", "4:8", "1:64"):
        Gumbel(pattern)


def test_bad_settings_are_named() -> None:
    with pytest.raises(InputError, match="a training without end"):
        Gumbel("2:4").attach(net(), sgd(net().parameters()))
    with pytest.raises(InputError, match="no optimizer holds a target weight"):
        Gumbel("2:4").attach(net(), horizon=HORIZON)
    with pytest.raises(InputError, match="no optimizer holds a target weight"):
        Gumbel("2:4").attach(net(), sgd(net().parameters()), horizon=HORIZON)
    with pytest.raises(InputError, match="decay must be 0 or more"):
        SRSTE("2:4", decay=-1)
    with pytest.raises(InputError, match=r"until=1.0 is step 20 of 20"):
        StraightThrough("2:4", relaxation=LinearDecay(1.0)).attach(net(), horizon=HORIZON)
    with pytest.raises(InputError, match="strength must be 0 or more"):
        Prior(strength=-1)
    with pytest.raises(InputError, match="temperature"):
        Annealing(temperature=(1.0, 0.0))
    with pytest.raises(InputError, match="rate"):
        LogitTraining(rate=0)
    with pytest.raises(InputError, match='ASP prunes to "N:M"'):
        ASP("channel")
    with pytest.raises(InputError, match="has no dense weights"):
        StraightThrough("2:4").load_state_dict(Sparsifier(0.5).state_dict())


def test_shapes_that_do_not_divide_are_named_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(10, 4))
    with pytest.raises(InputError) as caught:
        StraightThrough("2:4").attach(model, horizon=HORIZON)
    for part in ("'0.weight' of shape (4, 10)", "targets.exclude=['0.weight']", "targets.multiple=4", "from 10 to 12"):
        assert part in str(caught.value)


def test_fading_out() -> None:
    assert [LinearDecay().share(s, 10) for s in (0, 5, 10, 20)] == [1.0, 0.5, 0.0, 0.0]
    found = [ExponentialDecay().share(s, 30) for s in (0, 10, 20, 30)]
    assert found == pytest.approx([1.0, 0.1, 0.01, 0.0])
    assert Relaxation().share(0, 0) == 0


def frames(relaxation: Relaxation, final: NM, end: int) -> list[str]:
    return list(dict.fromkeys(relaxation.pattern(final, step, end).name for step in range(end + 5)))


def test_frames() -> None:
    assert frames(Stepwise(), NM(1, 8), 100) == ["7:8", "4:8", "2:8", "1:8"]
    assert frames(Stepwise(), NM(2, 4), 100) == ["3:4", "2:4"]
    assert frames(Stepwise(), NM(1, 4), 9) == ["3:4", "2:4", "1:4"]
    assert frames(Geometric(), NM(1, 4), 100) == ["8:32", "4:16", "2:8", "1:4"]
    assert Stepwise().pattern(NM(1, 8), 100, 100).name == "1:8"


def test_a_layer_that_wide_groups_do_not_divide_has_narrower_ones() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 32), nn.Linear(32, 4))
    sparsifier = StraightThrough("1:4", relaxation=Geometric())
    sparsifier.attach(model, sgd(model.parameters()), horizon=HORIZON)
    wide = sparsifier.masks["2.weight"]
    assert (wide.sum(1) == 8).all()
    assert not (wide.view(-1, 4).sum(1) == 1).all(), "8:32 is as free as that"
    assert (sparsifier.masks["0.weight"].view(-1, 8).sum(1) == 2).all()
    assert (sparsifier.masks["1.weight"].view(-1, 4).sum(1) == 1).all()


def test_relaxed_weights_take_part_and_end() -> None:
    model = net()
    sparsifier = StraightThrough("2:4", relaxation=LinearDecay(0.5))
    optimizer = sgd(model.parameters())
    sparsifier.attach(model, optimizer, horizon=HORIZON)
    dense = sparsifier.dense["0.weight"].clone()
    sparsifier.relax()
    assert torch.equal(sparsifier.weights()["0.weight"], dense), "at first everything takes part"
    sparsifier.settle()
    for number in range(5):
        step(model, sparsifier, optimizer, number)
    sparsifier.relax()
    kept = sparsifier.masks["0.weight"]
    torch.testing.assert_close(model[0].weight[~kept], sparsifier.dense["0.weight"][~kept] * 0.5)  # type: ignore[index]  # a weight
    for number in range(5, 12):
        step(model, sparsifier, optimizer, number)
    sparsifier.relax()
    assert not model[0].weight[~sparsifier.masks["0.weight"]].any()  # type: ignore[index]  # a weight


class Conv1D(nn.Module):
    """As in `transformers`: the weight is [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("make", [
    lambda: Sparsifier(0.5, pattern="2:4"), lambda: StraightThrough("2:4"), lambda: Gumbel("2:4", Prior())
])  # fmt: skip
def test_groups_of_transposed_layers_run_along_the_input(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 6), nn.ConvTranspose2d(8, 3, 3), nn.Conv2d(8, 6, 3))
    sparsifier = make()
    sparsifier.attach(model, sgd(model.parameters()), horizon=HORIZON)
    found = sparsifier.masks
    assert (found["0.weight"].view(2, 4, 6).sum(1) == 2).all()
    assert (found["1.weight"].view(2, 4, 3, 3, 3).sum(1) == 2).all()
    assert (found["2.weight"].view(6, 2, 4, 3, 3).sum(2) == 2).all()
    if isinstance(sparsifier, StraightThrough):
        assert torch.equal(found["0.weight"], nm_mask(sparsifier.dense["0.weight"].T, 2, 4).T)


def test_groups_go_there_and_back() -> None:
    from sparsity.patterns import from_groups

    for shape in ((6, 8), (6, 8, 3), (6, 8, 3, 3)):
        tensor = torch.randn(shape)
        groups = to_groups(tensor, 4)
        assert groups.shape == (tensor.numel() // 4, 4)
        assert torch.equal(from_groups(groups, shape), tensor)
        assert torch.equal(groups[0], tensor.reshape(6, 8, -1)[0, :4, 0])


def test_optimizers_of_logits_follow_the_models() -> None:
    for make in (sgd, adamw, lambda p: torch.optim.Adam(p, 1e-3), lambda p: torch.optim.AdamW(p, 1e-3, fused=True)):
        model = net()
        optimizer = make(model.parameters())
        sparsifier = Gumbel("2:4", training=LogitTraining(rate=5.0, weight_decay=0.25))
        sparsifier.attach(model, optimizer, horizon=HORIZON)
        step(model, sparsifier, optimizer, 0)
        optimizer.param_groups[0]["lr"] = 0.125
        step(model, sparsifier, optimizer, 1)
        mine = sparsifier._companion._optimizer
        assert type(mine) is type(optimizer)
        assert mine is not None
        assert {group["lr"] for group in mine.param_groups} == {0.625}
        assert {group["weight_decay"] for group in mine.param_groups} == {0.25}
        assert all(each.dtype == torch.float32 for each in sparsifier.logits.values())


def test_a_half_precision_model_has_float32_logits() -> None:
    model = net().bfloat16()
    sparsifier = Gumbel("2:4", frozen=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(model, optimizer, horizon=HORIZON)
    x, y = batch()
    sparsifier.relax()
    torch.autograd.backward(nn.functional.mse_loss(model(x.bfloat16()), y.bfloat16()))
    sparsifier.update(0)
    optimizer.step()
    sparsifier.apply()
    assert model[0].weight.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in sparsifier.logits.values())


@every
def test_nan_in_what_is_pruned_is_not_shown(name: str) -> None:
    _, sparsifier = train(name)
    sparsifier.relax()
    for key, mask in sparsifier.masks.items():
        sparsifier.dense[key][~mask] = float("nan")
    sparsifier._shown = dict.fromkeys(sparsifier.masks, "relaxed")
    sparsifier.enforce()
    assert all(bool(torch.isfinite(weight).all()) for weight in sparsifier.weights().values())


@every
def test_two_optimizers_of_one_backward_pass_are_one_of_both(name: str) -> None:
    one, joint = net(), methods()[name]()
    both = torch.optim.SGD(one.parameters(), 0.1)
    joint.attach(one, both, horizon=HORIZON)
    other, parted = net(), methods()[name]()
    parts = [torch.optim.SGD(each.parameters(), 0.1) for each in (other[0], other[2])]
    parted.attach(other, *parts, horizon=HORIZON)
    for number in range(6):
        step(one, joint, both, number)
        parted.relax()
        torch.autograd.backward(loss(other, batch(number)))
        for optimizer in parts:
            parted.update(number, optimizer)
            optimizer.step()
            parted.apply()
        for optimizer in parts:
            optimizer.zero_grad()
        for mine, its in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, its)
    assert masks.fingerprint(joint.masks) == masks.fingerprint(parted.masks)


def test_a_second_forward_pass_in_the_batch_is_sampled_too() -> None:
    seen = []

    class Manual(Task):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, data: Any, batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            for _ in range(2):
                seen.append(method.sparsifier._shown["net.fc.weight"])
                optimizer.zero_grad()
                self.manual_backward(super().training_step(data, batch_idx))
                optimizer.step()

    task()
    method: Any = GumbelNM("2:4")
    trainer(method).fit(Manual(), Batches())
    assert set(seen) == {"relaxed"}


@pytest.mark.parametrize("make", [sgd, adamw], ids=["SGD", "AdamW"])
def test_logits_follow_a_schedule_after_a_resume(make: Any, tmp_path: Path) -> None:
    class Scheduled(Task):
        def configure_optimizers(self) -> Any:
            optimizer = make(self.parameters())
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)}

    found = []
    for resumed in (False, True):
        task()
        model, method = Scheduled(), GumbelNM("2:4")
        runner = trainer(method, SaveEpochs(tmp_path), epochs=3, enable_checkpointing=True)
        runner.fit(model, Batches(), ckpt_path=str(tmp_path / "0.ckpt") if resumed else None, weights_only=True)
        sparsifier: Any = method.sparsifier
        found.append(
            (sparsifier._companion._optimizer.param_groups[0]["lr"], sparsifier.logits["net.fc.weight"].detach())
        )
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_an_interrupted_batch_leaves_a_checkpoint_of_what_the_masks_keep(tmp_path: Path) -> None:
    class Breaking(Task):
        def training_step(self, data: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 4:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")
                raise RuntimeError("interrupted")
            return super().training_step(data, batch_idx)

    task()
    model, method = Breaking(), GumbelNM("2:4")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(method, enable_checkpointing=True, default_root_dir=tmp_path).fit(model, Batches())
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    for state in (saved, model.state_dict()):
        for name, mask in method.sparsifier.masks.items():
            assert torch.equal(state[name], start[name] * mask)


def test_a_frozen_network_survives_a_gradient_that_is_not_finite() -> None:
    model = net()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    sparsifier = Gumbel("2:4", Prior())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier.attach(model, optimizer, horizon=HORIZON)
    for number in range(4):
        sparsifier.relax()
        torch.autograd.backward(loss(model, batch(number)))
        if number == 2:
            gradient = sparsifier.weights()["0.weight"].grad
            assert gradient is not None
            gradient[0, 0] = float("inf")
        sparsifier.update(number)
        optimizer.step()
        sparsifier.apply()
        optimizer.zero_grad()
        for name, weight in model.named_parameters():
            assert torch.equal(weight.detach(), start[name] * sparsifier.masks.get(name, torch.ones(1)))
    assert all(torch.equal(sparsifier.dense[name], start[name]) for name in sparsifier.dense)


def test_the_seed_decides_the_first_logits() -> None:
    found = []
    for seed in (1, 1, 2):
        model = net()
        sparsifier = Gumbel("2:4")
        sparsifier.attach(model, sgd(model.parameters()), horizon=HORIZON, seed=seed)
        found.append(sparsifier.logits["0.weight"].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_layers_that_are_not_trained_keep_their_first_masks_and_join_later() -> None:
    model = net()
    second = model[2].requires_grad_(False)
    sparsifier = Gumbel("2:4", Prior(), frozen=False)
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    sparsifier.attach(model, optimizer, horizon=HORIZON)
    before = sparsifier.logits["2.weight"].detach().clone()
    for number in range(3):
        step(model, sparsifier, optimizer, number)
        sparsifier.relax()
        assert (sparsifier._shown["0.weight"], sparsifier._shown["2.weight"]) == ("relaxed", "masked")
        sparsifier.settle()
    assert torch.equal(before, sparsifier.logits["2.weight"])
    second.requires_grad_(True)
    optimizer.add_param_group({"params": list(second.parameters())})
    for number in range(3, 8):
        step(model, sparsifier, optimizer, number)
    assert not torch.equal(before, sparsifier.logits["2.weight"])
    with pytest.raises(InputError, match="no optimizer holds a target weight that requires a gradient"):
        Gumbel("2:4").attach(net().requires_grad_(False), optimizer, horizon=HORIZON)


def test_forgetting_to_relax_is_said() -> None:
    model = net()
    sparsifier = Gumbel("2:4")
    sparsifier.attach(model, sgd(model.parameters()), horizon=HORIZON)
    torch.autograd.backward(loss(model, batch()))
    with pytest.raises(InputError, match=r"call relax\(\) before the forward pass"):
        sparsifier.update(0)


def test_a_trainer_that_goes_on_goes_on_with_the_annealing() -> None:
    model, method = task(), GumbelNM("2:4")
    runner = trainer(method, epochs=2)
    runner.fit(model, Batches())
    sparsifier: Any = method.sparsifier
    assert (method.step, sparsifier.step) == (12, 12)
    steps = []

    class Noting(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            steps.append((method.step, sparsifier.step))

    runner.callbacks.insert(0, Noting())  # type: ignore[attr-defined]  # set by a connector
    runner.fit_loop.max_epochs = 3
    runner.fit(model, Batches())
    assert steps[0] == (12, 12)
    assert steps[-1] == (17, 17)
