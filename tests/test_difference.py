"""Two runs beside each other: overlap by hand, and what cannot be compared."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import train
from sparsity import InputError, masks
from sparsity.difference import compare, summary


def mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


ONE = {"fc.weight": mask("xx..", "x..."), "head.weight": mask("x.")}
OTHER = {"fc.weight": mask("x.x.", "x..x"), "head.weight": mask(".x")}


def checkpoint(path: Path, kept: dict[str, Tensor], **more: Any) -> Path:
    """A trainer's checkpoint, whose weights are 1 where they are kept."""
    saved = {"callbacks": {"Sparsify": {"sparsifier": {"masks": masks.to_state(kept)}}}}
    state = saved if more.pop("with_masks", True) else {}
    weights = {name: each.float() for name, each in kept.items()} | {"fc.bias": torch.ones(2)}
    torch.save({"state_dict": weights, **state, **more}, path)
    return path


def run(folder: Path, kept: dict[str, Tensor], accuracy: float | None) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint(folder / "checkpoints" / "last.ckpt", kept)
    report = {"metrics": {"val/acc": accuracy, "val/loss": 0.5}, "bytes": {"dense": 48, "stored": 30}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_overlap_by_hand(tmp_path: Path) -> None:
    found = compare(run(tmp_path / "a", ONE, 0.75), run(tmp_path / "b", OTHER, 0.5))
    assert found["layers"] == {
        # Of 3 and 4 kept weights 2 are the same, of 5 in all; by chance b keeps half of what a does.
        "fc.weight": {"weights": 8, "a": 3 / 8, "b": 4 / 8, "jaccard": 2 / 5, "kept": 2 / 3, "chance": 1 / 2},
        "head.weight": {"weights": 2, "a": 1 / 2, "b": 1 / 2, "jaccard": 0.0, "kept": 0.0, "chance": 1 / 2},
    }
    assert found["all"] == {
        "weights": 10, "a": 4 / 10, "b": 5 / 10, "jaccard": 2 / 7, "kept": 2 / 4, "chance": (1.5 + 0.5) / 4,
    }  # fmt: skip
    assert found["metrics"] == {
        "val/acc": {"a": 0.75, "b": 0.5, "difference": -0.25}, "val/loss": {"a": 0.5, "b": 0.5, "difference": 0.0},
    }  # fmt: skip
    assert found["bytes"] == {"a": {"dense": 48, "stored": 30}, "b": {"dense": 48, "stored": 30}}


def test_chance_over_all_layers_is_by_their_own_densities(tmp_path: Path) -> None:
    kept = {"dense": torch.ones(1, 10, dtype=torch.bool), "sparse": torch.arange(90).view(1, 90) < 9}
    masks.save(kept, tmp_path / "a.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "a.safetensors")["all"]
    # Of 19 kept weights 10 are in the dense layer and always shared, 9 by a chance of a tenth.
    assert (found["kept"], found["jaccard"], found["chance"]) == (1.0, 1.0, pytest.approx(10.9 / 19))


def test_masks_checkpoints_and_plain_states_say_the_same(tmp_path: Path) -> None:
    masks.save(ONE, tmp_path / "masks.safetensors")
    plain = checkpoint(tmp_path / "plain.ckpt", ONE, with_masks=False)
    torch.save({f"_orig_mod.{name}": each.float() for name, each in ONE.items()}, tmp_path / "state.pt")
    whole = compare(checkpoint(tmp_path / "a.ckpt", ONE), checkpoint(tmp_path / "b.ckpt", OTHER))
    for name in ("masks.safetensors", plain.name, "state.pt"):
        assert compare(tmp_path / name, tmp_path / "b.ckpt")["layers"] == whole["layers"], name
    # 12 numbers of 4 bytes; the targets keep 4 of 10, and take a byte of bits each.
    assert whole["bytes"]["a"] == {"dense": 48, "stored": 8 + min(32, 3 * 4 + 1) + min(8, 4 + 1)}
    assert compare(tmp_path / "masks.safetensors", tmp_path / "b.ckpt")["bytes"]["a"] is None


def test_a_weight_that_is_no_target_of_one_is_kept_there(tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a.ckpt", ONE)
    contents = torch.load(a, weights_only=True)
    contents["state_dict"]["head.weight"][:] = 1
    del contents["callbacks"]["Sparsify"]["sparsifier"]["masks"]["head.weight"]
    torch.save(contents, a)
    found = compare(a, checkpoint(tmp_path / "b.ckpt", OTHER))["layers"]["head.weight"]
    assert (found["a"], found["b"], found["kept"]) == (1.0, 0.5, 0.5)


def test_a_layer_without_weights_is_no_division_by_zero(tmp_path: Path) -> None:
    masks.save({"none": mask("..")}, tmp_path / "a.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert found["all"] == {"weights": 2, "a": 0.0, "b": 0.0, "jaccard": 1.0, "kept": None, "chance": None}


def test_the_newest_checkpoint_of_a_run_counts_and_masks_of_its_own_go_first(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", ONE, 0.5)
    os.utime(checkpoint(folder / "checkpoints" / "old.ckpt", OTHER), ns=(0, 0))
    checkpoint(folder / "federation.ckpt", OTHER)
    assert compare(folder, folder / "checkpoints" / "last.ckpt")["all"]["jaccard"] == 1.0
    masks.save(OTHER, folder / "masks.safetensors")
    assert compare(folder, tmp_path / "a" / "checkpoints" / "old.ckpt")["all"]["jaccard"] == 1.0


def test_other_models_and_what_is_no_run_are_refused_by_name(tmp_path: Path) -> None:
    a = run(tmp_path / "runs" / "a", ONE, 0.5)
    wide = {**ONE, "head.weight": mask("x..")}
    refused = {
        "'head.weight' has shape .1, 2. in .* and .1, 3. in ": checkpoint(tmp_path / "wide.ckpt", wide),
        "has no 'fc.weight'": checkpoint(tmp_path / "other.ckpt", {"conv.weight": mask("x.")}),
        "no checkpoint at": tmp_path / "missing.ckpt",
        "no mask file at": tmp_path / "missing.safetensors",
        "its runs are .*a": tmp_path / "runs",
        "holds no weights": checkpoint(tmp_path / "odd.ckpt", {}, state_dict=3),
        "masks in .* are damaged": checkpoint(tmp_path / "d.ckpt", ONE, callbacks={"Sparsify": {"sparsifier": 3}}),
    }
    for message, b in refused.items():
        with pytest.raises(InputError, match=message):
            compare(a, b)
    (a / "report.json").write_text('{"metrics": []}')
    with pytest.raises(InputError, match=r"report.json' is damaged"):
        compare(a, a)
    (a / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(InputError, match="neither a checkpoint nor"):
        compare(a, a)


def test_the_summary_shows_names_as_they_are(tmp_path: Path) -> None:
    masks.save({"[red]x[/nothing]": mask("x.")}, tmp_path / "a.safetensors")
    shown = io.StringIO()
    Console(width=120, file=shown).print(summary(compare(tmp_path / "a.safetensors", tmp_path / "a.safetensors")))
    assert "[red]x[/nothing]" in shown.getvalue()


def test_the_command_prints_writes_and_ends_with_a_plain_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = run(tmp_path / "a", ONE, 0.75), run(tmp_path / "b", OTHER, None)
    train.main(["diff", str(a), str(b), "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()) == compare(a, b)
    output = capsys.readouterr().out
    assert "0.4000" in output
    assert "val/acc" in output
    for words, message in (
        (["diff", str(a), str(tmp_path / "no.ckpt")], "error: no checkpoint at"),
        (["diff", str(a)], "error: the following arguments are required: b"),
        (["diff", str(a), str(b), "--json", str(tmp_path / "no" / "x")], "error: cannot write"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main(words)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(message)
    with pytest.raises(SystemExit) as stopped:
        train.main(["diff", "--help"])
    assert stopped.value.code == 0
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    assert "`diff A B`" in " ".join(capsys.readouterr().out.split())


def test_masks_beside_weights_without_masks_leave_other_matrices_alone(tmp_path: Path) -> None:
    masks.save(ONE, tmp_path / "masks.safetensors")
    state = {name: each.float() for name, each in OTHER.items()} | {"emb.weight": torch.ones(3, 2)}
    torch.save(state, tmp_path / "plain.ckpt")
    assert list(compare(tmp_path / "masks.safetensors", tmp_path / "plain.ckpt")["layers"]) == list(ONE)


def test_checkpoints_of_torchs_pruning_have_the_masks_of_their_pairs(tmp_path: Path) -> None:
    pair = {"fc.weight_orig": torch.ones(2, 4), "fc.weight_mask": ONE["fc.weight"].float()}
    torch.save(pair, tmp_path / "pair.ckpt")
    found = compare(tmp_path / "pair.ckpt", tmp_path / "pair.ckpt")
    assert list(found["layers"]) == ["fc.weight"]
    assert found["layers"]["fc.weight"]["a"] == 3 / 8
