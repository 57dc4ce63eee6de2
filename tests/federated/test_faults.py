"""What goes wrong in a federation: it is counted, it is said, and it does not reach the model."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks import FLASH, GMP, LAMP, SET, FedDST, FedSGC, PruneFL, RigL, StaticMask
from sparsity import InputError
from sparsity.congruent import Congruity
from sparsity.distributions import Uniform
from sparsity.federated import (
    IID,
    SCAFFOLD,
    FedAdam,
    FedAvg,
    FedAvgM,
    Federation,
    FedMedian,
    Local,
    Outcome,
    Pathological,
    Protocol,
    Running,
    Tolerance,
    simulate,
)
from sparsity.federated.layout import Layout
from sparsity.federated.server import Update
from sparsity.federated.site import Site
from sparsity.federated.state import load
from sparsity.federated.tolerance import refuse
from sparsity.schedules import CosineDrop, Cubic, Horizon, Schedule
from tests.federated.small import Model, Points, drops, model

ROOT = Path(__file__).parents[2]


def run(net: Model, rounds: int = 5, per_round: int = 5, **settings: Any) -> Outcome:
    protocol = Protocol(Local(2), settings.pop("server", None), settings.pop("tolerance", None))
    federation = Federation(5, per_round, rounds, settings.pop("partition", None) or IID())
    return simulate(net, Points(), settings.pop("method", None), federation, protocol, Running(**settings), seed=1)


class Failing(Model):
    """Some clients' training fails: those whose first point has a certain sign."""

    how = "raise"

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().training_step(batch)
        if batch[0][0, 0] < -2:
            if self.how == "raise":
                raise ZeroDivisionError("no luck")
            if self.how == "sleep":
                time.sleep(0.5)
            return loss * math.nan if self.how == "nan" else loss
        return loss


@pytest.mark.parametrize(("how", "reason"), [
    ("raise", "ZeroDivisionError: no luck"), ("nan", "are NaN or infinite"), ("sleep", "took longer than 0.4 s"),
])  # fmt: skip
def test_failures_are_counted_with_their_reason_and_leave_nothing(how: str, reason: str) -> None:
    torch.manual_seed(0)
    net = Failing()
    net.how = how
    outcome = run(net, 2, method=StaticMask(0.5), tolerance=Tolerance(timeout=0.4 if how == "sleep" else None))
    assert any(row["failures"] for row in outcome.rows)
    for row in outcome.rows:
        assert row["clients"] + row["failures"] == 5
        assert len(row["reasons"]) == row["failures"]
        assert all(reason in each for each in row["reasons"].values())
    assert torch.isfinite(outcome.state.values).all()


def test_what_all_clients_fail_by_at_once_is_an_error() -> None:
    class Broken(Model):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            raise KeyError("labels")

    with pytest.raises(InputError, match=r"all 5 clients of the first round failed.*KeyError: 'labels'"):
        run(Broken())


def test_dropout_is_seeded_and_has_its_chance() -> None:
    outcome = run(model(), 40, tolerance=Tolerance(dropout=0.3))
    lost = [row["failures"] for row in outcome.rows]
    assert 0.2 < sum(lost) / 200 < 0.4
    assert lost == [row["failures"] for row in run(model(), 40, tolerance=Tolerance(dropout=0.3), workers=2).rows]
    assert all(row["bytes_down"] > row["bytes_up"] for row in outcome.rows if row["failures"])


def test_below_the_quorum_the_model_stays() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    outcome = run(net, 3, tolerance=Tolerance(dropout=0.5, quorum=5))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [row["clients"] for row in outcome.rows] == [0, 0, 0]
    assert all(row["failures"] for row in outcome.rows)


def test_a_long_change_is_shortened_and_buffers_do_not_count() -> None:
    site = Site(model(), None, 1, 0)
    shape = site.layout
    before, learned = shape.read(), shape.learned
    free, bound, loose = (run(model(), 1, tolerance=Tolerance(clip=clip)).state.values for clip in (None, 0.01, 10.0))
    assert float((free - before)[learned].norm()) > 0.01
    assert float((bound - before)[learned].norm()) <= 0.01 * (1 + 1e-4)
    assert torch.equal(loose, free), "counters have gone further than 10, and weights have not"
    assert torch.equal(bound[~learned], free[~learned])


class Broken(Model):
    """Its training has a mistake that fails in its own words each time."""

    steps = 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        Broken.steps += 1
        raise ValueError(f"batch {Broken.steps} is bad")


class Diverged(Model):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().training_step(batch) * math.nan


@pytest.mark.parametrize(("net", "per_round", "message"), [
    (Broken, 5, r"all 5 clients of the first round failed: ValueError: batch \d+ is bad"),
    (Broken, 1, r"all 1 clients of the first round failed: ValueError"),
    (Diverged, 5, r"all 5 clients of the first round failed: InputError: .* NaN or infinite"),
    (Diverged, 1, r"every client failed in every round, and nothing was trained: InputError: .* NaN or infinite"),
])  # fmt: skip
def test_a_federation_in_which_nobody_trains_ends_with_an_error(net: Any, per_round: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(net(), 3, per_round)


def updates() -> dict[str, tuple[Update, str]]:
    shape = Layout(model(), ["first.weight"])
    ones, half = torch.ones(shape.masked).bool(), torch.arange(shape.masked) % 2 == 0
    fine = shape.read()
    bad = fine.clone()
    bad[100] = math.inf
    return {
        "infinite": (Update(bad, ones, 1), "1 of .* values are NaN or infinite"),
        "large": (Update(fine * 1e13, ones, 10), "beyond any model's"),
        "short": (Update(fine[:-1], ones, 1), "expected {'values'"),
        "no samples": (Update(fine, ones, 0), "of 0 samples, its client has 1"),
        "another mask": (Update(fine, ones[:-1], 1), "is of 71 torch.bool, expected 72 bools"),
        "a mask of numbers": (Update(fine, ones.to(torch.uint8), 1), "is of 72 torch.uint8, expected 72 bools"),
        "values where pruned": (Update(fine, half, 1), "values where its mask prunes"),
        "nothing kept": (Update(fine, ~ones, 1), "keeps 0 of 72 weights"),
        "more samples": (Update(fine, ones, 1000), "of 1000 samples, its client has 1"),
        "more": (Update(fine, ones, 1, {"squares": fine}), "the update has .*squares"),
    }


@pytest.mark.parametrize("name", updates())
def test_wrong_updates_are_refused(name: str) -> None:
    update, message = updates()[name]
    with pytest.raises(InputError, match=message):
        refuse(update, Layout(model(), ["first.weight"]), {}, 10 if name == "large" else 1)


CASES: dict[str, Any] = {
    "FedSGC": lambda: {"method": FedSGC(0.6, Congruity(0.5), drops())},
    "FLASH": lambda: {"method": FLASH(0.6, 0.4, 2)},
    "PruneFL": lambda: {"method": PruneFL(0.6, drops())},
    "SCAFFOLD": lambda: {"server": SCAFFOLD()},
    "FedAvgM": lambda: {"server": FedAvgM(), "method": StaticMask(0.5)},
    "FedAdam": lambda: {"server": FedAdam(0.05), "workers": 2},
    "median": lambda: {"server": FedMedian()},
    "dropout": lambda: {"tolerance": Tolerance(dropout=0.3), "method": FedSGC(0.6, Congruity(1.0), drops(1))},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case: str, tmp_path: Path) -> None:
    momentum = 0.9 if case == "FLASH" else 0.0
    whole = run(model(momentum=momentum), 8, 3, folder=tmp_path / "whole", **CASES[case]())

    class Interrupted(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 4:
            raise Interrupted

    settings = CASES[case]()
    protocol = Protocol(Local(2), settings.get("server"), settings.get("tolerance"))
    running = Running(1, folder=tmp_path / "part")
    with pytest.raises(Interrupted):
        simulate(
            model(momentum=momentum),
            Points(),
            settings.get("method"),
            Federation(5, 3, 8),
            protocol,
            running,
            seed=1,
            on_round=stop,
        )
    assert load(tmp_path / "part" / "federation.ckpt", {}).round == 5
    again = run(model(1, momentum=momentum), 8, 3, folder=tmp_path / "part", resume=tmp_path / "part", **CASES[case]())
    assert torch.equal(again.state.values, whole.state.values)
    assert torch.equal(again.state.mask, whole.state.mask)
    for one, other in zip(again.rows, whole.rows, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys, time; from tests.federated.test_faults import *\n"
        "def slow(row): time.sleep(0.2); print(row['round'], flush=True)\n"
        "simulate(model(), Points(), FedSGC(0.6, Congruity(0.5), drops()), Federation(5, 3, 12), Protocol(Local(2)),"
        " Running(folder=sys.argv[1]), seed=1, on_round=slow)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("4"):
                os.kill(process.pid, signal.SIGKILL)
                break
    saved = load(tmp_path / "federation.ckpt", {})
    assert 5 <= saved.round < 12
    again, whole = (
        run(model(), 12, 3, method=FedSGC(0.6, Congruity(0.5), drops()), resume=resume) for resume in (tmp_path, None)
    )
    assert torch.equal(again.state.values, whole.state.values)


def test_a_worker_that_dies_ends_the_run_and_loses_no_round(tmp_path: Path) -> None:
    class Dying(Model):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            import multiprocessing

            if (tmp_path / "die").exists() and multiprocessing.parent_process() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(batch)

    def after(row: dict[str, Any]) -> None:
        if row["round"] == 2:
            (tmp_path / "die").touch()

    torch.manual_seed(0)
    with pytest.raises(InputError, match=r"workers ended with exit codes {1: -9}.*go on with resume"):
        simulate(Dying(), Points(), None, Federation(5, 5, 6), Protocol(Local(2)), Running(2, folder=tmp_path),
                 seed=1, on_round=after)  # fmt: skip
    assert load(tmp_path / "federation.ckpt", {}).round >= 3
    (tmp_path / "die").unlink()
    again = run(model(), 6, resume=tmp_path)
    assert torch.equal(again.state.values, run(model(), 6).state.values)


@pytest.mark.parametrize(("change", "message"), [
    ({"partition": Pathological(2)}, "with {'partition'"),
    ({"method": StaticMask(0.5)}, r"'method\.class'.*'method\.sparsity'"),
    ({"server": FedAvgM()}, "with {'server.class': 'FedAvg', 'server.momentum': None}, this one has"),
    ({"rounds": 9}, "with {'rounds': 2}"),
    ({"tolerance": Tolerance(clip=2.0)}, "with {'tolerance.clip': None}, this one has {'tolerance.clip': 2.0}"),
])  # fmt: skip
def test_another_federation_does_not_go_on(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    run(model(), 2, folder=tmp_path)
    with pytest.raises(InputError, match=message):
        run(model(), **{"rounds": 2, "resume": tmp_path, **change})


class Parted(Model):
    """Its last layer has a rate of its own."""

    rate_of_last = 0.1

    def configure_optimizers(self) -> Any:
        last = [*self.last.parameters()]
        others = [each for each in self.parameters() if not any(each is mine for mine in last)]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": last, "lr": self.rate_of_last}]
        return torch.optim.SGD(groups, 0.1)


@pytest.mark.parametrize(("one", "other", "message"), [
    (RigL(0.6, drops()), SET(0.6, drops()), "'method.grow.class': 'Gradient'"),
    (GMP(0.6, Cubic(0.1, 0.8, 1)), LAMP(0.6, Cubic(0.1, 0.8, 1)), "'method.distribution.class'|'method.score.class'"),
    (FedDST(0.6, drops()), FedDST(0.6, drops(), Uniform()), "'method.first.class': 'ERK'"),
    (FLASH(0.6, 0.4, 2), FLASH(0.6, 1.0, 2), "'method.scouts': 0.4"),
    (PruneFL(0.6, drops()), PruneFL(0.6, drops(), times={"first.weight": 2.0}), "'method.times.first.weight': 2.0"),
    (FedDST(0.6, drops()), FedDST(0.6, CosineDrop(0.3, 2, 0.9)), "'method.drops.initial': 0.4"),
])  # fmt: skip
def test_another_method_does_not_go_on(one: Any, other: Any, message: str, tmp_path: Path) -> None:
    run(model(momentum=0.9), 5, folder=tmp_path, method=one)
    with pytest.raises(InputError, match=message):
        run(model(momentum=0.9), 5, resume=tmp_path, method=other)


def test_another_rate_of_a_group_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Parted(), 2, folder=tmp_path)
    assert run(Parted(), 2, resume=tmp_path).state.round == 2
    monkeypatch.setattr(Parted, "rate_of_last", 0.2)
    with pytest.raises(InputError, match=r"'optimizer\.1\.lr': 0\.1"):
        run(Parted(), 2, resume=tmp_path)


class Levels(Schedule):
    """As someone might write it."""

    def __init__(self, levels: dict[int, float]) -> None:
        self.levels = levels

    def plan(self, sparsity: float, horizon: Horizon) -> dict[int, float]:
        return dict(self.levels)


@pytest.mark.parametrize(("method", "other"), [
    (lambda: GMP(0.6, Levels({0: 0.2, 1: 0.6})), lambda: GMP(0.6, Levels({0: 0.3, 1: 0.6}))),
    (
        lambda: PruneFL(0.6, drops(), times={"first.weight": np.float64(2)}),
        lambda: PruneFL(0.6, drops(), times={"first.weight": 3.0}),
    ),
])  # fmt: skip
def test_numbers_of_any_kind_are_saved_and_compared(method: Any, other: Any, tmp_path: Path) -> None:
    run(model(), 5, folder=tmp_path, method=method())
    assert run(model(), 5, resume=tmp_path, method=method()).state.round == 5
    with pytest.raises(InputError, match="is of a federation with"):
        run(model(), 5, resume=tmp_path, method=other())


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_damaged_state_is_refused(content: bytes | None, tmp_path: Path) -> None:
    run(model(), 1, folder=tmp_path)
    file = tmp_path / "federation.ckpt"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match="cannot be read"):
        run(model(), 1, resume=tmp_path)
    torch.save({"weights": 1}, file)
    with pytest.raises(InputError, match="is no state of a federation"):
        run(model(), 1, resume=tmp_path)


def test_no_partial_file_is_left(tmp_path: Path) -> None:
    run(model(), 2, folder=tmp_path, server=FedAvg())
    assert [path.name for path in tmp_path.iterdir()] == ["federation.ckpt"]
