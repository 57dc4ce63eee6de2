"""`scaled` of a recipe: weights and rates by the densities of its method, in `fit` and in `federate`."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import train

ROOT = Path(__file__).parents[1]
RIGL = ROOT / "recipes" / "digits_rigl.yaml"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def restore_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


def fit(folder: Path, *args: str) -> None:
    train.main(["fit", "--config", str(RIGL), f"--trainer.default_root_dir={folder}", *QUIET, *args])


def saved(folder: Path) -> dict[str, Any]:
    newest = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, Any] = torch.load(newest, weights_only=True)
    return found


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_rates_follow_densities_and_the_schedule(tmp_path: Path) -> None:
    wishes = ["--scaled=true", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"]
    fit(tmp_path, "--trainer.max_epochs=2", *wishes)
    checkpoint = saved(tmp_path)
    [optimizer] = checkpoint["optimizer_states"]
    plain, *sparse = optimizer["param_groups"]
    assert plain["density"] == 1.0
    assert len(sparse) == 3
    weights = [value for name, value in checkpoint["state_dict"].items() if name.endswith("weight")]
    densities = sorted((float((weight != 0).double().mean()) for weight in weights), reverse=True)
    assert [group["density"] for group in sparse] == pytest.approx(densities, rel=0.02)
    for group in sparse:
        assert group["lr"] == pytest.approx(plain["lr"] / group["density"])
        assert group["initial_lr"] == pytest.approx(plain["initial_lr"] / group["density"])
    assert plain["lr"] < plain["initial_lr"]
    fit(tmp_path, "--trainer.max_epochs=3", *wishes, "--ckpt_path=last")
    after = saved(tmp_path)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in after] == pytest.approx([group["lr"] / 2 for group in (plain, *sparse)])


def test_dense_layers_keep_the_rate(tmp_path: Path) -> None:
    fit(tmp_path, "--trainer.max_epochs=1", "--scaled=true", "--sparsity=null")
    [optimizer] = saved(tmp_path)["optimizer_states"]
    assert len(optimizer["param_groups"]) == 1
    assert "density" not in optimizer["param_groups"][0]


def test_weights_to_start_from_stay_as_they_are(tmp_path: Path) -> None:
    fit(tmp_path, "--trainer.max_epochs=1", "--sparsity=null")
    before = saved(tmp_path)["state_dict"]
    path = next(tmp_path.rglob("last.ckpt"))
    fit(tmp_path, "--trainer.max_epochs=1", "--scaled=true", f"--weights={path}", "--optimizer.lr=0")
    after = saved(tmp_path)["state_dict"]
    for name, weight in after.items():
        assert torch.equal(weight, before[name] * (weight != 0))


def test_methods_that_begin_dense_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, "--scaled=true", "--sparsity=GMP")
    assert ended.value.code == 2
    assert "random at first and sparse from then on, such as RigL: GMP is none" in capsys.readouterr().err


def test_clients_of_a_federation_have_them_too() -> None:
    recipe = str(ROOT / "recipes/federated/digits_fedsgc.yaml")
    plain, _, _ = train.Recipe(recipe, "--scaled=false")()
    model, _, method = train.Recipe(recipe, "--scaled=true")()
    groups = model.configure_optimizers().param_groups
    densities = {id(weight): group["density"] for group in groups for weight in group["params"]}
    for weight, before in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, before / densities[id(weight)] ** 0.5)
    [rate] = {round(group["lr"] * group["density"], 9) for group in groups}
    assert rate == groups[0]["lr"]
    assert min(densities.values()) < 1 - method.sparsifier.sparsity + 0.05
