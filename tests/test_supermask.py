"""Masks learned over weights that are not, step by step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks import EdgePopup, LotteryJackpot, SignedSupermask, Sparsify
from sparsity import Horizon, InputError, masks
from sparsity.companion import Companion
from sparsity.distributions import Global
from sparsity.supermask import Jackpot, Signed, Supermask
from tests.nets import Batches, Small, Task, small, task, trainer

KINDS: dict[str, Any] = {
    "EdgePopup": lambda **more: Supermask(0.5, **more),
    "signed": lambda **more: Signed(0.5, **more),
    "jackpot": lambda **more: Jackpot(0.5, **more),
}
every = pytest.mark.parametrize("name", KINDS)


def attach(name: str, **more: Any) -> tuple[Small, Supermask, torch.optim.Optimizer]:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier: Supermask = KINDS[name](**more)
    sparsifier.attach(model, optimizer, horizon=Horizon(20))
    return model, sparsifier, optimizer


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def step(model: Small, sparsifier: Supermask, optimizer: torch.optim.Optimizer, number: int) -> float:
    inputs, labels = batch()
    optimizer.zero_grad()
    loss: Any = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    sparsifier.update(number)
    optimizer.step()
    sparsifier.apply()
    return float(loss.detach())


def through(scores: Tensor, mask: Tensor) -> Tensor:
    """A hard mask whose gradient goes straight through to the scores."""
    return mask + scores - scores.detach()


@every
def test_scores_have_the_straight_through_gradient(name: str) -> None:
    """Against a graph that multiplies weights by masks."""
    model, sparsifier, optimizer = attach(name, companion=Companion(1.0, 0.0))
    before = {key: each.detach().clone() for key, each in sparsifier.learned.items()}
    reference, inputs, labels = small(), *batch()
    scores = {key: value.clone().requires_grad_() for key, value in before.items()}
    dense = {key: sparsifier.dense[key].clone() for key in scores}
    hard = {}
    for key, score in scores.items():
        kept = sparsifier.masks[key].float()
        if name == "signed":
            hard[key] = dense[key] * through(score, kept * score.detach().sign())
        else:
            hard[key] = dense[key] * through(score.abs() if name == "EdgePopup" else score, kept)
    outputs = torch.func.functional_call(reference, hard, (inputs,))
    loss: Any = nn.functional.cross_entropy(outputs, labels)
    loss.backward()
    step(model, sparsifier, optimizer, 0)
    for key, score in scores.items():
        assert score.grad is not None
        torch.testing.assert_close(sparsifier.learned[key].detach(), before[key] - 0.5 * score.grad)


@every
def test_only_scores_are_trained_and_the_loss_falls(name: str) -> None:
    model, sparsifier, optimizer = attach(name, companion=Companion(1.0 if name != "jackpot" else 0.02, 0.0))
    fixed = {key: value.clone() for key, value in model.state_dict().items() if "weight" in key or "bias" in key}
    dense = {key: value.clone() for key, value in sparsifier.dense.items()}
    first = {key: mask.clone() for key, mask in sparsifier.masks.items()}
    losses = [step(model, sparsifier, optimizer, number) for number in range(20)]
    assert losses[-1] < losses[0] - 0.02
    assert masks.fingerprint(first) != masks.fingerprint(sparsifier.masks)
    for key, value in model.state_dict().items():
        if key in sparsifier.masks:
            shown = value.abs() if name == "signed" else value
            wanted = dense[key].abs() if name == "signed" else dense[key]
            assert torch.equal(shown, wanted * sparsifier.masks[key])
            assert torch.equal(sparsifier.dense[key], dense[key])
        elif key in fixed:
            assert torch.equal(value, fixed[key])
    assert not optimizer.state or not any(
        v.any() for s in optimizer.state.values() for v in s.values() if v is not None
    )
    assert masks.counts(sparsifier.masks) == masks.counts(first)
    model.first.weight.data.fill_(7.0)
    sparsifier.enforce()
    assert not (model.first.weight == 7).any()


def test_signed_weights_have_the_sign_of_the_score_also_after_a_resume() -> None:
    model, sparsifier, optimizer = attach("signed", constant=True)
    for number in range(5):
        step(model, sparsifier, optimizer, number)
    size = math.sqrt(3 / 6)
    kept = sparsifier.masks["first.weight"]
    assert torch.allclose(model.first.weight[kept].abs(), torch.tensor(size))
    signs = small().first.weight.sign() * sparsifier.learned["first.weight"].sign()
    assert torch.equal(model.first.weight.sign(), signs * kept)
    again, other = small(5), Signed(0.5, constant=True)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(sparsifier.state_dict())
    other.attach(again, torch.optim.SGD(again.parameters(), lr=0.5), horizon=Horizon(20))
    for key in sparsifier.masks:
        assert torch.equal(other.dense[key], sparsifier.dense[key])
    assert torch.equal(again.first.weight, model.first.weight)


def test_a_jackpot_begins_at_the_largest_magnitudes() -> None:
    _, sparsifier, _ = attach("jackpot")
    plain = small()
    flat = torch.cat([plain.first.weight.flatten(), plain.last.weight.flatten()]).detach().abs()
    threshold = flat.sort(descending=True).values[35]
    assert torch.equal(sparsifier.masks["first.weight"], plain.first.weight.abs() >= threshold)
    assert set(sparsifier.learned["last.weight"].flatten().tolist()) == set(torch.tensor([1.0, 0.99]).tolist())


def test_a_jackpots_mask_moves_by_the_best_pairs() -> None:
    sparsifier = Jackpot(0.5)
    now = torch.tensor([True, True, True, False, False, False])
    scores = torch.tensor([0.1, 0.9, 0.2, 0.5, 0.8, 0.7])
    best = torch.tensor([False, True, False, False, True, True])  # two pairs: 4 for 0, 5 for 2
    assert sparsifier._towards(now, best, scores, 0.5).tolist() == [False, True, True, False, True, False]
    assert torch.equal(sparsifier._towards(now, best, scores, 1.0), best)
    assert torch.equal(sparsifier._towards(now, best, scores, 0.0), now)


@pytest.mark.parametrize("make", [EdgePopup, SignedSupermask, LotteryJackpot])
def test_a_trainers_module_keeps_everything_but_its_masks(make: Callable[[float], Sparsify]) -> None:
    model, method = task(), make(0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer(method, gradient_clip_val=0.1).fit(model, Batches())
    for key, value in model.state_dict().items():
        if key.endswith("bias"):
            assert torch.equal(value, before[key])
    assert method.sparsifier.density() == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("make", [EdgePopup, SignedSupermask])
def test_frozen_layers_keep_their_largest_magnitudes(make: Callable[[float], Sparsify]) -> None:
    model, method = task(), make(0.5)
    weight = model.net.frozen.weight.detach().clone()
    trainer(method).fit(model, Batches())
    kept = method.sparsifier.masks["net.frozen.weight"]
    threshold = weight.abs().flatten().sort(descending=True).values[127]
    assert torch.equal(kept, weight.abs() >= threshold)
    assert torch.equal(model.net.frozen.weight, weight * kept)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InputError, match="no optimizer holds a target weight that requires a gradient"):
        Supermask(0.5).attach(small())
    with pytest.raises(InputError, match="annealed over a training without end"):
        Jackpot(0.5).attach(small(), torch.optim.SGD(small().parameters(), lr=0.1))
    _, sparsifier, _ = attach("EdgePopup")
    state = sparsifier.state_dict()
    with pytest.raises(InputError, match="finds its masks while it trains"):
        LotteryJackpot(0.5, distribution=Global()).prune(Task())
    del state["scores"]
    with pytest.raises(InputError, match="the saved state has no scores"):
        Supermask(0.5).load_state_dict(state)
