"""Flower carries the same federation to the same end: weights, masks, bytes and failures."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import train
from callbacks import FLASH, FedDST, FedSGC
from sparsity import InputError
from sparsity.congruent import Congruity
from sparsity.federated import (
    IID,
    SCAFFOLD,
    Dirichlet,
    FedAvg,
    Federation,
    Local,
    OwnData,
    Protocol,
    Running,
    Tolerance,
    simulate,
)
from sparsity.federated import engine as embedded
from sparsity.federated.client import client_update as ended
from tests.federated.small import Model, Points, Precise, Unlucky, drops, model

pytest.importorskip("flwr", reason="Flower is an extra: pip install .[federated]")
from sparsity.federated import flower  # it needs Flower

# Flower's own: its simulation function, and what Ray leaves open.
pytestmark = [pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]


CASES: dict[str, Any] = {
    "FedSGC": lambda: (model(norm=False), FedSGC(0.6, Congruity(0.5), drops()), FedAvg(residual=True), None),
    "scaled": lambda: (model(norm=False), FedSGC(0.6, Congruity(0.5), drops()).scaled(), None, None),
    "SCAFFOLD": lambda: (model(norm=False), FedDST(0.6, drops(1)), SCAFFOLD(), Tolerance(dropout=0.2)),
    "SCAFFOLD, float64": lambda: (Precise(norm=False), FedDST(0.6, drops(1)), SCAFFOLD(), Tolerance(dropout=0.2)),
    "NaN": lambda: (Unlucky(norm=False), None, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_engines_come_to_the_same(case: str) -> None:
    found = []
    for run in (simulate, flower.simulate):
        torch.manual_seed(0)
        net, method, server, tolerance = CASES[case]()
        protocol = Protocol(Local(2), server, tolerance)
        found.append(run(net, Points(), method, Federation(6, 4, 5, Dirichlet(2.0)), protocol, Running(2), seed=3))
    ours, theirs = found
    assert torch.equal(ours.state.values, theirs.state.values)
    assert torch.equal(ours.state.mask, theirs.state.mask)
    assert ours.metrics == theirs.metrics
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        timed = {name for name in one if "seconds" in name}
        words = {"reasons": sorted(one["reasons"])}  # who failed; what is said of it may differ
        assert {**one, **dict.fromkeys(timed), **words} == {
            **other,
            **dict.fromkeys(timed),
            "reasons": sorted(other["reasons"]),
        }
    if case == "NaN":
        assert any(row["failures"] for row in ours.rows)


def test_what_flower_does_not_carry_is_said() -> None:
    with pytest.raises(InputError, match="FLASH's scouts train in the embedded engine only"):
        flower.simulate(model(momentum=0.9), Points(), FLASH(0.5), Federation(3, 2, 2), seed=1)


def test_a_node_whose_data_are_not_the_plan_s_says_so() -> None:
    def answer(samples: list[int]) -> Any:
        plan = flower.Plan(lambda: (model(), Points(), None), Federation(2, 2, 2, OwnData(samples)), Protocol(), 1)
        server = plan.here()
        try:
            sent, task = server.outgoing(1)
            context = SimpleNamespace(state={}, node_config={"partition-id": 1})
            return flower._train(plan, flower._written(sent, task, server.seed_of(1)), cast("Any", context))
        finally:
            server.site.close()
            flower._HERE.pop(plan.key)

    told = answer([100, 200])
    assert told["messages"] == []
    assert "client 1 has 240 training samples, the plan says 200" in told["failure"]
    fine = answer([100, 240])
    assert fine["messages"]
    assert fine["failure"] == ""


class Nodes:
    """A grid whose nodes are in this process: which client each is, and what each has kept."""

    def __init__(self, plan: Any, clients: dict[int, int]) -> None:
        self.plan, self.clients = plan, clients
        self.kept: dict[int, Any] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def send_and_receive(self, messages: list[Any], timeout: float | None = None) -> list[Any]:
        return [self._answered(message) for message in messages]

    def _answered(self, message: Any) -> Any:
        node = message.metadata.dst_node_id
        about = SimpleNamespace(src_node_id=node)
        if node not in self.clients:
            gone = SimpleNamespace(reason="Node Unavailable")
            return SimpleNamespace(metadata=about, has_error=lambda: True, error=gone)
        context = self.kept.setdefault(
            node, SimpleNamespace(state={}, node_config={"partition-id": self.clients[node]})
        )
        if message.metadata.message_type == "query":
            answer: Any = {"client": self.clients[node]}
        else:
            answer = flower._train(self.plan, message.content[flower.SECTION], context)
        return SimpleNamespace(metadata=about, has_error=lambda: False, content={flower.SECTION: answer})


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can be made outside of a run."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.usefixtures("messages")
def test_a_node_that_comes_back_as_another_takes_part_again() -> None:
    plan = flower.Plan(lambda: (model(norm=False), Points(), None), Federation(2, 2, 5, IID()), Protocol(Local(1)), 1)
    nodes = Nodes(plan, {101: 0, 102: 1})
    engine = flower.FlowerEngine(plan.here(), cast("Any", nodes))
    answered = []
    for number in range(5):
        if number == 2:
            nodes.clients = {101: 0}
        if number == 3:
            nodes.clients = {101: 0, 103: 1}
        answered.append(engine.round()["clients"])
    engine.server.site.close()
    flower._HERE.pop(plan.key)
    assert answered == [2, 2, 1, 2, 2]


class Once(Model):
    """One client's loss is NaN, in one round."""

    bad: int | None = None

    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        return loss * float("nan") if Once.bad == 0 else loss


@pytest.mark.usefixtures("messages")
@pytest.mark.parametrize("quorum", [1, 2])
def test_a_control_that_did_not_count_is_forgotten(quorum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Any, Any]] = []
    turns: list[int] = []

    def watched(site: Any, task: Any, *others: Any) -> Any:
        Once.bad = 0 if task.number == 1 and turns[-1] % 2 == 0 else None
        turns[-1] += 1
        return ended(site, task, *others)

    for module in (flower, embedded):
        monkeypatch.setattr(module, "client_update", watched)
    for over_flower in (False, True):
        torch.manual_seed(0)
        turns.append(0)
        protocol = Protocol(Local(1), SCAFFOLD(), Tolerance(quorum=quorum))
        plan = flower.Plan(lambda: (Once(norm=False), Points(), None), Federation(2, 2, 5, IID()), protocol, 1)
        server = plan.here()
        nodes = cast("Any", Nodes(plan, {101: 0, 102: 1}))
        engine: Any = flower.FlowerEngine(server, nodes) if over_flower else embedded.Engine(server)
        rows = [engine.round() for _ in range(5)]
        found.append(([row["clients"] for row in rows], server.state.values))
        server.site.close()
        flower._HERE.pop(plan.key)
    assert found[0][0] == found[1][0] == [2, 1 if quorum == 1 else 0, 2, 2, 2]
    assert torch.equal(found[0][1], found[1][1])


def test_a_recipe_becomes_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    recipe = train.Recipe(str(ROOT / "recipes/federated/digits_fedsgc.yaml"), "--federation.rounds=9")
    plan = flower.Plan.of(recipe)
    assert (plan.federation.rounds, plan.protocol.local.epochs, plan.seed) == (9, 3, 1)
    server = plan.here()
    assert type(server.method).__name__ == "Congruent"
    assert type(flower.client_app(plan)).__name__ == "ClientApp"
    assert type(flower.server_app(plan)).__name__ == "ServerApp"
    server.site.close()


def test_nothing_is_reported_to_anybody() -> None:
    code = "import sparsity.federated.flower, os; print(os.environ['FLWR_TELEMETRY_ENABLED'])"
    environment = {name: value for name, value in os.environ.items() if name != "FLWR_TELEMETRY_ENABLED"}
    for wish, expected in ((None, "0"), ("1", "1")):
        asked = environment | ({"FLWR_TELEMETRY_ENABLED": wish} if wish else {})
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=asked, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == expected
