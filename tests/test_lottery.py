"""Rounds of pruning and rewinding, step by step."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsity import Horizon, InputError, masks
from sparsity.distributions import Global
from sparsity.lottery import Lottery, Particles
from tests.nets import Small, small

TOTAL = 9  # epochs, of two steps
State = dict[str, Tensor]


class Run:
    """A model in training by other batches at every step."""

    def __init__(self, **settings: Any) -> None:
        self.model: Small = small()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.002, momentum=0.9)
        self.sparsifier = Lottery(**settings)
        self.step = 0
        self.rewinds: list[int] = []  # after which epoch
        self.recomputed: list[State] = []

    def attach(self, total: int = TOTAL) -> "Run":
        self.sparsifier.attach(self.model, self.optimizer, horizon=Horizon(2 * total, 2))
        return self

    def train(self) -> State:
        """An epoch; the weights it ends with."""
        for _ in range(2):
            generator = torch.Generator().manual_seed(self.step)
            self.optimizer.zero_grad()
            self.model(torch.randn(5, 6, generator=generator)).square().sum().backward()
            self.sparsifier.update(self.step)
            self.optimizer.step()
            self.sparsifier.apply()
            self.step += 1
        return self.state()

    def epoch(self) -> State:
        trained = self.train()
        self.sparsifier.collect(lambda: self.recomputed.append(self.state()))
        if self.sparsifier.end_epoch():
            self.rewinds.append(self.step // 2)
            self.optimizer.state.clear()
        return trained

    def state(self) -> State:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def kept(state: State, count: int) -> masks.Masks:
    """The largest magnitudes of both layers, the slow way."""
    flat = sorted((abs(float(v)), n, i) for n in NAMES for i, v in enumerate(state[n].flatten()))[-count:]
    found = {name: torch.zeros_like(state[name], dtype=torch.bool) for name in NAMES}
    for _, name, place in flat:
        found[name].view(-1)[place] = True
    return found


NAMES = ("first.weight", "last.weight")


def same(one: State, other: State) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_rounds_end_with_pruning_and_go_back_to_the_ticket() -> None:
    run = Run(sparsity=0.6, rate=0.5, rewind="1ep", distribution=Global()).attach()  # 7 = 3 + 2 + 2 epochs fit
    sparsifier = run.sparsifier
    assert (sparsifier.length, sparsifier.rewound) == (3, 1)
    ticket = run.epoch()
    run.epoch()
    trained = run.epoch()
    for round_, count in ((1, 36), (2, 29)):
        expected = kept(trained, count)
        assert masks.fingerprint(sparsifier.masks) == masks.fingerprint(expected)
        start = {name: v * expected[name] if name in expected else v for name, v in ticket.items()}
        assert same(run.state(), start), "weights and buffers are the ticket's"
        assert sparsifier.round == round_
        assert not sparsifier.done()
        run.epoch()
        trained = run.epoch()
    assert sparsifier.done()
    assert run.rewinds == [3, 5]
    assert same(run.state(), trained), "the last round stays as it was trained"
    assert sparsifier.renewed == sparsifier.last_renewal() == 9
    assert [sparsifier.target(step) for step in (4, 5, 8, 9)] == [0.0, 0.5, 0.5, 0.6]


def test_a_mask_comes_from_the_mean_of_all_particles_over_their_last_epochs() -> None:
    run = Run(sparsity=0.5, rate=0.5, rewind="1ep", particles=Particles(2, 0.5)).attach(11)  # 5 + 3 * ... of length 3
    assert (run.sparsifier.length, run.sparsifier.rewound) == (3, 1)
    ticket = run.epoch()
    samples = [run.epoch(), run.epoch()][-2:]
    assert same(run.state(), ticket), "the second particle begins where the first did"
    samples += [run.epoch(), run.epoch()]
    mean = {name: torch.stack([each[name].double() for each in samples]).mean(0).float() for name in NAMES}
    [before] = run.recomputed
    for name in NAMES:
        torch.testing.assert_close(before[name], mean[name])
    assert masks.fingerprint(run.sparsifier.masks) == masks.fingerprint(kept(mean, 36))
    samples = [run.epoch() for _ in range(4)]
    assert run.sparsifier.done()
    assert run.rewinds == [3, 5, 7]
    for name in NAMES:
        expected = torch.stack([each[name].double() for each in samples]).mean(0).float()
        torch.testing.assert_close(run.state()[name], expected)
        assert not run.state()[name][~run.sparsifier.masks[name]].any()


@pytest.mark.parametrize("when", range(1, 9))
@pytest.mark.parametrize("particles", [None, Particles(2, 0.5)])
def test_a_saved_state_goes_on_between_rounds_and_inside_of_one(when: int, particles: Particles | None) -> None:
    settings: dict[str, Any] = {"sparsity": 0.5, "rate": 0.5, "rewind": "1ep", "particles": particles}
    whole = Run(**settings).attach()
    for _ in range(when):
        whole.epoch()
    again = Run(**settings)
    again.model.load_state_dict(whole.model.state_dict())
    again.optimizer.load_state_dict(deepcopy(whole.optimizer.state_dict()))
    again.step = whole.step
    again.sparsifier.load_state_dict(whole.sparsifier.state_dict())
    again.attach()
    for _ in range(when, TOTAL):
        assert same(whole.epoch(), again.epoch())
    assert whole.sparsifier.done()
    assert again.sparsifier.done()
    assert masks.fingerprint(whole.sparsifier.masks) == masks.fingerprint(again.sparsifier.masks)
    assert same(whole.state(), again.state())
    assert again.sparsifier.target(100) == 0.5


def test_what_cannot_be_is_said_before_training() -> None:
    with pytest.raises(InputError, match=r"count must be at least 1, got 0"):
        Particles(0)
    with pytest.raises(InputError, match=r"averaged is a fraction of a round"):
        Particles(2, 1.5)
    with pytest.raises(InputError, match=r"11 rounds .* are 12 trainings .* do not fit into 9 epochs: train longer"):
        Run(sparsity=0.9).attach()
    with pytest.raises(InputError, match=r"rewind='9ep' on, which do not fit into 9 epochs"):
        Run(sparsity=0.5, rate=0.5, rewind="9ep").attach()
    with pytest.raises(InputError, match=r"rewind is in epochs .* got 500"):
        Run(sparsity=0.5, rewind=500).attach()
    with pytest.raises(InputError, match=r"rate must lie in \(0, 1\)"):
        Lottery(0.5, rate=1.0)
    with pytest.raises(InputError, match=r"sparsity=0 leaves nothing"):
        Lottery(0.0)
    with pytest.raises(InputError, match="set max_epochs"):
        Lottery(0.5).attach(small())
    state = Run(sparsity=0.5, rate=0.5).attach().sparsifier.state_dict()
    with pytest.raises(InputError, match=r"of rounds with {'rate': 0.5.*this run has {'rate': 0.2"):
        Lottery(0.5).load_state_dict(state)
    del state["ticket"]
    with pytest.raises(InputError, match="the saved state has no rounds"):
        Lottery(0.5, rate=0.5).load_state_dict(state)
