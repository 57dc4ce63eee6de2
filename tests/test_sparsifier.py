import copy

import pytest
import torch
from torch import nn

from sparsity import Horizon, InputError, Sparsifier, Targets, masks
from sparsity.constant import Kept
from sparsity.distributions import ERK, Global, Uniform
from sparsity.schedules import Constant, Cubic, Linear, Once
from sparsity.scores import Lamp, Magnitude, Random


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def linear(model: nn.Sequential, index: int) -> nn.Linear:
    layer = model[index]
    assert isinstance(layer, nn.Linear)
    return layer


def train(model: nn.Module, sparsifier: Sparsifier, steps: int, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        model(torch.randn(5, 8, generator=generator)).square().mean().backward()
        sparsifier.update(step)
        optimizer.step()
        sparsifier.apply()
        optimizer.zero_grad()


def test_plain_loop_prunes_to_the_exact_count_and_keeps_zeros() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(0.9, Lamp(), schedule=Linear(0, 8, 2))
    sparsifier.attach(model, optimizer, horizon=Horizon(steps=12))
    train(model, sparsifier, 12, optimizer)
    kept = sum(int(p.count_nonzero()) for p in (linear(model, 0).weight, linear(model, 2).weight))
    assert kept == round(0.1 * (8 * 16 + 16 * 4)) == 19
    assert sparsifier.density() == 19 / 192
    state = optimizer.state[linear(model, 0).weight]
    assert not state["exp_avg"][linear(model, 0).weight == 0].any()
    assert not state["exp_avg_sq"][linear(model, 0).weight == 0].any()


def test_masks_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    linear(model, 0).weight.data = torch.tensor([[1.0, -5.0, 2.0, 0.5], [3.0, 3.0, -0.1, 4.0]])
    sparsifier = Sparsifier(0.5)
    sparsifier.attach(model)
    assert sparsifier.masks["0.weight"].tolist() == [[False, True, False, False], [True, True, False, True]]
    assert linear(model, 0).weight.tolist() == [[0.0, -5.0, 0.0, 0.0], [3.0, 3.0, 0.0, 4.0]]


def test_a_pruned_weight_does_not_return_even_behind_a_kept_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    linear(model, 0).weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    sparsifier = Sparsifier(0.75, schedule=Linear(0, 4, 2))
    sparsifier.attach(model, horizon=Horizon(6))
    sparsifier.update(2)
    assert sparsifier.masks["0.weight"].tolist() == [[False, True, True, True]] or sparsifier.density() == 0.5
    first = sparsifier.masks["0.weight"].clone()
    linear(model, 0).weight.data[first] = 0.0
    sparsifier.update(4)
    assert sparsifier.density() == 0.25
    assert bool((sparsifier.masks["0.weight"] <= first).all())


def test_sparsity_is_absolute_and_attaching_again_does_not_compound() -> None:
    model = net()
    sparsifier = Sparsifier(0.5)
    sparsifier.attach(model)
    before = masks.fingerprint(sparsifier.masks)
    sparsifier.attach(model)
    assert (sparsifier.density(), masks.fingerprint(sparsifier.masks)) == (0.5, before)
    other = Sparsifier(0.5)
    other.attach(model)
    assert masks.fingerprint(other.masks) == before


def test_another_model_starts_afresh() -> None:
    sparsifier = Sparsifier(0.5)
    sparsifier.attach(net(0))
    before = masks.fingerprint(sparsifier.masks)
    sparsifier.attach(net(1))
    assert sparsifier.density() == 0.5
    assert masks.fingerprint(sparsifier.masks) != before


def test_gradients_are_masked_before_the_step() -> None:
    model = net()
    sparsifier = Sparsifier(0.5)
    sparsifier.attach(model)
    model(torch.randn(3, 8)).sum().backward()
    sparsifier.update(0)
    for name, weight in sparsifier.weights().items():
        assert weight.grad is not None
        assert not weight.grad[~sparsifier.masks[name]].any()
        assert weight.grad[sparsifier.masks[name]].any()


def test_a_renewal_waits_for_finite_gradients_and_is_made_up_for() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(0.8, schedule=Once(at=1))
    sparsifier.attach(model, optimizer, horizon=Horizon(4))
    model(torch.randn(3, 8)).sum().backward()
    bias = linear(model, 2).bias
    assert bias.grad is not None
    bias.grad[0] = float("inf")
    sparsifier.update(1)
    assert sparsifier.density() == 1.0
    optimizer.zero_grad()
    model(torch.randn(3, 8)).sum().backward()
    sparsifier.update(2)
    assert sparsifier.density() == pytest.approx(0.2, abs=1 / 192)


def test_state_before_or_after_attach_is_the_same() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    original = Sparsifier(0.75, Random(), schedule=Once(at=2))
    original.attach(model, optimizer, horizon=Horizon(9), seed=4)
    train(model, original, 4, optimizer)
    state = copy.deepcopy(original.state_dict())
    for early in (True, False):
        sparsifier, fresh = Sparsifier(0.75, Random(), schedule=Once(at=2)), net()
        if early:
            sparsifier.load_state_dict(state)
        sparsifier.attach(fresh, horizon=Horizon(9), seed=4)
        if not early:
            sparsifier.load_state_dict(state)
        assert masks.fingerprint(sparsifier.masks) == masks.fingerprint(original.masks)
        assert sparsifier.renewed == original.renewed == 2
        assert not any(w[~sparsifier.masks[n]].any() for n, w in sparsifier.weights().items())


def test_state_of_another_model_is_refused() -> None:
    sparsifier = Sparsifier(0.5)
    sparsifier.attach(net())
    other = Sparsifier(0.5)
    other.load_state_dict(sparsifier.state_dict())
    with pytest.raises(InputError, match=r"the saved state is for another model.*'0.weight' has shape \(16, 8\)"):
        other.attach(nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 4)))


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, 90, "0.9", True, float("nan")])
def test_sparsity_outside_of_zero_to_one_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match=r"must lie in \[0, 1\), got"):
        Sparsifier(sparsity)


@pytest.mark.parametrize(
    ("sparsifier", "message"),
    [
        (Sparsifier(0.9, pattern="2:4"), "pattern 2:4 keeps at least 96 of 192 .* sparsity of at most 0.5"),
        (Sparsifier(0.5, pattern="3:5"), r"'0.weight' of shape \(16, 8\)"),
        (Sparsifier(0.99, distribution=Global(minimum=0.01)), "the highest that can is 0.979166"),
        (Sparsifier(0.995, distribution=Uniform()), "sparsity 0.995 .*the highest that can is 0.989583"),
        (Sparsifier(0.999), "keeps none"),
        (Sparsifier(0.9, targets=Targets(include=["body.*"])), r"'body.\*' matches no parameter"),
        (Sparsifier(0.9, schedule=Linear(0, 100, 10)), "end=100 is step 100, after the end of training at step 50"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_met_is_refused_before_training(sparsifier: Sparsifier, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sparsifier.attach(net(), horizon=Horizon(steps=50))


def test_nan_weights_are_refused_by_name_and_nothing_is_lost() -> None:
    model = net()
    sparsifier = Sparsifier(0.5, Magnitude(), schedule=Once(at=3))
    sparsifier.attach(model, horizon=Horizon(9))
    before = linear(model, 0).weight.clone()
    linear(model, 2).weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"'2.weight' cannot be ranked: 1 of its 64 weights"):
        sparsifier.update(3)
    assert torch.equal(linear(model, 0).weight, before)
    assert sparsifier.density() == 1.0


def test_static_random_masks_depend_on_the_seed_alone() -> None:
    found = {}
    for seed in (0, 1):
        for weights in (0, 1):
            sparsifier = Sparsifier(0.8, Random(), ERK(), schedule=Constant())
            sparsifier.attach(net(weights), seed=seed)
            found[seed, weights] = masks.fingerprint(sparsifier.masks)
    assert found[0, 0] == found[0, 1] != found[1, 0] == found[1, 1]


def test_the_target_follows_the_schedule() -> None:
    sparsifier = Sparsifier(0.9, schedule=Cubic(10, 20, 5))
    sparsifier.attach(net(), horizon=Horizon(30))
    assert [sparsifier.target(step) for step in (0, 9, 10, 15, 19, 20, 29)] == [
        0, 0, 0, pytest.approx(0.9 * (1 - 0.5**3)), pytest.approx(0.9 * (1 - 0.5**3)), 0.9, 0.9,
    ]  # fmt: skip


def test_zero_sparsity_is_dense() -> None:
    sparsifier = Sparsifier(0.0)
    sparsifier.attach(net())
    assert sparsifier.density() == 1.0


def test_kept_masks_refuse_a_dense_model_and_another_sparsity() -> None:
    with pytest.raises(InputError, match="no pruned weights, so there is nothing to keep"):
        Kept().attach(net())
    model = net()
    Sparsifier(0.75).attach(model)
    with pytest.raises(InputError, match=r"expected masks of sparsity 0.9, found 0.7500"):
        Kept(sparsity=0.9).attach(model)
    kept = Kept(sparsity=0.75)
    kept.attach(model)
    assert kept.density() == 0.25
    assert kept.sparsity == 0.75


def test_kept_masks_from_a_file(tmp_path: "object") -> None:
    path = f"{tmp_path}/masks.safetensors"
    pruned = Sparsifier(0.5)
    pruned.attach(net(1))
    masks.save(pruned.masks, path)
    kept, model = Kept(path), net(0)
    kept.attach(model)
    assert masks.fingerprint(kept.masks) == masks.fingerprint(pruned.masks)
    assert not any(w[~kept.masks[n]].any() for n, w in kept.weights().items())
    with pytest.raises(InputError, match=r"the mask file '.*masks.safetensors' is for another model"):
        Kept(path).attach(nn.Sequential(nn.Linear(8, 8)))
