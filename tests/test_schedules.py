import re

import pytest

from sparsity import InputError
from sparsity.schedules import (
    Constant,
    ConstantDrop,
    CosineDrop,
    Cubic,
    Horizon,
    Iterative,
    Linear,
    LinearDrop,
    Once,
    Plan,
    Schedule,
    Time,
)

TRAINING = Horizon(steps=1000, per_epoch=20)
ENDLESS = Horizon()


def rounded(plan: Plan) -> Plan:
    return {step: round(sparsity, 12) for step, sparsity in plan.items()}


@pytest.mark.parametrize(
    ("time", "step"),
    [
        (0, 0),
        (100, 100),
        (999, 999),
        (1000, 999),  # the end of training is its last step
        (0.0, 0),
        (0.75, 750),
        (0.0006, 1),
        (1.0, 999),
        ("5ep", 100),
        ("2.5ep", 50),
        (" 0 ep ", 0),
        ("50ep", 999),
    ],
)
def test_times_in_a_training_of_1000_steps(time: Time, step: int) -> None:
    assert TRAINING.step(time, "end") == step


@pytest.mark.parametrize(
    ("time", "length"), [(0, 0), (1000, 1000), (1.0, 1000), (0.01, 10), ("50ep", 1000), ("0.5ep", 10)]
)
def test_lengths_are_not_cut_to_the_last_step(time: Time, length: int) -> None:
    assert TRAINING.length(time, "every") == length


def test_steps_need_no_horizon() -> None:
    assert ENDLESS.step(10**9, "end") == 10**9
    assert Horizon(per_epoch=7).step("3ep", "end") == 21


@pytest.mark.parametrize(
    "time", [-1, -0.1, 1.5, float("nan"), True, False, "5", "5 epochs", "ep", "-1ep", "", None, [1]]
)
def test_what_is_no_time_is_refused(time: Time) -> None:
    message = (
        r'^at must be steps \(an int >= 0\), a fraction \(a float in \[0, 1\]\) or epochs \("5ep"\); '
        rf"got {re.escape(repr(time))}$"
    )
    with pytest.raises(ValueError, match=message):
        TRAINING.step(time, "at")


@pytest.mark.parametrize(
    ("time", "horizon", "message"),
    [
        (1001, TRAINING, r"^end=1001 is step 1001, after the end of training at step 1000: .* fraction such as 0\.75"),
        ("51ep", TRAINING, r"^end='51ep' is step 1020, after the end of training at step 1000: "),
        (0.5, ENDLESS, r"^end=0\.5 is a fraction of a training without end: set max_epochs or max_steps"),
        ("5ep", Horizon(steps=1000), r"^end='5ep' counts epochs, but their length is unknown: .* in steps"),
    ],
    ids=["steps", "epochs", "no end", "no epochs"],
)
def test_times_that_training_cannot_meet_are_refused(time: Time, horizon: Horizon, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        horizon.step(time, "end")


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_constant_is_there_from_the_start(sparsity: float) -> None:
    assert Constant().plan(sparsity, ENDLESS) == {0: sparsity}


@pytest.mark.parametrize(("at", "step"), [(0, 0), (7, 7), (0.5, 500), ("5ep", 100), (1.0, 999)])
def test_once_is_one_time(at: Time, step: int) -> None:
    assert Once(at).plan(0.9, TRAINING) == {step: 0.9}


def test_linear_by_hand() -> None:
    assert rounded(Linear(0, 4, 1).plan(0.8, ENDLESS)) == {0: 0.0, 1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8}
    assert rounded(Linear(10, 30, 10, initial=0.5).plan(0.9, ENDLESS)) == {10: 0.5, 20: 0.7, 30: 0.9}


def test_cubic_by_hand() -> None:
    # 0.8 times 1 - (3/4)^3, 1 - (1/2)^3 and 1 - (1/4)^3
    assert rounded(Cubic(0, 4, 1).plan(0.8, ENDLESS)) == {0: 0.0, 1: 0.4625, 2: 0.7, 3: 0.7875, 4: 0.8}
    assert rounded(Cubic(10, 30, 10, initial=0.1).plan(0.9, ENDLESS)) == {10: 0.1, 20: 0.8, 30: 0.9}


@pytest.mark.parametrize(("initial", "sparsity"), [(0.0, 0.9), (0.3, 0.95), (0.5, 0.5)])
def test_cubic_is_equation_1_of_zhu_and_gupta(initial: float, sparsity: float) -> None:
    plan = Cubic(100, 900, 8, initial).plan(sparsity, TRAINING)
    assert list(plan) == list(range(100, 901, 8))
    for step, value in plan.items():
        # The polynomial of the paper, multiplied out.
        t = (step - 100) / 800
        assert value == pytest.approx(initial + (sparsity - initial) * (3 * t - 3 * t**2 + t**3), abs=1e-12)


@pytest.mark.parametrize(
    ("start", "end", "every", "steps"),
    [
        (0.1, 0.5, 0.1, [100, 200, 300, 400, 500]),
        ("1ep", "4ep", "1ep", [20, 40, 60, 80]),
        (0, "2ep", 0.015, [0, 15, 30, 40]),
        (0.95, 1.0, 20, [950, 970, 990, 999]),
        (0.999, 1.0, 0.5, [999]),
        (0.5, 500, 100, [500]),
        (0, 0.003, 0.0, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_gradual_times_of_each_kind(start: Time, end: Time, every: Time, steps: list[int]) -> None:
    assert list(Linear(start, end, every).plan(0.9, TRAINING)) == steps


GRADUAL = [
    Linear(),
    Cubic(),
    Cubic(0, 1.0, 0.07, initial=0.2),
    Linear(0.03, 0.031, "1ep", initial=0.2),
    Cubic("1ep", 1.0, 37),
    Iterative(),
    Iterative(0.01, 0.0, 1.0),
    Iterative(0.5, "3ep", 1.0),
]


@pytest.mark.parametrize("schedule", GRADUAL, ids=lambda schedule: f"{type(schedule).__name__}")
@pytest.mark.parametrize("steps", [5, 7, 100, 3001])
@pytest.mark.parametrize("sparsity", [0.6, 0.9, 0.999])
def test_gradual_schedules_rise_and_end_exactly(schedule: Linear | Iterative, steps: int, sparsity: float) -> None:
    horizon = Horizon(steps, per_epoch=max(1, steps // 5))
    plan = schedule.plan(sparsity, horizon)
    assert list(plan) == sorted(plan)
    assert list(plan.values()) == sorted(plan.values())
    assert list(plan)[-1] == horizon.step(schedule.end, "end")
    assert list(plan.values())[-1] == sparsity
    assert next(iter(plan)) == horizon.step(schedule.start, "start")


@pytest.mark.parametrize(
    ("sparsity", "levels"),
    [
        (0.1, [0.1]),
        (0.2, [0.2]),
        (0.3, [0.2, 0.3]),
        (0.36, [0.2, 0.36]),
        (0.488, [0.2, 0.36, 0.488]),
        (0.5, [0.2, 0.36, 0.488, 0.5]),
        (0.67232, [0.2, 0.36, 0.488, 0.5904, 0.67232]),
    ],
)
def test_iterative_removes_a_fifth_of_the_rest_each_round(sparsity: float, levels: list[float]) -> None:
    assert list(rounded(Iterative(0.2, 0, 100).plan(sparsity, TRAINING)).values()) == levels


def test_iterative_rounds_are_even_from_start_to_end() -> None:
    assert rounded(Iterative(0.2, 0.1, 0.75).plan(0.488, TRAINING)) == {100: 0.2, 425: 0.36, 750: 0.488}
    assert rounded(Iterative(0.5, "1ep", "4ep").plan(0.9375, TRAINING)) == {20: 0.5, 40: 0.75, 60: 0.875, 80: 0.9375}


def test_iterative_rounds_that_fall_on_one_step_are_the_last_of_them() -> None:
    assert rounded(Iterative(0.5, 5, 6).plan(0.9375, TRAINING)) == {5: 0.75, 6: 0.9375}
    assert Iterative(0.5, 5, 5).plan(0.9375, TRAINING) == {5: 0.9375}


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.2, 20])
def test_iterative_refuses_a_rate_outside_of_zero_to_one(rate: float) -> None:
    with pytest.raises(
        ValueError, match=rf"rate must lie in \(0, 1\), a fraction of the remaining weights; got {rate}$"
    ):
        Iterative(rate)


@pytest.mark.parametrize("initial", [-0.1, 0.91])
def test_initial_above_the_sparsity_is_refused(initial: float) -> None:
    with pytest.raises(ValueError, match=rf"initial={initial} must lie in \[0, sparsity=0\.9\]"):
        Cubic(initial=initial).plan(0.9, TRAINING)


@pytest.mark.parametrize("kind", [Linear, Cubic, Iterative])
def test_a_start_after_the_end_is_refused(kind: type[Linear] | type[Iterative]) -> None:
    message = r"start=0\.8 \(step 800\) must not come after end='10ep' \(step 200\)"
    with pytest.raises(ValueError, match=message):
        kind(start=0.8, end="10ep").plan(0.9, TRAINING)


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (Once(at=2000), "at"),
        (Linear(start=2000), "start"),
        (Cubic(end=2000), "end"),
        (Cubic(every="x"), "every"),
        (Iterative(start=2000), "start"),
        (Iterative(end="100ep"), "end"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused_times_are_named(schedule: Schedule, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}(=| must be)"):
        schedule.plan(0.9, TRAINING)


def test_steps_that_miss_the_end_are_refused_at_once() -> None:
    message = (
        r"^updates every 3 steps from 2 miss the end at 12: the last would be at step 11; "
        r"use end=11, or an interval that divides 10$"
    )
    with pytest.raises(ValueError, match=message):
        Cubic(start=2, end=12, every=3)


@pytest.mark.parametrize(("start", "end", "every"), [(0, 10, 3), (5, 50, 20), (0, 10, 20)])
def test_the_advice_for_steps_that_miss_the_end_works(start: int, end: int, every: int) -> None:
    with pytest.raises(ValueError, match="miss the end") as refusal:
        Linear(start, end, every)
    advice = re.search(r"use end=(\d+), or an interval that divides (\d+)$", str(refusal.value))
    assert advice
    assert list(Linear(start, int(advice[1]), every).plan(0.9, ENDLESS))[-1] == int(advice[1])
    assert list(Linear(start, end, int(advice[2])).plan(0.9, ENDLESS))[-1] == end


@pytest.mark.parametrize(("start", "end", "every"), [(0, 10, 0), (10, 6, 5), (10, 5, 5)])
def test_steps_that_go_nowhere_are_refused_at_once(start: int, end: int, every: int) -> None:
    message = rf"^updates every {every} steps from {start} to {end}: every must be >= 1, and start <= end$"
    with pytest.raises(ValueError, match=message):
        Cubic(start, end, every)


def test_a_schedule_without_a_plan_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Schedule plans nothing"):
        Schedule().plan(0.9, TRAINING)


# Drops -----------------------------------------------------------------------------------------------------------


def test_drops_come_after_each_interval_and_before_the_end() -> None:
    plan = ConstantDrop(0.3, every=100, end=0.75).plan(TRAINING)
    assert plan == dict.fromkeys((100, 200, 300, 400, 500, 600, 700), 0.3)
    assert list(ConstantDrop(0.3, "1ep", 1.0).plan(TRAINING)) == list(range(20, 1000, 20))
    assert list(ConstantDrop(0.3, 0.1, 0.5).plan(TRAINING)) == [100, 200, 300, 400]


def test_cosine_drop_is_rigls_by_hand() -> None:
    """0.3 / 2 (1 + cos(pi t / 750)) at t = 0, 250, 500, 750: 0.3, 0.225, 0.075, 0."""
    plan = CosineDrop(0.3, every=250, end=0.75).plan(TRAINING)
    assert plan == {250: pytest.approx(0.225), 500: pytest.approx(0.075)}


def test_cosine_drop_is_sparse_momentums_by_hand() -> None:
    """0.005 + 0.495 / 2 (1 + cos(pi t / T)): the mean of both ends in the middle, 0.005 at the end."""
    drop = CosineDrop(0.5, every=1, end=1.0, final=0.005)
    assert drop.plan(TRAINING)[500] == pytest.approx(0.2525)
    assert drop.fraction(0.0) == 0.5
    assert drop.fraction(1.0) == pytest.approx(0.005)


def test_linear_drop_by_hand() -> None:
    assert LinearDrop(0.4, every=500, end=1.0).plan(TRAINING) == {500: pytest.approx(0.2)}


@pytest.mark.parametrize(
    ("drop", "horizon", "said"),
    [
        (
            ConstantDrop(0.3, 1000),
            Horizon(steps=900),
            r"every=1000 .* end=0\.75 \(step 675\), in a training of 900 steps",
        ),
        (ConstantDrop(0.3, "1ep", 1.0), Horizon(steps=540, per_epoch=540), r"comes first at step 540"),
        (
            ConstantDrop(0.3, 10, 2000),
            Horizon(steps=900),
            r"end=2000 is step 2000, after the end of training at step 900",
        ),
        (ConstantDrop(), Horizon(), "fraction of a training without end"),
    ],
)
def test_drops_that_cannot_come_are_refused(drop: ConstantDrop, horizon: Horizon, said: str) -> None:
    with pytest.raises(InputError, match=said):
        drop.plan(horizon)


@pytest.mark.parametrize("initial", [0, 1, 1.5, -0.1])
def test_fractions_outside_are_refused(initial: float) -> None:
    with pytest.raises(InputError, match=r"initial must lie in \(0, 1\)"):
        ConstantDrop(initial)


def test_a_cosine_that_rises_is_refused() -> None:
    with pytest.raises(InputError, match=r"final must lie in \[0, initial=0\.3\], got 0\.5"):
        CosineDrop(0.3, final=0.5)


def test_no_interval_is_refused() -> None:
    with pytest.raises(InputError, match="every must be >= 1"):
        Cubic(every=0)
