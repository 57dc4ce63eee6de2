"""Drop and grow: hand-worked cases, an oracle written differently, properties, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam, RMSprop

from sparsity import Horizon, InputError, Targets, masks
from sparsity.distributions import Uniform
from sparsity.dynamic import Dynamic, Regrowth
from sparsity.redistribution import InPlace, Proportional
from sparsity.schedules import ConstantDrop, CosineDrop, Cubic, InTime
from sparsity.scores import Gradient, Magnitude, Momentum, Random, Score

HORIZON = Horizon(steps=100, per_epoch=10)
GROW: dict[str, Callable[[], Score]] = {"random": Random, "gradient": Gradient, "momentum": Momentum}
WHERE: dict[str, Callable[[], InPlace]] = {
    "in place": InPlace, "by momentum": Proportional, "by gradient": lambda: Proportional(Gradient()),
    "by magnitude": lambda: Proportional(Magnitude()),
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 5))


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    inputs, labels = torch.randn(16, 20, generator=generator), torch.randint(0, 5, (16,), generator=generator)
    torch.autograd.backward(nn.functional.cross_entropy(model(inputs), labels))


def attached(rule: Regrowth, model: nn.Module | None = None, **settings: Any) -> tuple[Dynamic, nn.Module, Optimizer]:
    model = model or net()
    optimizer = sgd(model)
    sparsifier = Dynamic(settings.pop("sparsity", 0.8), rule, **settings)
    sparsifier.attach(model, optimizer, horizon=HORIZON, seed=3)
    return sparsifier, model, optimizer


def step_once(sparsifier: Dynamic, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    backward(model, step)
    sparsifier.update(step)
    optimizer.step()
    sparsifier.apply()
    optimizer.zero_grad()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("grow", GROW)
@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.95])
def test_the_count_is_exact_and_the_zeros_hold_at_every_step(grow: str, where: str, sparsity: float) -> None:
    rule = Regrowth(GROW[grow](), ConstantDrop(0.5, 1, 1.0), WHERE[where]())
    sparsifier, model, optimizer = attached(rule, sparsity=sparsity)
    total = 20 * 30 + 30 * 16 + 16 * 5
    moved = 0
    for step in range(40):
        before = sparsifier.masks
        step_once(sparsifier, model, optimizer, step)
        assert sum(masks.counts(sparsifier.masks).values()) == round((1 - sparsity) * total)
        moved += sum(int((before[name] & ~mask).count_nonzero()) for name, mask in sparsifier.masks.items())
        for name, weight in sparsifier.weights().items():
            assert not weight[~sparsifier.masks[name]].any()
            assert sparsifier.masks[name].any(), "a layer is empty"
    assert moved > 0
    assert masks.density(sparsifier.masks) <= sparsifier.explored() <= 1


def grad(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad.clone()


def by_sorting(weight: Tensor, mask: Tensor, signal: Tensor, count: int) -> set[int]:
    """The kept positions after one update of RigL, in Python's words: sort, cut, sort, add."""
    flat, kept = weight.flatten().tolist(), [i for i, keep in enumerate(mask.flatten().tolist()) if keep]
    kept = sorted(kept, key=lambda i: (-abs(flat[i]), i))[: len(kept) - count]
    free = [i for i in range(len(flat)) if i not in set(kept)]
    size = signal.flatten().double().abs().tolist()
    return {*kept, *sorted(free, key=lambda i: (-size[i], i))[:count]}


def test_rigl_equals_sorting() -> None:
    sparsifier, model, optimizer = attached(Regrowth(Gradient(), CosineDrop(0.3, 5, 1.0)))
    for step in range(60):
        backward(model, step)
        weights = sparsifier.weights()
        before = {name: (w.detach().clone(), sparsifier.masks[name], grad(w)) for name, w in weights.items()}
        sparsifier.update(step)
        fraction = 0.15 * (1 + torch.cos(torch.tensor(torch.pi * step / 100, dtype=torch.float64)).item())
        for name, (weight, mask, gradient) in before.items():
            count = int(fraction * int(mask.count_nonzero())) if step % 5 == 0 and step else 0
            expected = by_sorting(weight, mask, gradient, count)
            assert set(sparsifier.masks[name].flatten().nonzero().squeeze(1).tolist()) == expected, (name, step)
        optimizer.step()
        sparsifier.apply()
        optimizer.zero_grad()


def test_growth_by_gradients_that_another_optimizers_step_comes_before() -> None:
    """One backward pass, and the optimizer whose steps count comes second: its gradients are not masked before."""
    body, head = nn.Linear(20, 30), nn.Linear(30, 5)
    model = nn.Sequential(body, nn.ReLU(), head)
    first, second = SGD(head.parameters(), 0.1), SGD(body.parameters(), 0.1)
    sparsifier = Dynamic(0.8, Regrowth(Gradient(), ConstantDrop(0.5, 1, 1.0)), Uniform())
    sparsifier.attach(model, first, second, horizon=Horizon(steps=10))
    model(torch.randn(8, 20)).square().mean().backward()
    assert body.weight.grad is not None
    before, gradient = sparsifier.masks["0.weight"], body.weight.grad.abs().clone()
    sparsifier.update(0, first)
    first.step()
    sparsifier.apply()
    sparsifier.update(1, second)
    grown = sparsifier.masks["0.weight"] & ~before
    assert grown.any()
    assert gradient[grown].min() >= gradient[~before & ~grown].max()
    assert not body.weight.grad[~sparsifier.masks["0.weight"]].any()


def test_a_dropped_weight_that_is_grown_at_once_has_never_left() -> None:
    """By hand: of 4 kept weights two are dropped; one of them has the largest gradient and keeps value and momentum."""
    model = nn.Linear(8, 1, bias=False)
    optimizer = sgd(model)
    sparsifier = Dynamic(0.5, Regrowth(Gradient(), ConstantDrop(0.5, 1, 1.0)))
    sparsifier.attach(model, optimizer, horizon=Horizon(steps=10))
    sparsifier.masks = sparsifier.ever = {"weight": torch.tensor([[True] * 4 + [False] * 4])}
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 3.0, 0.2, 0.1, 0, 0, 0, 0]]))
    model.weight.grad = torch.zeros(1, 8)
    optimizer.step()
    optimizer.state[model.weight]["momentum_buffer"] = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0]])
    model.weight.grad = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0, 5.0, 1.0, -2.0]])
    sparsifier.update(1)
    assert sparsifier.masks["weight"].tolist() == [[True, True, False, True, False, True, False, False]]
    assert model.weight.tolist() == [[4.0, 3.0, 0.0, pytest.approx(0.1), 0.0, 0.0, 0.0, 0.0]]
    buffer = optimizer.state[model.weight]["momentum_buffer"]
    assert buffer.tolist() == [[pytest.approx(0.4), pytest.approx(0.3), 0.0, pytest.approx(0.1), 0.0, 0.0, 0.0, 0.0]]
    assert sparsifier.explored() == 5 / 8
    assert sparsifier.history.last() == {"churn": 0.25, "explored": 5 / 8, "dead": 0.0}


@pytest.mark.parametrize("make", [SGD, Adam, AdamW, RAdam], ids=lambda kind: kind.__name__)
def test_momentum_grows_where_the_optimizers_momentum_is_largest(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters(), lr=0.01, **({"momentum": 0.9} if make is SGD else {}))
    sparsifier = Dynamic(0.8, Regrowth(Momentum(), ConstantDrop(0.5, 10, 1.0)))
    sparsifier.attach(model, optimizer, horizon=HORIZON)
    for step in range(10):
        step_once(sparsifier, model, optimizer, step)
    weight, before = next(iter(sparsifier.weights().values())), sparsifier.masks["0.weight"]
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    signal = state["momentum_buffer"] if make is SGD else state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    assert signal[~before].any(), "the momentum of pruned weights is gone"
    expected = by_sorting(weight.detach(), before, signal, int(0.5 * int(before.count_nonzero())))
    backward(model, 10)
    sparsifier.update(10)
    assert set(sparsifier.masks["0.weight"].flatten().nonzero().squeeze(1).tolist()) == expected
    grown = sparsifier.masks["0.weight"] & ~before
    for value in optimizer.state[weight].values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            assert not value[grown].any()


def test_a_nan_gradient_of_a_pruned_weight_does_not_stay_in_its_momentum() -> None:
    sparsifier, model, optimizer = attached(Regrowth(Momentum(), ConstantDrop(0.5, 2, 1.0)))
    weight = sparsifier.weights()["0.weight"]
    for step in range(9):
        backward(model, step)
        if step == 3:
            assert weight.grad is not None
            weight.grad[~sparsifier.masks["0.weight"]] = torch.nan
        sparsifier.update(step)
        optimizer.step()
        sparsifier.apply()
        optimizer.zero_grad()
    assert torch.isfinite(optimizer.state[weight]["momentum_buffer"]).all()
    assert sparsifier.renewed == 8


def test_growth_by_momentum_that_is_all_zero_selects_free_places_all_the_same() -> None:
    """Where fewer free weights have a momentum than are to grow, the authors' code takes places that are kept."""
    model = nn.Linear(10, 1, bias=False)
    optimizer = sgd(model)
    sparsifier = Dynamic(0.5, Regrowth(Momentum(), ConstantDrop(0.5, 1, 1.0)))
    sparsifier.attach(model, optimizer, horizon=Horizon(steps=10))
    for step in range(5):
        model.weight.grad = torch.zeros(1, 10)
        sparsifier.update(step)
        optimizer.step()
        sparsifier.apply()
        assert sparsifier.density() == 0.5


def test_layers_that_do_not_learn_keep_their_masks() -> None:
    model = net()
    model[0].weight.requires_grad_(False)  # type: ignore[index]  # a Sequential
    for grow in GROW.values():
        sparsifier, model, optimizer = attached(Regrowth(grow(), ConstantDrop(0.5, 1, 1.0)), model)
        first = sparsifier.masks["0.weight"]
        for step in range(5):
            step_once(sparsifier, model, optimizer, step)
        assert torch.equal(sparsifier.masks["0.weight"], first)
        assert not torch.equal(sparsifier.masks["2.weight"], sparsifier.ever["2.weight"])


def test_a_full_layer_stays_full() -> None:
    """ERK makes small layers dense; what they drop they grow again."""
    sparsifier, model, _ = attached(Regrowth(Gradient(), ConstantDrop(0.5, 1, 1.0)), sparsity=0.3)
    full = [name for name, mask in sparsifier.masks.items() if mask.all()]
    assert full
    values = {name: sparsifier.weights()[name].detach().clone() for name in full}
    backward(model, 1)
    sparsifier.update(1)
    assert all(sparsifier.masks[name].all() for name in full)
    assert all(torch.equal(values[name], sparsifier.weights()[name]) for name in full)


def test_masks_move_on_when_the_model_trains_again() -> None:
    sparsifier, model, optimizer = attached(Regrowth(Random(), ConstantDrop(0.5, 2, 0.5)))
    for step in range(100):
        step_once(sparsifier, model, optimizer, step)
    assert sparsifier.renewed == 48
    before, ever = sparsifier.masks, sparsifier.explored()
    sparsifier.attach(model, optimizer, horizon=HORIZON)
    assert all(torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items())
    for step in range(4):
        step_once(sparsifier, model, optimizer, step)
    assert sparsifier.renewed == 2
    assert sparsifier.explored() >= ever


def test_a_schedule_prunes_on_the_way_and_moves_too() -> None:
    schedule = Cubic(start=0, end=50, every=10, initial=0.5)
    sparsifier, model, optimizer = attached(
        Regrowth(Gradient(), ConstantDrop(0.5, 10, 1.0)), sparsity=0.9, schedule=schedule
    )
    total = sum(mask.numel() for mask in sparsifier.masks.values())
    for step in range(100):
        before = sparsifier.masks
        step_once(sparsifier, model, optimizer, step)
        level = 0.9 - 0.4 * (1 - min(1.0, step // 10 * 10 / 50)) ** 3
        assert sum(masks.counts(sparsifier.masks).values()) == round((1 - level) * total)
        if step % 10 == 0 and step:
            assert any((sparsifier.masks[name] & ~mask).any() for name, mask in before.items()), "nothing was grown"


def test_state_is_one_more_bit_per_weight_and_comes_back() -> None:
    sparsifier, model, optimizer = attached(Regrowth(Random(), ConstantDrop(0.5, 2, 1.0)))
    for step in range(6):
        step_once(sparsifier, model, optimizer, step)
    state = sparsifier.state_dict()
    again = Dynamic(0.8, Regrowth(Random(), ConstantDrop(0.5, 2, 1.0)))
    again.load_state_dict(state)
    again.attach(model, optimizer, horizon=HORIZON)
    assert masks.fingerprint(again.masks) == masks.fingerprint(sparsifier.masks)
    assert again.explored() == sparsifier.explored() > 0.2
    assert again.history.rows == sparsifier.history.rows
    for step in range(6, 12):
        step_once(sparsifier, model, optimizer, step)
    assert sparsifier.explored() > again.explored()


def test_the_seed_decides_what_random_growth_takes() -> None:
    found = []
    for seed in (0, 0, 1):
        model = net()
        optimizer = sgd(model)
        sparsifier = Dynamic(0.8, Regrowth(Random(), ConstantDrop(0.5, 1, 1.0)))
        sparsifier.attach(model, optimizer, horizon=HORIZON, seed=seed)
        for step in range(3):
            step_once(sparsifier, model, optimizer, step)
        found.append(masks.fingerprint(sparsifier.masks))
    assert found[0] == found[1] != found[2]


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: RMSprop(p), lambda p: torch.optim.Adagrad(p)])
def test_momentum_without_momentum_names_what_works(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters())
    for rule in (Regrowth(Momentum()), Regrowth(Gradient(), redistribution=Proportional())):
        with pytest.raises(
            InputError, match=rf"{type(optimizer).__name__} keeps none: use SGD with momentum=0\.9, or A"
        ):
            Dynamic(0.5, rule).attach(model, optimizer, horizon=Horizon(steps=1000))


def test_momentum_without_an_optimizer() -> None:
    with pytest.raises(InputError, match=r"attach\(model, optimizer\)"):
        Dynamic(0.5, Regrowth(Momentum())).attach(net(), horizon=Horizon(steps=1000))


@pytest.mark.parametrize("sparsity", [0, 0.0001])
def test_no_free_slot(sparsity: float) -> None:
    with pytest.raises(InputError, match="no free slot to grow into"):
        Dynamic(sparsity, Regrowth(Gradient())).attach(net(), horizon=Horizon(steps=1000))


def test_more_to_grow_than_is_free() -> None:
    class Greedy(InPlace):
        def __call__(self, means: Any, kept: Any, sizes: Any, fraction: float) -> Any:
            return dict.fromkeys(kept, 1), {name: sizes[name] for name in kept}

    sparsifier, model, _ = attached(Regrowth(Gradient(), ConstantDrop(0.5, 1, 1.0), Greedy()))
    backward(model, 1)
    before = sparsifier.masks
    with pytest.raises(InputError, match=r"'0\.weight' and grows 600, but \d+ are free"):
        sparsifier.update(1)
    assert sparsifier.masks is before


def test_growing_other_than_dropping() -> None:
    class Losing(InPlace):
        def __call__(self, means: Any, kept: Any, sizes: Any, fraction: float) -> Any:
            return dict.fromkeys(kept, 2), dict.fromkeys(kept, 1)

    sparsifier, model, _ = attached(Regrowth(Gradient(), ConstantDrop(0.5, 1, 1.0), Losing()))
    backward(model, 1)
    with pytest.raises(InputError, match="drops 6 weights and grows 3"):
        sparsifier.update(1)


def test_a_sparsity_that_the_distribution_cannot_meet_is_refused_before_training() -> None:
    with pytest.raises(InputError, match="it empties layers"):
        Dynamic(0.999, Regrowth(Gradient()), Uniform()).attach(net(), sgd(net()), horizon=Horizon(steps=1000))


def test_no_target_that_learns() -> None:
    sparsifier, model, _ = attached(
        Regrowth(Gradient(), ConstantDrop(0.5, 1, 1.0)), targets=Targets(include=["0.weight"])
    )
    model[0].weight.requires_grad_(False)  # type: ignore[index]  # a Sequential
    backward(model, 1)
    with pytest.raises(InputError, match="no target has what Gradient grows by at step 1"):
        sparsifier.update(1)


def test_in_time_is_long_and_does_not_stop() -> None:
    plan = InTime().plan(Horizon(steps=97_750))
    assert list(plan)[:2] == [4000, 8000]
    assert max(plan) == 96_000
    assert 0.005 < plan[96_000] < plan[4000] < 0.5


def test_a_weight_grown_by_its_gradient_takes_its_first_step_by_the_next_one() -> None:
    for grow, waits in ((Gradient(), True), (Random(), False), (Momentum(), False)):
        sparsifier, model, optimizer = attached(Regrowth(grow, ConstantDrop(0.5, 2, 1.0)))
        for step in range(4):
            before = sparsifier.masks["0.weight"]
            step_once(sparsifier, model, optimizer, step)
            if step == 2:
                grown = sparsifier.masks["0.weight"] & ~before
                assert grown.any()
                assert waits == (not sparsifier.weights()["0.weight"][grown].any())
        assert sparsifier.weights()["0.weight"][grown].any()
