"""`python train.py federate` and its recipes, as a user calls them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import train
from tests.webpage import Page

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes/federated").glob("*.yaml") if path.stem != "smoke")


@pytest.fixture(autouse=True)
def restore_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def federate(folder: Path, *args: str, recipe: str = "digits_fedsgc") -> None:
    path = str(ROOT / f"recipes/federated/{recipe}.yaml")
    sys.argv = ["train.py", "federate", "--config", path, *args, f"--trainer.default_root_dir={folder}"]
    train.main()


def short(folder: Path, *args: str) -> None:
    federate(folder, "--federation.rounds=9", "--evaluate_every=3", *args)


def newest(folder: Path, name: str) -> Path:
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime_ns)


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(newest(folder, "report.json").read_text())
    return found


def test_it_leaves_a_report_with_a_row_per_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {newest(tmp_path, 'report.json')}"
    rounds = [line for line in lines if line.startswith("round ")]
    assert len(rounds) == 9
    assert "accuracy" in rounds[-1]
    assert all("down" in line and "up" in line and "ETA" in line for line in rounds)
    report = read(tmp_path)
    assert (report["recipe"], report["seed"]) == ("digits_fedsgc", 1)
    assert report["sparsity"]["achieved"] == 1 - 10_040 / 50_200
    assert {"val/acc", "test/acc"} <= report["metrics"].keys()
    assert [row["round"] for row in report["rounds"]] == list(range(9))
    wanted = {"round", "accuracy", "bytes_up", "bytes_down", "clients", "failures", "density"}
    assert all(wanted <= row.keys() for row in report["rounds"])
    assert [row["accuracy"] is not None for row in report["rounds"]] == [False, False, True] * 3
    page = Page(newest(tmp_path, "report.html").read_text())
    assert {"training", "layers", "masks", "federated"} <= set(page.sections)
    assert page.outside() == []
    assert any(each.startswith("accuracy on the validation split over MB sent") for each in page.summaries)
    found = report["federated"]
    assert found["bytes_up"] == sum(row["bytes_up"] for row in report["rounds"]) < found["bytes_dense"] / 4
    assert sum(found["samples"]) == 1294
    assert 0 <= found["per_client"]["val/acc"]["least"] <= found["per_client"]["val/acc"]["median"] <= 1
    for name in ("accuracy.png", "holdings.png", "density.png", "federation.ckpt"):
        assert newest(tmp_path, name).stat().st_size > 1000


# Lightning says so whenever a run with a log folder of its own reads the checkpoint of another.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_the_global_model_loads_in_test(tmp_path: Path) -> None:
    short(tmp_path)
    measured = read(tmp_path)["metrics"]["test/acc"]
    path = ROOT / "recipes/digits_lamp.yaml"
    checkpoint = f"--ckpt_path={newest(tmp_path, 'federated.ckpt')}"
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    sys.argv = ["train.py", "test", "--config", str(path), checkpoint, *quiet]
    train.main()
    assert read(tmp_path)["metrics"]["test/acc"] == pytest.approx(measured, abs=1e-6)


def test_it_goes_on_from_the_last_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short(tmp_path / "whole")
    progress = train.Progress.__call__

    def stop(self: train.Progress, row: dict[str, Any]) -> None:
        progress(self, row)
        if row["round"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "__call__", stop)
        with pytest.raises(SystemExit) as ended:
            short(tmp_path / "part")
    assert ended.value.code == 130
    assert "interrupted: --resume=" in capsys.readouterr().err
    short(tmp_path / "part", "--resume=last", "--workers=2")
    one, other = read(tmp_path / "whole"), read(tmp_path / "part")
    assert one["metrics"] == other["metrics"]
    assert len(other["rounds"]) == 9


@pytest.mark.parametrize("change", [
    ["--sparsity=null"], ["--sparsity=PruneFL", "--sparsity.drops=CosineDrop", "--sparsity.drops.every=3"],
    ["--protocol.server=FedMedian", "--protocol.precision=int8"],
    ["--federation.partition=Dirichlet", "--federation.partition.alpha=1.0", "--protocol.local.proximal=0.1"],
    ["--protocol.tolerance=Tolerance", "--protocol.tolerance.dropout=0.3"],
])  # fmt: skip
def test_keys_can_be_overridden(change: list[str], tmp_path: Path) -> None:
    short(tmp_path, *change)
    report = read(tmp_path)
    assert len(report["rounds"]) == 9
    failed = sum(row["failures"] for row in report["rounds"])
    assert failed == sum(report["federated"]["failures"].values())
    assert (failed > 0) == ("--protocol.tolerance=Tolerance" in change)


@pytest.mark.parametrize(("change", "message"), [
    (["--federation.per_round=30"], "per_round=30 of clients=20 cannot take part"),
    (["--federation.clients=2000"], "1294 samples cannot be divided among 2000 clients"),
    (["--federation.partition=Dirichlet", "--federation.partition.alpha=0.001"], "alpha=0.001 starves a client"),
    (["--protocol.server=FedPerfect"], "no class is called 'FedPerfect'"),
    (["--sparsity=HyperSparse"], "finds its masks by more than weights and gradients"),
    (["--resume=last"], "no federation.ckpt under"),
    (["--resume=nowhere"], "there is no federation.ckpt in 'nowhere'"),
    (["--protocol.server=SCAFFOLD"], "has to be SGD without momentum"),
    (["--trainer.max_epochs=3", "--trainer.limit_val_batches=2"], "trainer.max_epochs=3, trainer.limit_val_batches=2"),
    (["--trainer.overfit_batches=1"], "leave out trainer.overfit_batches=1"),
    (["--trainer.accelerator=cpu", "--trainer.devices=2"], "set workers, not trainer.devices"),
    (["--trainer.max_time=00:00:00:09"], "nothing would call Timer"),
    (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/acc"], "nothing would call EarlyStopping"),
])  # fmt: skip
def test_bad_input_ends_with_a_plain_message(
    change: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        short(tmp_path, *change)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny data sets of random images in the layout of the real ones."""
    found = {}
    for name, column, mode, size in (("mnist", "image", "L", 28), ("cifar10", "img", "RGB", 32)):
        found[name] = tmp_path_factory.mktemp(name)
        for split, count in (("train", 900), ("test", 20)):
            pixels = torch.randint(0, 256, (count, size, size, len(mode)), dtype=torch.uint8).squeeze(-1).numpy()
            images = []
            for each in pixels:
                Image.fromarray(each, mode).save(buffer := io.BytesIO(), "PNG")
                images.append({"bytes": buffer.getvalue(), "path": None})
            labels = [index % 10 for index in range(count)]
            pq.write_table(pa.table({column: images, "label": labels}), found[name] / f"{split}-00000-of-00001.parquet")
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_and_is_listed(recipe: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name = recipe.split("_")[0]
    data = [f"--data.data_dir={folders[name]}"] if name in folders else []
    federate(tmp_path, "--config", str(ROOT / "recipes/federated/smoke.yaml"), *data, recipe=recipe)
    report = read(tmp_path)
    assert len(report["rounds"]) == 12
    target = 0.0 if "fedavg" in recipe else 0.8
    assert report["sparsity"]["achieved"] == pytest.approx(target, abs=1e-5)
    assert report.get("scaled") == ("both" if name in folders and target else None)
    text = (ROOT / f"recipes/federated/{recipe}.yaml").read_text()
    assert text.startswith("# ")
    assert f"python train.py federate --config recipes/federated/{recipe}.yaml" in text
    assert f"`{recipe}`" in (ROOT / "recipes/federated/README.md").read_text()
