"""The phases of adaptive regularisation, step by step."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsity import Horizon, InputError, masks
from sparsity.adaptive import ADAPTIVE, FINE_TUNING, WARM_UP, Adaptive, Phases
from sparsity.distributions import Global
from sparsity.moments import Moment
from sparsity.penalties import HyperSparsity, Lasso, hypersparse_gradient
from tests.nets import small

HORIZON = Horizon(steps=40, per_epoch=4)  # ten epochs


class Run:
    """A model in training: every epoch moves all of its weights by a little."""

    def __init__(self, sparsity: float = 0.9, **settings: Any) -> None:
        self.model = small()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.002, momentum=0.9)
        self.sparsifier = Adaptive(sparsity, **settings)
        self.step = 0

    def attach(self) -> "Run":
        self.sparsifier.attach(self.model, self.optimizer, horizon=HORIZON)
        return self

    def epoch(self, pruned: float | None = None, dense: float | None = None) -> None:
        for _ in range(4):
            generator = torch.Generator().manual_seed(self.step)
            loss = self.model(torch.randn(5, 6, generator=generator)).square().sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.sparsifier.update(self.step)
            self.optimizer.step()
            self.sparsifier.apply()
            self.step += 1
        self.sparsifier.end_epoch(pruned, dense)

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


PHASES = Phases("2ep", "3ep", 1)


def test_the_middle_of_the_best_window_is_pruned_and_fine_tuned() -> None:
    run = Run(phases=PHASES, distribution=Global()).attach()
    sparsifier, states = run.sparsifier, []
    for _ in range(2):
        assert sparsifier.phase == WARM_UP
        run.epoch()
    # Windows of three: means .2, .4, .3; the middle of the best is the third epoch of the phase.
    for quality in (0.1, 0.2, 0.3, 0.7):
        assert sparsifier.phase == ADAPTIVE
        assert sparsifier.density() == 1
        run.epoch(quality, dense=0.9)
        states.append(run.state())
    run.epoch(-0.1, dense=0.9)  # the fifth, after which only the fine-tuning is left
    assert sparsifier.phase == FINE_TUNING
    assert sparsifier.chosen == 5
    assert sparsifier.story()["fine_tuning_from_epoch"] == 7
    magnitudes = torch.cat([states[2][f"{n}.weight"].flatten() for n in ("first", "last")]).abs()
    kept = round(0.1 * 72)
    threshold = magnitudes.sort(descending=True).values[kept - 1]
    for name, value in run.model.state_dict().items():
        expected = states[2][name]
        if name in sparsifier.masks:
            expected = expected * (expected.abs() >= threshold)
        assert torch.equal(value, expected)
    assert sum(masks.counts(sparsifier.masks).values()) == kept
    for _ in range(3):
        assert not sparsifier.done()
        run.epoch()
        assert run.model.nonzero() <= kept
    assert sparsifier.done()


def test_it_ends_as_soon_as_the_pruned_network_is_as_good_as_the_dense_one() -> None:
    run = Run(phases=PHASES).attach()
    run.epoch()
    run.epoch()
    for dense in (0.0, 0.0, 1.0):  # before a window is full there is nothing to compare
        run.epoch(1.0, dense)
    assert run.sparsifier.phase == FINE_TUNING
    assert run.sparsifier.chosen == 4
    assert run.sparsifier.ends == 8
    assert run.sparsifier.target(run.step) == 0.9
    assert run.sparsifier.target(run.step - 2) == 0.0


@pytest.mark.parametrize("penalty", [HyperSparsity(0.01, 1.5), Lasso(0.02, 2.0)])
def test_the_penalty_is_added_to_the_gradient_and_grows_with_every_epoch(penalty: Any) -> None:
    run = Run(phases=Phases("1ep", "1ep", 1), penalty=penalty).attach()
    run.epoch()
    for epoch in range(2):
        weights = run.sparsifier.weights()
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        run.sparsifier.update(run.step)
        values = [weight.detach() for weight in weights.values()]
        pulls = [v.sign() for v in values] if isinstance(penalty, Lasso) else hypersparse_gradient(values, 0.9)
        for weight, pull in zip(weights.values(), pulls, strict=True):
            assert weight.grad is not None
            strength = penalty.strength * penalty.growth**epoch
            torch.testing.assert_close(weight.grad, 1 + strength * pull)
        run.epoch(0.0, 1.0)


def test_no_penalty_in_the_other_phases_and_for_another_optimizers_weights() -> None:
    run = Run(phases=Phases("1ep", "1ep", 0), penalty=Lasso(1.0)).attach()
    first, last = run.sparsifier.weights().values()
    other = torch.optim.SGD([first], lr=0.1)

    def pulled() -> list[bool]:
        for weight in (first, last):
            weight.grad = torch.zeros_like(weight)
        run.sparsifier.update(run.step, other)
        return [bool(weight.grad.any()) for weight in (first, last) if weight.grad is not None]

    assert pulled() == [False, False]
    run.epoch()
    assert pulled() == [True, False]
    run.epoch(1.0, 0.0)
    assert run.sparsifier.phase == FINE_TUNING
    assert pulled() == [False, False]


def test_a_look_at_the_pruned_network_changes_nothing() -> None:
    run = Run(phases=Phases("1ep", "1ep", 0)).attach()
    run.epoch()
    before = run.state()
    with run.sparsifier.pruned():
        assert run.model.nonzero() == 7
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    with pytest.raises(KeyError), run.sparsifier.pruned():
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_phase_with_the_last_good_network() -> None:
    run = Run(phases=PHASES).attach()
    run.epoch()
    run.epoch()
    run.epoch(0.5, 0.9)
    good = run.state()
    for parameter in run.model.parameters():
        parameter.data.fill_(math.nan)
    with pytest.warns(UserWarning, match="NaN or infinite in epoch 3: regularisation ends"):
        run.sparsifier.end_epoch(math.nan, math.nan)
    assert run.sparsifier.phase == FINE_TUNING
    assert run.sparsifier.story()["because"] == "the loss was not finite"
    assert torch.equal(run.model.state_dict()["first.bias"], good["first.bias"])
    assert run.sparsifier.density() == 7 / 72

    early = Run(phases=PHASES).attach()
    early.epoch()
    early.epoch()
    with pytest.raises(InputError, match="there is no network to go back to"):
        early.epoch(math.nan, math.nan)


@pytest.mark.parametrize("when", range(1, 9))
def test_a_saved_state_goes_on_in_every_phase(when: int) -> None:
    qualities: dict[int, tuple[float, float]] = {2: (0.1, 0.9), 3: (0.2, 0.9), 4: (0.4, 0.9), 5: (0.9, 0.45)}
    whole = Run(phases=PHASES).attach()
    for epoch in range(when):
        whole.epoch(*qualities.get(epoch, (None, None)))
    again = Run(phases=PHASES)
    again.model.load_state_dict(whole.model.state_dict())
    again.optimizer.load_state_dict(deepcopy(whole.optimizer.state_dict()))  # it takes over the tensors
    again.step = whole.step
    again.sparsifier.load_state_dict(whole.sparsifier.state_dict())
    again.attach()
    for epoch in range(when, 9):
        for run in (whole, again):
            run.epoch(*qualities.get(epoch, (None, None)))
        assert whole.sparsifier.phase == again.sparsifier.phase
    assert whole.sparsifier.chosen == again.sparsifier.chosen == 5
    assert masks.fingerprint(whole.sparsifier.masks) == masks.fingerprint(again.sparsifier.masks)
    assert all(torch.equal(v, again.model.state_dict()[name]) for name, v in whole.model.state_dict().items())
    assert whole.sparsifier.done()
    assert again.sparsifier.done()


def test_the_state_of_another_phases_configuration_is_refused() -> None:
    run = Run(phases=PHASES).attach()
    for _ in range(2):
        run.epoch()
    state = run.sparsifier.state_dict()
    with pytest.raises(InputError, match=r"is in its adaptive phase with .*'2ep'.*, this run has .*'4ep'"):
        Adaptive(0.9, phases=Phases("4ep", "3ep", 1)).load_state_dict(state)
    with pytest.raises(InputError, match="'penalty': 'Lasso'"):
        Adaptive(0.9, Lasso(), PHASES).load_state_dict(state)
    plain = {key: value for key, value in state.items() if key in ("masks", "renewed", "seed", "sparsity", "history")}
    with pytest.raises(InputError, match="the saved state has no phases"):
        Adaptive(0.9).load_state_dict(plain)


def test_what_cannot_be_is_said_before_training() -> None:
    model = small()
    with pytest.raises(InputError, match=r"take 6 and 3 of 10 epochs and leave 1 .* train for 12 epochs or more"):
        Adaptive(0.9, phases=Phases("6ep", "3ep")).attach(model, horizon=HORIZON)
    with pytest.raises(InputError, match="take 12 and 3 of 10"):
        Adaptive(0.9, phases=Phases("12ep", "3ep")).attach(model, horizon=HORIZON)
    with pytest.raises(InputError, match=r"warm_up is in epochs .* got 100"):
        Adaptive(0.9, phases=Phases(100, "3ep")).attach(model, horizon=HORIZON)
    with pytest.raises(InputError, match="set max_epochs"):
        Adaptive(0.9).attach(model)
    with pytest.raises(InputError, match="window counts epochs"):
        Phases(window=-1)
    with pytest.raises(InputError, match="sparsity=0 leaves nothing"):
        Adaptive(0.0)
    nn.init.zeros_(model.first.weight)
    with pytest.raises(InputError, match=r"at the quantile of sparsity=0.5 is zero: 0.6667 of the weights"):
        Adaptive(0.5).attach(model, horizon=HORIZON)


def test_every_layer_keeps_a_weight_unless_told_otherwise() -> None:
    flat = nn.Linear(50, 50)
    nn.init.constant_(flat.weight, 1e-3)
    model = nn.Sequential(flat, nn.Linear(50, 50))
    sparsifier = Adaptive(0.99, phases=Phases("0ep", "1ep", 0))
    sparsifier.attach(model, horizon=HORIZON)
    sparsifier.end_epoch(1.0, 0.0)
    assert masks.counts(sparsifier.masks) == {"0.weight": 1, "1.weight": 49}


def test_a_mean_of_moments_is_the_mean_and_what_is_counted_is_the_lasts() -> None:
    models = [small(seed) for seed in range(3)]
    models[2].norm.register_buffer("num_batches_tracked", torch.tensor(7))
    mean = Moment(models[0], 1)
    for model in models[1:]:
        mean.average(model)
    assert mean.number == 3
    mean.restore(models[0])
    expected = torch.stack([small(seed).first.weight for seed in range(3)]).mean(0)
    torch.testing.assert_close(models[0].first.weight, expected)
    assert models[0].norm.num_batches_tracked == 7
    with pytest.raises(InputError, match="another model's: it has nothing for 'weight'"):
        Moment.from_state(mean.state_dict(None)).place(nn.Linear(2, 2))
