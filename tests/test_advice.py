"""Advice: what it looks at, what it makes of its measurements, and that it leaves the model alone."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import train
from sparsity import InputError, advice, models
from sparsity.convert import BitmapLinear, KeptLinear, SparseLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.twice = nn.Conv2d(1, 2, 3), nn.Linear(32, 16), nn.Linear(16, 16)
        self.unused = nn.Linear(3, 3)
        with torch.no_grad():
            self.first.weight.mul_(torch.rand(16, 32) < 0.1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.twice(self.twice(self.first(self.conv(x).flatten(1))))
        return found


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times that the test sets: of sparse layers in parts of dense ones, by density."""
    times = {"step": 1.0}

    def beside(dense: nn.Linear, others: dict[str, KeptLinear], x: Tensor, seconds: float) -> dict[str, Any]:
        found = {"dense": {"ms": {"forward": 1.0, "step": 3.0}, "forward": 1.0, "step": 1.0}}
        for name, layer in others.items():
            ratio = 0.2 / max(layer.density, 1e-9)  # a fifth of the weights takes as long as all of them
            forward = 1.5 if isinstance(layer, BitmapLinear) else 2 * ratio
            step = ratio * times["step"] if isinstance(layer, SparseLinear) else 0.5
            found[name] = {"ms": {"forward": 1 / forward, "step": 3 / step}, "forward": forward, "step": step}
        return found

    monkeypatch.setattr(advice, "_beside", beside)
    return times


def test_it_measures_every_layer_that_is_called() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 1, 6, 6)
    before = copy.deepcopy(net.state_dict())
    found = advice.advise(net, [x], seconds=0.001)
    assert [row["layer"] for row in found["layers"]] == ["first", "twice"]
    assert [row["rows"] for row in found["layers"]] == [5, 5]
    assert found["layers"][1]["density"] == 1.0
    assert found["layers"][0]["density"] == int(net.first.weight.count_nonzero()) / 512
    assert found["others"] == ["conv", "unused"]
    assert [list(row["forms"]) for row in found["layers"]] == [
        ["dense", "SparseLinear", "BitmapLinear", "ShrunkLinear"],
        ["dense", "SparseLinear", "BitmapLinear", "BlockSparseLinear"],
    ]  # fmt: skip
    for row in found["layers"]:
        dense = row["forms"]["dense"]["ms"]
        for form in row["forms"].values():
            assert all(form[what] == dense[what] / form["ms"][what] for what in dense)
        for what, best in row["best"].items():
            most = max(form[what] for form in row["forms"].values())
            assert row["forms"][best][what] == (most if most >= advice.MARGIN else 1.0)
        assert (row["verdict"] == "stay dense") == (set(row["best"].values()) == {"dense"})
    assert found["model"]["step"] > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert json.loads(json.dumps(found)) == found


def test_each_layer_takes_the_form_that_is_best(fast: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    seen = []
    monkeypatch.setattr(advice, "_whole", lambda dense, served, trained, *others: seen.extend([served, trained]))
    found = advice.advise(Net(), [torch.randn(5, 1, 6, 6)])
    assert [row["best"] for row in found["layers"]] == [
        {"forward": "SparseLinear", "step": "SparseLinear"}, {"forward": "BitmapLinear", "step": "dense"},
    ]  # fmt: skip
    assert [row["verdict"] for row in found["layers"]] == ["sparse", "sparse to serve"]
    assert [type(model.first) for model in seen] == [SparseLinear, SparseLinear]
    assert [type(model.twice) for model in seen] == [BitmapLinear, nn.Linear]


@pytest.mark.parametrize(("forward", "step", "verdict"), [
    ("dense", "dense", "stay dense"), ("dense", None, "stay dense"), ("SparseLinear", None, "sparse"),
    ("dense", "SparseLinear", "sparse to train"), ("BitmapLinear", "dense", "sparse to serve"),
    ("BitmapLinear", "SparseLinear", "sparse"),
])  # fmt: skip
def test_verdicts(forward: str, step: str | None, verdict: str) -> None:
    assert advice._verdict({"forward": forward, "step": step}) == verdict


def test_what_is_hardly_faster_stays_dense() -> None:
    forms = {"dense": {"forward": 1.0, "step": None}, "SparseLinear": {"forward": 1.04, "step": None}}
    assert advice._best(forms, "forward") == "dense"
    assert advice._best(forms, "step") is None


def test_empty_rows_can_be_shrunk() -> None:
    net = nn.Linear(64, 64)
    mask = torch.rand(64, 64) < 0.5
    mask[5] = False
    found = advice.advise(net, [torch.randn(3, 64)], {"weight": mask}, seconds=0.001)
    assert list(found["layers"][0]["forms"]) == ["dense", "SparseLinear", "BitmapLinear", "ShrunkLinear"]


def test_the_density_at_which_it_begins_to_pay(fast: dict[str, float]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(400, 400), torch.randn(3, 400)
    found = advice.break_even(layer, x)
    assert found == pytest.approx(0.2, rel=0.1)
    fast["step"] = 10.0
    assert advice.break_even(layer, x) == advice.DENSITIES[0]
    fast["step"] = 0.001
    assert advice.break_even(layer, x) is None


def test_tables_and_figures(fast: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = advice.advise(Net(), [torch.randn(5, 1, 6, 6)], seconds=0.001)
    Console(width=200).print(advice.summary(found))
    text = capsys.readouterr().out
    assert "sparse to serve" in text
    assert "16 x 32" in text
    assert "dense in any case: conv, unused" in text
    advice.figure(found).savefig(tmp_path / "advice.png")


def test_a_model_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    net[2].weight.grad = torch.ones(2, 4)
    found = advice.advise(net, [torch.randn(5, 4)], seconds=0.001)
    assert int(net.get_buffer("1.num_batches_tracked")) == 0
    assert torch.equal(net.get_parameter("2.weight").grad, torch.ones(2, 4))  # type: ignore[arg-type]  # it has one
    steps = [row["forms"]["dense"]["step"] is None for row in found["layers"]]
    assert steps == [True, False], "what is frozen takes no step"
    advice.summary(found)
    advice.figure(found)


def test_masks_of_a_single_layer_and_inputs_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(input=x)
            return found

    mask = torch.eye(64, dtype=torch.bool)
    for net, name in ((nn.Linear(64, 64), "weight"), (Named(), "layer.weight")):
        found = advice.advise(net, [torch.randn(3, 64)], {name: mask}, seconds=0.001)
        assert found["layers"][0]["density"] == 1 / 64


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(InputError, match="Sequential calls no linear layer"):
        advice.advise(nn.Sequential(nn.Conv2d(1, 2, 3)), [torch.randn(1, 1, 6, 6)])


def test_tied_heads_and_tokens() -> None:
    net = models.GPT(context=8, width=16, depth=1, heads=2, tied=True)
    found = advice.advise(net, [torch.randint(0, 256, (2, 8))], seconds=0.001)
    assert "head" not in [row["layer"] for row in found["layers"]]
    assert {row["rows"] for row in found["layers"]} == {16}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(train.__file__).parent
    monkeypatch.setattr(sys, "argv", [
        "train.py", "advise", f"--config={root / 'recipes/digits_lamp.yaml'}",
        f"--trainer.default_root_dir={tmp_path}", "--seconds=0.001", "--sparsity.sparsity=0.95",
    ])  # fmt: skip
    train.main()
    path = Path(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("advice: "))
    found = json.loads(path.read_text())
    assert len(found["layers"]) == 3
    assert found["layers"][0]["density"] == pytest.approx(0.05, abs=0.001)
    assert path.with_suffix(".png").exists()


def test_the_command_line_wants_a_pruned_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(train.__file__).parent
    monkeypatch.setattr(sys, "argv", [
        "train.py", "advise", f"--config={root / 'recipes/digits_lamp.yaml'}",
        f"--trainer.default_root_dir={tmp_path}", "--sparsity=null",
    ])  # fmt: skip
    with pytest.raises(SystemExit):
        train.main()
    assert "advise needs a pruned network" in capsys.readouterr().err
