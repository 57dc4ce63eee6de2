"""SparseML's recipes as overlays that run, with everything named that could not be translated."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import train
from callbacks import GMP, ConstantMask, GlobalMP, OneShot
from sparsity import InputError, Targets
from sparsity.sparseml import Imported, translate
from tests.test_train import QUIET, RECIPE, newest, read

GRADUAL = """
num_epochs: &epochs 12
low: &low 0.8

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: *epochs
  - !SetLearningRateModifier
    start_epoch: 0.0
    learning_rate: 0.008

pruning_modifiers:
  - !GMPruningModifier
    params: ["re:.*fc[12].weight"]
    init_sparsity: 0.05
    final_sparsity: *low
    start_epoch: 1.0
    end_epoch: 8
    update_frequency: 0.5
    leave_enabled: True
    inter_func: linear
    log_types: __ALL__
"""


def method(found: Imported) -> dict[str, Any]:
    sparsity: dict[str, Any] = found.overlay["sparsity"]
    return sparsity


def test_a_gradual_recipe() -> None:
    found = translate(GRADUAL)
    assert found.overlay == {
        "sparsity": {
            "class_path": "GMP",
            "init_args": {
                "sparsity": 0.8,
                "distribution": None,
                "pattern": "unstructured",
                "schedule": {
                    "class_path": "Linear",
                    "init_args": {"start": "1ep", "end": "8ep", "every": "0.5ep", "initial": 0.05},
                },
                "targets": {"class_path": "Targets", "init_args": {"include": ["*fc[12]?weight*"]}},
            },
        },
        "trainer": {"max_epochs": 12},
    }
    assert found.remarks == ["SetLearningRateModifier: not translated"]
    assert yaml.safe_load(found.text("some.yaml")) == found.overlay


def test_markdown_and_its_comment() -> None:
    page = f"<!-- words -->\n\n---{GRADUAL}---\n\n# Title\n\n---\nmore: words\n---\n"
    assert translate(page).overlay == translate(GRADUAL).overlay


def modifier(name: str, **settings: Any) -> str:
    usual: dict[str, Any] = {"final_sparsity": 0.9, "init_sparsity": 0.0, "start_epoch": 0.0, "end_epoch": 4.0,
                             "update_frequency": 1.0, "params": "__ALL_PRUNABLE__"}  # fmt: skip
    if name.startswith(("SparseGPT", "Wanda", "Constant")):
        usual = {}
    return yaml.safe_dump({"stage": {"pruning_modifiers": {name: {**usual, **settings}}}})


GIVEN: list[tuple[str, dict[str, Any], type, dict[str, Any]]] = [
    ("GMPruningModifier", {}, GMP, {"sparsity": 0.9}),
    ("MagnitudePruningModifier", {"mask_type": "2:4", "final_sparsity": 0.5}, GMP, {"pattern": "2:4"}),
    ("GMPruningModifier", {"mask_type": [1, 4]}, GMP, {"pattern": "1x4"}),
    ("GlobalMagnitudePruningModifier", {}, GlobalMP, {"minimum": 0.0}),
    ("MagnitudePruningModifier", {"apply_globally": True}, GlobalMP, {"minimum": 0.0}),
    ("SparseGPTModifier", {"sparsity": 0.5, "block_size": 64, "dampening_frac": 0.1, "mask_structure": "2:4"}, OneShot,
     {"score": {"class_path": "SparseGPT", "init_args": {"damping": 0.1, "block": 64}}, "pattern": "2:4"}),
    ("WandaPruningModifier", {"sparsity": 0.6, "sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.1}, OneShot,
     {"score": {"class_path": "Wanda"},
      "distribution": {"class_path": "OWL", "init_args": {"threshold": 5.0, "spread": 0.1}}}),
    ("ConstantPruningModifier", {"params": ["re:.*weight"]}, ConstantMask,
     {"targets": {"class_path": "Targets", "init_args": {"include": ["*weight*"]}}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "kind", "expected"), GIVEN)
def test_each_modifier_by_its_keys(name: str, settings: dict[str, Any], kind: type, expected: dict[str, Any]) -> None:
    found = method(translate(modifier(name, **settings)))
    assert found["class_path"] == kind.__name__
    assert found["init_args"] | expected == found["init_args"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)}) for _ in range(12)
        )


NAMES = {
    "re:.*q_proj$": lambda name: name.endswith("q_proj"),
    "conv1.weight": lambda name: name == "conv1",
    "head": lambda name: name == "head",
    "Conv2d": lambda name: name == "conv1",
    r"re:layers.\d+$": lambda name: name.startswith("layers"),
    r"re:layers\.1\d\.mlp": lambda name: re.match(r"layers\.1\d\.mlp", name),
    "re:layers.[0-3].mlp.weight$": lambda name: re.fullmatch(r"layers.[0-3].mlp", name),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_expressions_and_classes_select_what_they_selected(name: str) -> None:
    found = method(translate(modifier("GMPruningModifier", params=[name])))
    targets = Targets(**found["init_args"]["targets"]["init_args"])
    model = nn.ModuleDict({"net": Network()})
    matches: Any = NAMES[name]
    layers = [n for n, each in model["net"].named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    assert list(targets.select(model)) == [f"net.{each}.weight" for each in layers if matches(each)]


def test_several_sparsities_are_a_map() -> None:
    several = {0.8: ["conv1.weight"], 0.9: ["re:layers.*"]}
    found = translate(modifier("GMPruningModifier", final_sparsity=several, params=[]))
    settings = method(found)["init_args"]
    assert settings["sparsity"] == 0.9
    assert settings["distribution"]["init_args"]["sparsities"] == {"net.conv1.weight": 0.8, "net.layers*": 0.9}
    assert any("which the first run says" in each for each in found.remarks)
    two = [{"!": {"params": [name], "final_sparsity": each}} for name, each in (("a.weight", 0.5), ("b.weight", 0.7))]
    text = "pruning_modifiers:\n" + "".join(
        f"  - !GMPruningModifier\n    params: {each['!']['params']}\n    init_sparsity: 0.0\n    start_epoch: 0.0\n"
        f"    end_epoch: 3.0\n    update_frequency: 1.0\n    final_sparsity: {each['!']['final_sparsity']}\n"
        for each in two
    )
    found = translate(text, prefix="model.")
    assert method(found)["init_args"]["distribution"]["init_args"]["sparsities"] == {
        "model.a.weight": 0.5, "model.b.weight": 0.7,
    }  # fmt: skip
    assert method(found)["init_args"]["targets"]["init_args"]["include"] == ["model.a.weight", "model.b.weight"]


NAMED: list[tuple[str, dict[str, Any], str]] = [
    ("GMPruningModifier", {"leave_enabled": False}, "leave_enabled=False: masks stay until training ends here"),
    ("GMPruningModifier", {"inter_func": "inverse_cubic"}, "the curve 'inverse_cubic' is not there; Cubic is taken"),
    ("GMPruningModifier", {"init_sparsity": "__FROM_PARAM__"}, "the ramp begins at 0"),
    ("GMPruningModifier", {"mask_type": "block"}, "1x4"),
    ("GMPruningModifier", {"phased": True}, "GMPruningModifier: phased=True has no counterpart"),
    ("GMPruningModifier", {"end_epoch": -1}, "it has no end"),
    ("GMPruningModifier", {}, "no biases, norms or embeddings"),
    ("SparseGPTModifier", {"sparsity": 0.5, "quantize": True}, "nothing is quantized here"),
    ("SparseGPTModifier", {"sparsity": 0.5, "target_ids": ["a"]}, "target_ids: not needed"),
    ("WandaPruningModifier", {"sparsity": 0.5, "sequential_update": False}, "one after the other here, always"),
    ("ConstantPruningModifier", {"params": ["a.weight"], "end_epoch": 3}, "masks hold from the first step to the last"),
]


@pytest.mark.parametrize(("name", "settings", "remark"), NAMED)
def test_what_has_no_counterpart_is_named(name: str, settings: dict[str, Any], remark: str) -> None:
    found = translate(modifier(name, **settings))
    assert any(remark in each for each in found.remarks), found.remarks
    comments = [line for line in found.text("x.yaml").splitlines() if line.startswith("#")]
    assert any(remark in line for line in comments)


def test_other_modifiers_are_named() -> None:
    text = (
        GRADUAL + "  - !ConstantPruningModifier\n    params: __ALL__\n  - !QuantizationModifier\n    start_epoch: 9\n"
    )
    assert translate(text).remarks[-2:] == [
        "ConstantPruningModifier: left out, because GMPruningModifier's masks stay for good here",
        "QuantizationModifier: not translated",
    ]


def test_variables_are_looked_up_and_expressions_are_not_evaluated() -> None:
    text = "target: 0.7\n" + modifier("GMPruningModifier", final_sparsity="eval(target)")
    assert method(translate(text))["init_args"]["sparsity"] == 0.7
    for expression in ("eval(target * 2)", "eval(__import__('os').getcwd())", "eval(missing)"):
        with pytest.raises(InputError, match=r"a sparsity lies in \(0, 1\), got .eval"):
            translate("target: 0.7\n" + modifier("GMPruningModifier", final_sparsity=expression))
    with pytest.raises(InputError, match="expressions are never evaluated"):
        translate("epochs: 4\n" + modifier("GMPruningModifier", end_epoch="eval(epochs * 0.5)"))


REFUSED = {
    "a: [": "is no YAML",
    "- 1": "is a mapping, got a list",
    "": "is a mapping, got a NoneType",
    "a: !!python/object/apply:os.getcwd []": "is no YAML",
    "a: !!python/name:os.system": "is no YAML",
    "[" * 5000: "is no YAML",
    "a" * 300_000: "at most 262,144 characters",
    "---" + "\n" * 200_000: "is a mapping",
    "a: 1": "no modifier that can be translated, .* it has none",
    modifier("MovementPruningModifier"): "it has MovementPruningModifier",
    modifier("GMPruningModifier", final_sparsity=1.5): r"a sparsity lies in \(0, 1\), got 1.5",
    modifier("GMPruningModifier", mask_type=124): r"no pattern is like 124 \(quote N:M: YAML reads 2:4 so\)",
    modifier("GMPruningModifier", params=["re:.*(a|b)"]): "which globs do not",
    modifier("GMPruningModifier", params=[3]): "parameters are named in a list of texts, got \\[3\\]",
    modifier("GMPruningModifier", end_epoch=float("inf")): "end_epoch=inf, and a number was expected",
    modifier("GMPruningModifier", start_epoch="soon"): "start_epoch='soon', and a number was expected",
    modifier("WandaPruningModifier", sparsity=[0.1, 0.2]): r"a sparsity lies in \(0, 1\), got \[0.1, 0.2\]",
    modifier("GlobalMagnitudePruningModifier", final_sparsity={0.1: ["a"], 0.2: ["b"]}): "several sparsities",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20] if isinstance(text, str) else None)
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=REFUSED[text]):
        translate(text)


def call(*words: str) -> None:
    sys.argv = ["train.py", *words]
    train.main()


@pytest.fixture(autouse=True)
def restore_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_an_imported_recipe_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs.md"
    theirs.write_text(f"---{GRADUAL.replace('end_epoch: 8', 'end_epoch: 2')}---\n# Words\n")
    call("import-sparseml", str(theirs))
    out = capsys.readouterr().out.splitlines()
    overlay = tmp_path / "theirs.imported.yaml"
    assert out == ["- SetLearningRateModifier: not translated", f"recipe: {overlay}"]
    limits = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=12", f"--trainer.default_root_dir={tmp_path}"]
    call("fit", "--config", str(RECIPE), "--config", str(overlay), *limits, *QUIET)
    assert read(tmp_path)["sparsity"]["achieved"] == 0.8
    state = torch.load(newest(tmp_path, "last.ckpt"), weights_only=True)["state_dict"]
    assert int(state["net.fc3.weight"].count_nonzero()) == 1000
    zeros = [float((state[f"net.{name}.weight"] == 0).float().mean()) for name in ("fc1", "fc2")]
    assert zeros == pytest.approx([0.8, 0.8], abs=1e-4)


def test_the_command_refuses_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name, message in (("none.yaml", "no recipe at"), ("bad.yaml", "is no YAML"), ("bytes.yaml", "is no text")):
        with pytest.raises(SystemExit) as stop:
            call("import-sparseml", str(tmp_path / name))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.yaml", "bytes.yaml"]


def test_an_overlay_leaves_nothing_of_the_recipe_below_it(tmp_path: Path) -> None:
    """ConstantMask would otherwise inherit the sparsity of the recipe, and refuse masks of another."""
    pruned = torch.load(_trained(tmp_path), weights_only=True)["state_dict"]
    assert float((pruned["net.fc1.weight"] == 0).float().mean()) > 0.2
    (tmp_path / "constant.yaml").write_text(modifier("ConstantPruningModifier", params=["re:fc1.*"]))
    call("import-sparseml", str(tmp_path / "constant.yaml"), "--output", str(tmp_path / "overlay.yaml"))
    fit = ["fit", "--config", str(RECIPE), "--config", str(tmp_path / "overlay.yaml"), "--trainer.max_epochs=1"]
    folder = f"--trainer.default_root_dir={tmp_path / 'on'}"
    call(*fit, f"--weights={_trained(tmp_path)}", folder, *QUIET)
    after = torch.load(newest(tmp_path / "on", "last.ckpt"), weights_only=True)["state_dict"]
    assert torch.equal(after["net.fc1.weight"] == 0, pruned["net.fc1.weight"] == 0)


def _trained(folder: Path) -> Path:
    if not list(folder.glob("one/**/last.ckpt")):
        fit = ["fit", "--config", str(RECIPE), "--trainer.max_epochs=1", "--sparsity=OneShot"]
        call(*fit, "--sparsity.sparsity=0.5", f"--trainer.default_root_dir={folder / 'one'}", *QUIET)
    return newest(folder / "one", "last.ckpt")


def test_aliases_of_aliases_end() -> None:
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 30)}]" for i in range(1, 9)]
    with pytest.raises(InputError):
        translate("\n".join(lines))


def test_a_recipe_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(modifier("ConstantPruningModifier", params="__ALL_PRUNABLE__"))
    with pytest.raises(SystemExit) as ended:
        call("import-sparseml", str(tmp_path / "r.yaml"), f"--output={tmp_path / 'r.yaml'}")
    assert ended.value.code == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "r.yaml").read_text() == modifier("ConstantPruningModifier", params="__ALL_PRUNABLE__")
