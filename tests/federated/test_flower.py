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
from tests.federated.small import Points, Unlucky, drops, model

pytest.importorskip("flwr", reason="Flower is an extra: pip install .[federated]")
from sparsity.federated import flower  # it needs Flower

# Flower's own: its simulation function, and what Ray leaves open.
pytestmark = [pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]


CASES: dict[str, Any] = {
    "FedSGC": lambda: (model(norm=False), FedSGC(0.6, Congruity(0.5), drops()), FedAvg(residual=True), None),
    "scaled": lambda: (model(norm=False), FedSGC(0.6, Congruity(0.5), drops()).scaled(), None, None),
    "SCAFFOLD": lambda: (model(norm=False), FedDST(0.6, drops(1)), SCAFFOLD(), Tolerance(dropout=0.2)),
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
