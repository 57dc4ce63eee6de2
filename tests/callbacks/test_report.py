"""The report: numbers counted by hand, files that open, and no report where none is wanted."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from callbacks import GMP, LAMP, OneShot, SparsityReport
from sparsity import report
from sparsity.schedules import Cubic
from tests.nets import Batch, Batches, Net, SaveEpochs, Task, ValidatedTask, task, trainer
from tests.webpage import Page


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
    # A convolution has a weight in each of 2 x 2 places; one layer is never called.
    dense = dict.fromkeys(weights, 0) | {
        "net.conv.weight": 2 * 4 * 288, "net.fc.weight": 2 * 512, "net.tied.weight": 2 * 256,
        "net.frozen.weight": 2 * 256, "net.head.weight": 2 * 48,
    }  # fmt: skip
    for name, row in layers.items():
        size, kept = weights[name].numel(), int(weights[name].count_nonzero())
        assert row == {
            "shape": list(weights[name].shape), "pattern": "unstructured",
            "density": kept / size,
            "dead_outputs": sum(not bool(part.any()) for part in weights[name]),
            "dead_inputs": sum(not bool(part.any()) for part in weights[name].transpose(0, 1)),
            "bytes": {"dense": 4 * size, "stored": 4 * kept + math.ceil(size / 8)},
            "flops": {"dense": dense[name], "sparse": round(dense[name] * kept / size)},
            "kernel": "rows" if name == "net.fc.weight" else "dense",  # at most a fifth is kept
        }  # fmt: skip
    assert result["sparsity"]["target"] == result["sparsity"]["achieved"] == 0.75
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == f"report: {tmp_path / 'report.json'}"
    assert "sparsity 0.7500 of 1,424 target weights" in output
    assert "neither faster nor its checkpoint smaller" in output
    assert output.splitlines()[-2] == f"page: {tmp_path / 'report.html'}"
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


def pruned_then_reported(
    folder: Path, *, report_first: bool = False, epochs: int = 4, ckpt_path: Path | None = None
) -> SparsityReport:
    """Prunes while it trains, validates, and saves a checkpoint at the end of every epoch."""
    callbacks = [GMP(sparsity=0.75, schedule=Cubic(every=2)), SparsityReport(recipe="mine")]
    reporter = callbacks[1]
    assert isinstance(reporter, SparsityReport)
    order = callbacks[::-1] if report_first else callbacks
    task()
    settings: dict[str, Any] = {"default_root_dir": folder, "enable_checkpointing": True}
    runner = trainer(*order, SaveEpochs(folder), epochs=epochs, **settings)
    runner.fit(ValidatedTask(), Batches(), Batches(2, seed=1), ckpt_path=ckpt_path, weights_only=True)
    return reporter


def test_the_page_of_a_run_has_the_numbers_of_its_report(tmp_path: Path) -> None:
    reporter = pruned_then_reported(tmp_path)
    result, found = written(tmp_path), Page((tmp_path / "report.html").read_text())
    assert found.outside() == []
    assert found.sections == ["warnings", "training", "metrics", "layers", "density", "weights", "masks"]
    for (name, row), cells in zip(result["sparsity"]["layers"].items(), found.tables["Layers"][1:], strict=False):
        assert cells[:6] == [
            name, " x ".join(map(str, row["shape"])), f"{math.prod(row['shape'])}",
            f"{row['density'] * math.prod(row['shape']):.0f}", f"{row['density']:.4f}", "unstructured",
        ]  # fmt: skip
        assert cells[-1] == row["kernel"]
    assert found.tables["Metrics"][1:] == [["val/loss", f"{result['metrics']['val/loss']:.4g}"]]
    assert [row["step"] for row in reporter.traces.rows] == [6, 12, 18, 24]
    assert reporter.traces.rows[-1]["metrics"] == result["metrics"]
    assert any(each.startswith("loss over optimizer step. val/loss:") for each in found.summaries)


@pytest.mark.parametrize("report_first", [False, True])
def test_histograms_are_of_the_weights_before_pruning_and_after(tmp_path: Path, report_first: bool) -> None:
    traces = pruned_then_reported(tmp_path, report_first=report_first, epochs=2).traces
    counts = {when: sum(int(each["counts"].sum()) for each in found.values())
              for when, found in (("before", traces.before), ("after", traces.after))}  # fmt: skip
    assert counts == {"before": 1424, "after": 356}


def test_a_resumed_run_has_the_traces_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = pruned_then_reported(tmp_path / "whole").traces
    resumed = pruned_then_reported(tmp_path / "again", ckpt_path=tmp_path / "whole" / "1.ckpt").traces
    assert resumed.rows == whole.rows
    assert all(torch.equal(resumed.before[name]["counts"], each["counts"]) for name, each in whole.before.items())
    pages = [(tmp_path / name / "report.html").read_text() for name in ("whole", "again")]
    assert pages[0] == pages[1]


def test_layers_that_are_made_late_have_no_histogram_of_before(tmp_path: Path) -> None:
    class Late(Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Identity()  # type: ignore[assignment]  # until it is configured

        def configure_model(self) -> None:
            self.net = Net()

    task()
    model = Late()
    reporter = SparsityReport()
    trainer(reporter, LAMP(sparsity=0.5), default_root_dir=tmp_path).fit(model, Batches())
    assert reporter.traces.before == {}
    found = Page((tmp_path / "report.html").read_text())
    assert "Weights" in found.headings


def test_a_test_after_training_keeps_what_training_left(tmp_path: Path) -> None:
    class Tested(ValidatedTask):
        def test_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    task()
    runner = trainer(GMP(sparsity=0.75, schedule=Cubic(every=2)), SparsityReport(), default_root_dir=tmp_path)
    model = Tested()
    runner.fit(model, Batches(), Batches(2, seed=1))
    runner.test(model, Batches(2, seed=2), verbose=False)
    found = Page((tmp_path / "report.html").read_text())
    assert {"training", "density", "weights"} <= set(found.sections)
    assert [row[0] for row in found.tables["Metrics"][1:]] == ["val/loss", "test/loss"]


def test_a_sparsity_that_was_not_reached_is_the_first_warning() -> None:
    assert report.drift(0.9, 0.9004) == report.drift(0.5, 0.5) == []
    [early] = report.drift(0.9, 0.65)
    assert early == "sparsity is 0.6500, and 0.9000 was asked for"
    assert report.is_urgent(early)


def test_flops_of_attention_are_those_of_its_products() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    found = report.module_flops(layer, (torch.randn(1, 8, 32),))
    projections, mixing, feedforward = 2 * 8 * 32 * (96 + 32), 2 * 2 * 8 * 8 * 32, 2 * 2 * 8 * 32 * 64
    assert found[""] in (projections + feedforward, projections + mixing + feedforward)  # torch's counter decides
    masks = {name: torch.ones_like(each, dtype=torch.bool) for name, each in layer.named_parameters() if each.ndim > 1}
    rows = report.layer_flops(found, masks)
    assert rows["self_attn.out_proj.weight"]["dense"] * 3 == rows["self_attn.in_proj_weight"]["dense"] > 0
    assert sum(row["dense"] for row in rows.values()) == pytest.approx(found[""])
