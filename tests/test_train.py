"""The command line, called as a user would."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import train
from callbacks import commands
from sparsity import export as exported
from sparsity import masks, models
from sparsity.patterns import nm_mask

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "digits_lamp.yaml"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def call(folder: Path, *args: str) -> None:
    """Runs `python train.py ...` in this process, below a folder of its own."""
    sys.argv = ["train.py", *args, f"--trainer.default_root_dir={folder}", *QUIET]
    train.main()


def fit(folder: Path, *args: str) -> None:
    call(folder, "fit", "--config", str(RECIPE), "--trainer.max_epochs=2", *args)


def newest(folder: Path, name: str) -> Path:
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime_ns)


def read(folder: Path) -> dict:  # type: ignore[type-arg]
    found: dict = json.loads(newest(folder, "report.json").read_text())  # type: ignore[type-arg]
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(newest(folder, "last.ckpt"), weights_only=True)["state_dict"]
    return state


# Lightning says so whenever a new run, with a log folder of its own, goes on from a checkpoint of another.
new_log_folder = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")


@pytest.fixture(autouse=True)
def restore_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_fit_leaves_the_report_and_prints_its_path_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {newest(tmp_path, 'report.json')}"
    report = read(tmp_path)
    assert list(report) == ["recipe", "seed", "metrics", "sparsity", "flops", "bytes", "versions", "warnings"]
    assert (report["recipe"], report["seed"]) == ("digits_lamp", 1)
    assert report["sparsity"]["target"] == report["sparsity"]["achieved"] == 0.9
    assert {name: row["shape"] for name, row in report["sparsity"]["layers"].items()} == {
        "net.fc1.weight": [300, 64], "net.fc2.weight": [100, 300], "net.fc3.weight": [10, 100],
    }  # fmt: skip
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} == set(report["metrics"])
    kept = {name: int(value.count_nonzero()) for name, value in weights(tmp_path).items() if name.endswith("weight")}
    assert sum(kept.values()) == 5020
    for name, row in report["sparsity"]["layers"].items():
        assert row["density"] == kept[name] / weights(tmp_path)[name].numel()
    # Each multiply-add is two operations: LeNet-300-100 does one for each weight.
    assert report["flops"] == {"dense": 2 * 50_200, "sparse": 2 * 5_020}
    assert report["bytes"]["dense"] == 4 * (50_200 + 410)
    assert newest(tmp_path, "density.png").stat().st_size > 5_000


@new_log_folder
def test_validate_test_and_oneshot_work_on_a_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path)
    checkpoint = str(newest(tmp_path, "last.ckpt"))
    call(tmp_path, "validate", "--config", str(RECIPE), "--ckpt_path", checkpoint)
    assert set(read(tmp_path)["metrics"]) == {"val/loss", "val/acc"}
    call(tmp_path, "test", "--config", str(RECIPE), "--ckpt_path=last")
    assert set(read(tmp_path)["metrics"]) == {"test/loss", "test/acc"}
    assert read(tmp_path)["sparsity"]["achieved"] == 0.9
    call(tmp_path, "oneshot", "--config", str(RECIPE), "--ckpt_path", checkpoint, "--sparsity.sparsity=0.95")
    assert read(tmp_path)["sparsity"]["achieved"] == 0.95
    pruned = torch.load(newest(tmp_path, "oneshot.ckpt"), weights_only=True)["state_dict"]
    assert sum(int(value.count_nonzero()) for name, value in pruned.items() if name.endswith("weight")) == 2510


def test_dense_baseline_of_the_same_recipe(tmp_path: Path) -> None:
    fit(tmp_path, "--sparsity=null")
    report = read(tmp_path)
    assert report["sparsity"]["target"] == report["sparsity"]["achieved"] == 0.0
    assert report["flops"]["dense"] == report["flops"]["sparse"]


@pytest.mark.parametrize("method", ["GMP", "StaticMask", "GlobalMP"])
def test_another_method_at_the_same_budget(method: str, tmp_path: Path) -> None:
    fit(tmp_path, f"--sparsity={method}")
    assert read(tmp_path)["sparsity"]["achieved"] == 0.9


def test_quoted_pattern_override(tmp_path: Path) -> None:
    fit(tmp_path, "--sparsity=OneShot", "--sparsity.sparsity=0.5", "--sparsity.pattern=2:4")
    assert {row["pattern"] for row in read(tmp_path)["sparsity"]["layers"].values()} == {"2:4"}
    mask = masks.from_zeros({"fc1": weights(tmp_path)["net.fc1.weight"]})["fc1"]
    assert bool((mask.view(300, 16, 4).sum(-1) == 2).all())


def test_the_saved_config_runs_again_identically(tmp_path: Path) -> None:
    fit(tmp_path / "one")
    saved = newest(tmp_path / "one", "config.yaml")
    call(tmp_path / "two", "fit", "--config", str(saved))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


@new_log_folder
def test_resume_from_last(tmp_path: Path) -> None:
    fit(tmp_path / "whole", "--trainer.max_epochs=4")
    fit(tmp_path / "parts", "--trainer.max_epochs=4")
    fit(tmp_path / "parts", "--trainer.max_epochs=6", "--ckpt_path=last")
    saved = torch.load(newest(tmp_path / "parts", "last.ckpt"), weights_only=True)
    assert saved["epoch"] == 5
    assert saved["callbacks"]["Sparsify"]["step"] == saved["global_step"] == 6 * 21
    assert read(tmp_path / "parts")["sparsity"]["achieved"] == 0.9


ERRORS = {
    "--sparsity=Lamb": r"error: sparsity: no class is called 'Lamb'\ngot: Lamb\ntry: one of: ASP, ConstantMask, ",
    "--sparsity.sparsty=0.3": r"error: .*Option 'sparsty' is not accepted\ntry: sparsity, one of: sparsity, schedule",
    "--sparsity.sparsity=1.5": r"sparsity is the fraction of zeros and must lie in \[0, 1\), got 1.5",
    "--sparsity.sparsity=many": r"Expected a <class 'float'>. Got value: many",
    "--sparsity.pattern=124": r'pattern must be text, got the number 124: .*; write "2:4"',
    "--sparsity.pattern=2-4": r"unknown pattern '2-4'",
    "--sparsity.schedule=Cubik": r"(?s)no class is called 'Cubik'.*try: Cubic",
    "--model.net=LeNet30010": r"no class is called 'LeNet30010'\ntry: LeNet300100 or ",
    "--optimizer=Adaam": r"no class is called 'Adaam'\ngot: Adaam\ntry: Adam or ",
    "--sparsity.schedule.end=5000": r"end=5000 is step 5000, after the end of training at step 42",
    "--sparsity.schedule.endd=0.5": r"Option 'endd' is not accepted\ntry: end, one of: start, end, every, initial",
    "--trainer.max_epoch=3": r"unrecognized arguments: --trainer.max_epoch=3",
    "--trainer.max_epochs=-1": r"a fraction of a training without end",
    "--sparsity=ConstantMask": r"no pruned weights, so there is nothing to keep",
    "--sparsity.sparsity=0.999999": r"cannot be met over 50200 .*: it keeps none; the highest that can is 0.99998",
    "--ckpt_path=nowhere.ckpt": r"no checkpoint at 'nowhere.ckpt'",
    "--ckpt_path=last": r"no last.ckpt under '.*': train with ModelCheckpoint\(save_last=True\)",
    "--data=Digit": r"no class is called 'Digit'\ngot: Digit\ntry: Digits",
}  # fmt: skip


@pytest.mark.parametrize("argument", ERRORS)
def test_bad_input_is_refused_in_plain_lines(argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, argument)
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    complaint = complaint[complaint.index("error: ") :].strip()
    assert re.search(ERRORS[argument], complaint), complaint
    assert len(complaint.splitlines()) <= 3
    assert "Traceback" not in complaint
    assert not list(tmp_path.rglob("report.json"))


def test_an_unquoted_pattern_in_a_recipe_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    text = RECIPE.read_text().replace("    sparsity: 0.9 ", "    pattern: 2:4\n    sparsity: 0.9 ")
    assert recipe != yaml.safe_load(text)
    (tmp_path / "unquoted.yaml").write_text(text)
    with pytest.raises(SystemExit):
        call(tmp_path, "fit", "--config", str(tmp_path / "unquoted.yaml"))
    assert 'got the number 124: YAML reads an unquoted N:M so; write "2:4"' in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    whole = newest(tmp_path, "last.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit):
        call(tmp_path, "test", "--config", str(RECIPE), "--ckpt_path", str(tmp_path / "half.ckpt"))
    assert re.search(r"error: the checkpoint '.*half.ckpt' is truncated or corrupt", capsys.readouterr().err)


@pytest.mark.parametrize("recipe", ["mnist_lenet300_lamp", "cifar10_resnet20_gmp"])
def test_a_missing_data_folder_is_named(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(tmp_path, "fit", "--config", str(ROOT / f"recipes/{recipe}.yaml"), f"--data.data_dir={tmp_path}/none")
    assert re.search(r"error: no folder '.*/none': pass", capsys.readouterr().err)


@new_log_folder
def test_another_sparsity_is_resumed_only_if_it_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    again = ["--sparsity.sparsity=0.95", "--trainer.max_epochs=3", "--ckpt_path=last"]
    with pytest.raises(SystemExit):
        fit(tmp_path, *again)
    error = capsys.readouterr().err
    assert "LAMP at sparsity 0.9, this run is LAMP at sparsity 0.95" in error
    assert "--resumes_any=true" in error
    fit(tmp_path, *again, "--resumes_any=true")
    assert read(tmp_path)["sparsity"]["target"] == 0.95


def test_a_recipes_method_is_swapped_for_one_that_grows(tmp_path: Path) -> None:
    fit(tmp_path, "--sparsity=RigL", "--sparsity.drops=InTime", "--sparsity.drops.every=5")
    found = read(tmp_path)["sparsity"]
    assert found["achieved"] == 0.9
    assert found["explored"] > 0.11


def test_an_interval_longer_than_training_is_said_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, "--sparsity=RigL", "--sparsity.drops=CosineDrop", "--sparsity.drops.every=5000")
    assert "error: an update every=5000 (5000 steps) comes first" in capsys.readouterr().err


@pytest.mark.parametrize("score", ["Wanda", "SparseGPT"])
def test_oneshot_by_data_leaves_masks_to_train_with(score: str, tmp_path: Path) -> None:
    fit(tmp_path / "dense", "--sparsity=null")
    checkpoint = str(newest(tmp_path / "dense", "last.ckpt"))
    method = ["--sparsity=OneShot", "--sparsity.sparsity=0.5", f"--sparsity.score={score}", "--sparsity.pattern=2:4"]
    call(tmp_path / "pruned", "oneshot", "--config", str(RECIPE), "--ckpt_path", checkpoint, *method)
    report = read(tmp_path / "pruned")
    assert report["sparsity"]["achieved"] == report["sparsity"]["target"] == 0.5
    assert {row["pattern"] for row in report["sparsity"]["layers"].values()} == {"2:4"}
    assert report["metrics"]["val/acc"] > 0.5
    file = newest(tmp_path / "pruned", "masks.safetensors")
    found = masks.load(file)
    state = torch.load(newest(tmp_path / "pruned", "oneshot.ckpt"), weights_only=True)["state_dict"]
    assert all(not state[name][~mask].any() for name, mask in found.items())

    learned = ["--sparsity=GumbelNM", "--sparsity.prior=Prior", f"--sparsity.prior.file={file}"]
    fit(tmp_path / "learned", *learned, "--weights", checkpoint)
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, mask in masks.from_zeros({name: weights(tmp_path / "learned")[name] for name in found}).items():
        assert mask.float().mean() == 0.5
        assert torch.equal(weights(tmp_path / "learned")[name], before[name] * mask), "frozen weights moved"


def test_weights_start_a_run_without_its_optimizer(tmp_path: Path) -> None:
    fit(tmp_path / "dense", "--sparsity=null")
    checkpoint = str(newest(tmp_path / "dense", "last.ckpt"))
    fit(tmp_path / "on", "--weights", checkpoint, "--sparsity=ASP", "--sparsity.pattern=2:4", "--optimizer.lr=0.0")
    saved = torch.load(newest(tmp_path / "on", "last.ckpt"), weights_only=True)
    assert saved["global_step"] == 42, "it starts anew"
    dense = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in saved["state_dict"].items():
        kept = nm_mask(value, 2, 4) if value.ndim == 2 else torch.ones_like(value)
        expected = dense[name] * (nm_mask(dense[name], 2, 4) if value.ndim == 2 else kept)
        torch.testing.assert_close(value, expected)


def test_weights_of_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, "--weights", str(tmp_path / "other.ckpt"))
    assert stopped.value.code == 2
    assert "is for another model" in capsys.readouterr().err


def test_bench_runs_the_benchmarks_that_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        ran.append(command[1:])
        return SimpleNamespace(returncode=len(ran) - 1)

    monkeypatch.setattr("subprocess.run", run)
    for words, code in ((["bench", "kernels"], 0), (["bench", "kernels", "soak"], 2), (["bench", "speed"], 2)):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with pytest.raises(SystemExit) as ended:
            train.main()
        assert ended.value.code == code
    assert ran == [["-m", f"benchmarks.{name}"] for name in ("kernels", "kernels", "soak")]
    assert "no benchmark that measures time is called 'speed'" in capsys.readouterr().err
    assert all((ROOT / f"benchmarks/{name}.py").exists() for name in commands.TIMED)


def test_a_dry_run_prints_the_budget_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, "--dry-run")
    assert ended.value.code == 0
    assert re.search(r"all targets .* 50,200 .* 5,020 .* 0\.1000", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_only_fit_has_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call(tmp_path, "validate", "--config", str(RECIPE), "--dry-run")
    assert ended.value.code == 2
    assert "dry_run is of fit" in capsys.readouterr().err


@new_log_folder
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_ctrl_c_leaves_status_130_and_a_checkpoint_that_last_finds(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.Classifier, "on_train_batch_start", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as ended:
            fit(tmp_path)
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert ended.value.code == 130
    assert newest(tmp_path, "interrupted.ckpt")
    fit(tmp_path, "--ckpt_path=last")
    assert read(tmp_path)["sparsity"]["achieved"] == pytest.approx(0.9)


def test_a_completion_script_knows_subcommands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        train.main(["completion", "bash"])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("federate", "--ckpt_path", "--trainer.max_epochs"))


def test_no_completion_for_a_shell_that_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["completion", "sh"])
    assert ended.value.code == 2
    assert "bash,zsh" in capsys.readouterr().err


def test_export_writes_what_loads_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    checkpoint = str(newest(tmp_path, "last.ckpt"))
    export = ["export", "--config", str(RECIPE), "--ckpt_path", checkpoint]
    call(tmp_path, *export)
    path = newest(tmp_path, "compressed.safetensors")
    assert capsys.readouterr().out.splitlines()[-1] == f"export: {path}"
    result = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert result["bytes"] == {"dense": 4 * (50_200 + 410), "written": path.stat().st_size}
    assert result["bytes"]["written"] < 0.2 * result["bytes"]["dense"]
    trained = weights(tmp_path)
    assert all(torch.equal(value, trained[name]) for name, value in exported.read(path).items())
    assert exported.read(path).keys() == trained.keys()

    output = tmp_path / "net.pt2"
    call(tmp_path, *export, "--format=torch", "--part=net", f"--output={output}")
    program = torch.export.load(output).module()
    images = torch.rand(3, 1, 8, 8)
    hidden = images.flatten(1)
    for layer in ("fc1", "fc2", "fc3"):
        hidden = hidden @ trained[f"net.{layer}.weight"].T + trained[f"net.{layer}.bias"]
        hidden = hidden.relu() if layer != "fc3" else hidden
    torch.testing.assert_close(program(images), hidden)


EXPORT_ERRORS = {
    "--part=head": "error: the model has no part called 'head': its parts are net",
    "--format=nm": "error: no weight keeps at most 2 of each 4",
    "--format=zip": "error: format: ",
    "--ckpt_path=null": "error: export needs the checkpoint of a trained network",
}


def test_exports_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    checkpoint = str(newest(tmp_path, "last.ckpt"))
    for argument, message in EXPORT_ERRORS.items():
        with pytest.raises(SystemExit) as stop:
            call(tmp_path, "export", "--config", str(RECIPE), "--ckpt_path", checkpoint, argument)
        assert stop.value.code == 2
        complaint = capsys.readouterr().err
        assert message in complaint
        assert "Traceback" not in complaint
    assert not list(tmp_path.rglob("compressed.safetensors*"))


def test_a_dry_run_takes_any_callbacks(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, "--dry-run", "--trainer.callbacks=LearningRateMonitor")
    assert ended.value.code == 0
    assert not list(tmp_path.iterdir())


@new_log_folder
def test_a_run_that_is_over_says_that_nothing_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    assert "nothing was trained" not in capsys.readouterr().err
    fit(tmp_path, "--ckpt_path=last")
    assert "nothing was trained: the checkpoint is of step" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_recipe_can_be_scaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["fit", "--config", str(ROOT / "recipes" / "digits_rigl.yaml")]
    call(tmp_path, *recipe, "--trainer.max_epochs=1", "--scaled=both")
    report = read(tmp_path)
    assert (report["sparsity"]["achieved"], report["scaled"]) == (0.9, "both")
    with pytest.raises(SystemExit):
        call(tmp_path, *recipe, "--dry-run", "--scaled=both")
    assert "RigL, pattern unstructured, distribution ERK, scaled: both" in capsys.readouterr().out
    assert torch.load(newest(tmp_path, "last.ckpt"), weights_only=True)["callbacks"]["Sparsify"]["sparsifier"]["scaled"]
    call(tmp_path, *recipe, "--trainer.max_epochs=2", "--scaled=both", "--ckpt_path=last")
    for wishes, message in (
        (
            ["--ckpt_path=last"],
            "trained by RigL at sparsity 0.9, scaled both, this run is RigL at sparsity 0.9: resume",
        ),
        (["--sparsity=GMP", "--scaled=both"], "masks are random at first"),
    ):
        with pytest.raises(SystemExit) as ended:
            call(tmp_path, *recipe, "--trainer.max_epochs=3", *wishes)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    call(tmp_path, *recipe, "--trainer.max_epochs=1", "--scaled=both", "--sparsity=null")
    assert read(tmp_path)["sparsity"]["achieved"] == 0
