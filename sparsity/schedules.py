"""Schedules: when masks are renewed and how sparse they are then, or what fraction of the kept weights moves.

A time is an int (optimizer steps from 0), a float in [0, 1] (a fraction of training) or a text such as "5ep"
(epochs). A schedule turns times into a plan once the length of training is known.
"""

import math
import re

from sparsity.errors import InputError

Time = int | float | str
Plan = dict[int, float]


class Horizon:
    """How long training is: optimizer steps in all and per epoch, None where there is no end."""

    def __init__(self, steps: int | None = None, per_epoch: int | None = None) -> None:
        self.steps, self.per_epoch = steps, per_epoch

    def step(self, time: Time, name: str) -> int:
        """The optimizer step of a time; the end of training is its last step. Raises `InputError`, naming `name`."""
        step = self.length(time, name)
        if self.steps is not None and step > self.steps:
            raise InputError(
                f"{name}={time!r} is step {step}, after the end of training at step {self.steps}: "
                "train longer, or use a fraction such as 0.75"
            )
        return step if self.steps is None else max(0, min(step, self.steps - 1))

    def length(self, time: Time, name: str) -> int:
        """A span of time in optimizer steps. Raises `InputError`, naming `name`."""
        if isinstance(time, bool) or not isinstance(time, int | float | str):
            raise InputError(_expected(name, time))
        if isinstance(time, str):
            return self._epochs(time, name)
        if isinstance(time, int):
            if time < 0:
                raise InputError(_expected(name, time))
            return time
        if not 0 <= time <= 1:
            raise InputError(_expected(name, time))
        if self.steps is None:
            raise InputError(
                f"{name}={time} is a fraction of a training without end: "
                "set max_epochs or max_steps in the trainer, or give the time in steps"
            )
        return round(time * self.steps)

    def _epochs(self, time: str, name: str) -> int:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*ep\s*", time)
        if not match:
            raise InputError(_expected(name, time))
        if self.per_epoch is None:
            raise InputError(f"{name}={time!r} counts epochs, but their length is unknown: give the time in steps")
        return round(float(match[1]) * self.per_epoch)


class Schedule:
    """When masks are renewed and how sparse they are then. Schedules override `plan`."""

    def plan(self, sparsity: float, horizon: Horizon) -> Plan:
        """The sparsity from each step of renewal on, the last one being `sparsity`, in order of steps.

        Raises `InputError` for times that cannot be met in a training of this length.
        """
        raise NotImplementedError(f"{type(self).__name__} plans nothing")


class Constant(Schedule):
    """The full sparsity from before the first step on."""

    def plan(self, sparsity: float, horizon: Horizon) -> Plan:
        return {0: sparsity}


class Once(Schedule):
    """The full sparsity at one time: one-shot pruning."""

    def __init__(self, at: Time = 0) -> None:
        self.at = at

    def plan(self, sparsity: float, horizon: Horizon) -> Plan:
        return {horizon.step(self.at, "at"): sparsity}


class Linear(Schedule):
    """From `initial` to the full sparsity in a straight line, renewed `every` so often from `start` to `end`."""

    power = 1

    def __init__(self, start: Time = 0, end: Time = 0.75, every: Time = 0.01, initial: float = 0.0) -> None:
        self.start, self.end, self.every, self.initial = start, end, every, initial
        if all(type(time) is int for time in (start, end, every)):
            self._check_steps(int(start), int(end), int(every))
        if type(every) is int and every < 1:
            raise InputError(f"every={every} is no interval: every must be >= 1 step")

    def plan(self, sparsity: float, horizon: Horizon) -> Plan:
        if not 0 <= self.initial <= sparsity:
            raise InputError(f"initial={self.initial} must lie in [0, sparsity={sparsity}]")
        start, end = horizon.step(self.start, "start"), horizon.step(self.end, "end")
        every = max(1, horizon.length(self.every, "every"))
        if start > end:
            raise InputError(f"start={self.start!r} (step {start}) must not come after end={self.end!r} (step {end})")
        ways = {step: (step - start) / (end - start) for step in range(start, end, every)}
        rising = {step: sparsity + (self.initial - sparsity) * (1 - way) ** self.power for step, way in ways.items()}
        return rising | {end: sparsity}

    def _check_steps(self, start: int, end: int, every: int) -> None:
        if every < 1 or start > end:
            raise InputError(f"updates every {every} steps from {start} to {end}: every must be >= 1, and start <= end")
        if (end - start) % every:
            last = end - (end - start) % every
            raise InputError(
                f"updates every {every} steps from {start} miss the end at {end}: the last would be at step {last}; "
                f"use end={last}, or an interval that divides {end - start}"
            )


class Cubic(Linear):
    """s + (initial - s) (1 - t)^3: fast while weights are plenty, slow near the end.

    Zhu & Gupta, "To prune, or not to prune" (arXiv 1710.01878), equation 1. Unlike theirs, pruned weights hold zero
    and do not return.
    """

    power = 3


class Iterative(Schedule):
    """Rounds that each remove `rate` of what remains, evenly from `start` to `end`; the last lands on the sparsity.

    The rounds of LAMP and of the lottery ticket (20 % each): densities 0.8, 0.64, 0.512 ... In a training so short that
    rounds fall on one step, the last of them counts.
    """

    def __init__(self, rate: float = 0.2, start: Time = 0.1, end: Time = 0.75) -> None:
        if not 0 < rate < 1:
            raise InputError(f"rate must lie in (0, 1), a fraction of the remaining weights; got {rate}")
        self.rate, self.start, self.end = rate, start, end

    def plan(self, sparsity: float, horizon: Horizon) -> Plan:
        start, end = horizon.step(self.start, "start"), horizon.step(self.end, "end")
        levels = rounds(sparsity, self.rate)
        if start > end:
            raise InputError(f"start={self.start!r} (step {start}) must not come after end={self.end!r} (step {end})")
        steps = [start + round(k * (end - start) / max(1, len(levels) - 1)) for k in range(len(levels))]
        return dict(zip(steps, levels, strict=True))


def rounds(sparsity: float, rate: float) -> list[float]:
    """The sparsities after rounds that each remove `rate` of what remains; the last one is `sparsity`."""
    # The tolerance keeps 1 - 0.8^3 = 0.488 at three rounds where the logarithms say 3.0000000001.
    count = max(1, math.ceil(math.log(1 - sparsity) / math.log(1 - rate) - 1e-9))
    return [1 - (1 - rate) ** k for k in range(1, count)] + [sparsity]


class ConstantDrop:
    """What fraction of the kept weights is dropped and grown anew, and when: `initial`, at every update.

    Updates come `every` so often, the first after that long, all before `end`. Dropping schedules override `fraction`.
    """

    def __init__(self, initial: float = 0.3, every: Time = 100, end: Time = 0.75) -> None:
        if not 0 < initial < 1:
            raise InputError(f"initial must lie in (0, 1), a fraction of the kept weights; got {initial}")
        self.initial, self.every, self.end = initial, every, end

    def plan(self, horizon: Horizon) -> Plan:
        """The fraction to drop at each step with an update, in order of steps.

        Raises `InputError` where the interval leaves no update before the end.
        """
        horizon.step(self.end, "end")
        end, every = horizon.length(self.end, "end"), max(1, horizon.length(self.every, "every"))
        if every >= end:
            length = "" if horizon.steps is None else f", in a training of {horizon.steps} steps"
            raise InputError(
                f"an update every={self.every!r} ({every} steps) comes first at step {every}, but updates end before "
                f"end={self.end!r} (step {end}){length}: take a shorter interval, such as "
                f"drops={type(self).__name__}(every=0.02), or train longer"
            )
        return {step: self.fraction(step / end) for step in range(every, end, every)}

    def fraction(self, way: float) -> float:
        """The fraction to drop when this part of the time up to the end has passed, from 0 to 1."""
        return self.initial


class LinearDrop(ConstantDrop):
    """From `initial` to zero in a straight line."""

    def fraction(self, way: float) -> float:
        return self.initial * (1 - way)


class CosineDrop(ConstantDrop):
    """From `initial` to `final` along half a cosine: initial / 2 (1 + cos(pi t / end)) where `final` is zero.

    The defaults are RigL's (Evci et al., arXiv 1911.11134, section 3): every 100 steps, up to 75 % of training.
    """

    def __init__(self, initial: float = 0.3, every: Time = 100, end: Time = 0.75, final: float = 0.0) -> None:
        super().__init__(initial, every, end)
        if not 0 <= final <= initial:
            raise InputError(f"final must lie in [0, initial={initial}], got {final}")
        self.final = final

    def fraction(self, way: float) -> float:
        return self.final + (self.initial - self.final) / 2 * (1 + math.cos(math.pi * way))


class InTime(CosineDrop):
    """A long interval and no stop, so that as many weights as possible are tried while the network still learns.

    In-time over-parameterization (Liu et al., arXiv 2102.02887); the interval is the authors' for RigL on CIFAR, theirs
    for SET is 1,500 steps.
    """

    def __init__(self, initial: float = 0.5, every: Time = 4000, end: Time = 1.0, final: float = 0.005) -> None:
        super().__init__(initial, every, end, final)


def _expected(name: str, time: object) -> str:
    return f'{name} must be steps (an int >= 0), a fraction (a float in [0, 1]) or epochs ("5ep"); got {time!r}'
