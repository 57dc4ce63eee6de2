"""The report: numbers counted by hand, files that open, and no report where none is wanted."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from callbacks import LAMP, OneShot, SparsityReport
from sparsity import report
from tests.nets import Batch, Batches, Task, task, trainer


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_report_of_a_python_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, method = task(), OneShot(sparsity=0.75)
    trainer(SparsityReport(recipe="mine"), method, default_root_dir=tmp_path).fit(model, Batches())
    result = written(tmp_path)
    assert (result["recipe"], result["seed"], result["metrics"]) == ("mine", 0, {})
    layers = result["sparsity"]["layers"]
    assert list(layers) == [f"net.{n}.weight" for n in ("conv", "fc", "tied", "frozen", "unused", "head")]
    weights = dict(model.named_parameters())
    for name, row in layers.items():
        assert row == {
            "shape": list(weights[name].shape), "pattern": "unstructured",
            "density": int(weights[name].count_nonzero()) / weights[name].numel(),
            "dead_outputs": sum(not bool(part.any()) for part in weights[name]),
            "dead_inputs": sum(not bool(part.any()) for part in weights[name].transpose(0, 1)),
        }  # fmt: skip
    assert result["sparsity"]["target"] == result["sparsity"]["achieved"] == 0.75
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == f"report: {tmp_path / 'report.json'}"
    assert "sparsity 0.7500 of 1,424 target weights" in output
    assert "neither faster nor its checkpoint smaller" in output
    with Image.open(tmp_path / "density.png") as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10


def test_flops_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 5, 10))
    masks = {"0.weight": torch.zeros(4, 2, 3, 3, dtype=torch.bool), "3.weight": torch.ones(10, 100, dtype=torch.bool)}
    masks["0.weight"].view(-1)[:18] = True
    found = report.flops(model, (torch.randn(1, 2, 5, 5),), masks)
    convolution, linear = 2 * 25 * 4 * 2 * 9, 2 * 10 * 100
    assert found == {"dense": convolution + linear, "sparse": convolution // 4 + linear}
    assert model.training


def test_empty_layers_and_dead_paths_are_named() -> None:
    kept = {"one": torch.zeros(3, 4, dtype=torch.bool), "two": torch.zeros(3, 4, dtype=torch.bool)}
    kept["two"][0, :2] = True
    expected = ["no weight is left in one", "2 outputs of two have no", "2 inputs of two have no"]
    found = report.warnings(report.layers(kept, "unstructured"))
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))
    turned = report.layers(kept, "unstructured", {"two"})["two"]
    assert (turned["dead_outputs"], turned["dead_inputs"]) == (2, 2)
    kept["two"][:] = True
    assert report.warnings(report.layers(kept, "unstructured")) == expected[:1]


def test_bytes_by_hand() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)
            self.two.weight = self.one.weight

    model = Tied()
    masks = {"one.weight": torch.arange(81).view(9, 9) < 21}
    found = report.sizes(model, masks, {"one.weight": model.one.weight})
    assert found == {"dense": 4 * 81, "stored": 4 * 21 + 11}


def test_flops_are_null_where_the_forward_needs_something_else(tmp_path: Path) -> None:
    class Odd(Task):
        def forward(self, x: Tensor, mode: str) -> Tensor:  # type: ignore[override]  # the point of the test
            logits: Tensor = self.net(x)
            return logits

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0], "train"), batch[1])

    task()
    trainer(LAMP(sparsity=0.5), SparsityReport(), default_root_dir=tmp_path).fit(Odd(), Batches())
    assert written(tmp_path)["flops"] == {"dense": None, "sparse": None}


def test_dense_run_and_metrics(tmp_path: Path) -> None:
    class Logs(Task):
        def on_train_epoch_end(self) -> None:
            self.log_dict({"good": 0.5, "bad": float("nan")})

    task()
    trainer(SparsityReport(), default_root_dir=tmp_path).fit(Logs(), Batches())
    result = written(tmp_path)
    assert result["metrics"] == {"good": 0.5, "bad": None}
    assert result["sparsity"]["target"] == result["sparsity"]["achieved"] == 0.0
    assert {row["pattern"] for row in result["sparsity"]["layers"].values()} == {"dense"}


def test_figure_on_tensorboard(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, "board")
    trainer(LAMP(sparsity=0.5), SparsityReport(), logger=board).fit(task(), Batches())
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert events.Images("sparsity/density")
    assert written(Path(board.log_dir))["sparsity"]["achieved"] == 0.5


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    runner = pl.Trainer(
        accelerator="cpu",
        fast_dev_run=True,
        default_root_dir=tmp_path,
        callbacks=[LAMP(sparsity=0.5), SparsityReport()],
    )
    runner.fit(task(), Batches())
    assert not list(tmp_path.rglob("*"))


def test_an_interrupted_write_leaves_the_old_report(tmp_path: Path) -> None:
    report.save({"whole": 1}, tmp_path / "report.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.save({"broken": float("nan")}, tmp_path / "report.json")
    assert written(tmp_path) == {"whole": 1}
