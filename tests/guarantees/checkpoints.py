"""Checkpoints: what comes back from them, and who can load them."""

import signal
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import train
from callbacks.staged import Staged
from sparsity import masks as noun
from sparsity.dynamic import Dynamic
from sparsity.learned import Learned
from sparsity.supermask import Supermask
from tests.guarantees.columns import SPARSITY, Column, Ours, column, kept
from tests.guarantees.killed import main as killed_run
from tests.guarantees.runs import STEPS, Batches, Forked, NotHere, afresh, right, same, start, task
from tests.nets import SaveEpochs


def resume_epoch(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, SaveEpochs(folder), watch=False, epochs=4, enable_checkpointing=True)
    runner.fit(model, Batches())
    fresh, again = afresh(column), task(seed=5)
    second, _ = start(fresh, again, epochs=4, seen=12)
    second.fit(again, Batches(), ckpt_path=str(folder / "1.ckpt"), weights_only=True)
    right(fresh, again, SPARSITY)
    for each, by in ((model, column), (again, fresh)):
        by.finish(each)
    assert same(model.state_dict(), again.state_dict()), "the resumed run ends with other weights"


def resume_mid_epoch(column: Column, folder: Path) -> None:
    model = task()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1)
    runner, _ = start(column, model, saver, watch=False, enable_checkpointing=True)
    runner.fit(model, Batches())
    fresh, again = afresh(column), task(seed=5)
    second, watch = start(fresh, again, seen=8)
    second.fit(again, Batches(), ckpt_path=str(folder / "step=8.ckpt"), weights_only=True)
    right(fresh, again, SPARSITY)
    assert watch is not None
    assert fresh.took(watch.steps, STEPS)
    if isinstance(fresh, Ours) and isinstance(column, Ours):
        assert fresh.method.step == watch.steps
        assert fresh.method.sparsifier.renewed == column.method.sparsifier.renewed


def weights_only_checkpoint(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, watch=False, enable_checkpointing=False)
    runner.fit(model, Batches())
    before = column.masks(model)
    if isinstance(column, Ours) and isinstance(column.method.sparsifier, Dynamic):
        # What was grown and is still exactly zero cannot be told from what is pruned.
        before = {name: mask & (column.weights(model)[name] != 0) for name, mask in before.items()}
    runner.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    saved = torch.load(folder / "weights.ckpt", weights_only=True)["state_dict"]
    fresh, again = column_of_zeros(column), task(seed=5)
    if not isinstance(column, Ours):
        fresh.callbacks(again)
    again.load_state_dict(saved)
    second, watch = start(fresh, again)
    assert watch is not None
    watch.asked = 1 - kept(before) / sum(mask.numel() for mask in before.values())
    second.fit(again, Batches())
    assert same(before, fresh.masks(again)), "the masks did not come back"
    assert SPARSITY - 1e-9 <= watch.asked < SPARSITY + 0.01


def column_of_zeros(column_: Column) -> Column:
    """What keeps the zeros of a loaded model: for this project ConstantMask, for peers themselves again."""
    return column("ConstantMask") if isinstance(column_, Ours) else afresh(column_)


def weights_only_loading(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, watch=False)
    runner.fit(model, Batches())
    runner.save_checkpoint(folder / "full.ckpt")
    torch.load(folder / "full.ckpt", weights_only=True)
    fresh, again = afresh(column), task(seed=5)
    second, _ = start(fresh, again, epochs=5, watch=False)
    second.fit(again, Batches(), ckpt_path=str(folder / "full.ckpt"), weights_only=True)
    right(fresh, again, SPARSITY)


def dense_model(column: Column, folder: Path) -> None:
    model = task()
    staged = isinstance(column, Ours) and isinstance(column.method, Staged)  # which max_steps would only cut short
    runner, _ = start(column, model, watch=False, max_steps=-1 if staged else 9)
    runner.fit(model, Batches())
    runner.save_checkpoint(folder / "full.ckpt")
    saved = torch.load(folder / "full.ckpt", weights_only=True)["state_dict"]
    dense = task(seed=5)
    assert saved.keys() == dense.state_dict().keys(), (
        f"the keys changed: {sorted(saved.keys() - dense.state_dict().keys())}"
    )
    dense.load_state_dict(saved)
    weights = column.weights(model)
    assert all(torch.equal(dense.state_dict()[name], weight) for name, weight in weights.items())


def killed(column: Column, folder: Path) -> None:
    done = Forked(folder / "log", killed_run, column.name, folder)
    assert done.status() == -signal.SIGKILL, done.last_line()
    last = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    step = int(last.stem.split("=")[1])
    fresh, again = afresh(column), task(seed=5)
    second, watch = start(fresh, again, seen=step)
    second.fit(again, Batches(), ckpt_path=str(last), weights_only=True)
    assert watch is not None
    assert fresh.took(watch.steps, STEPS)
    right(fresh, again, SPARSITY)


def command_line(column: Column, folder: Path) -> None:
    if not isinstance(column, Ours):
        raise NotHere("has no command line; its targets cannot be named in YAML")
    name, _, scaled = column.name.partition(", ")
    method = [f"--sparsity={name}", f"--sparsity.sparsity={SPARSITY}", *(["--scaled=both"] if scaled else [])]
    if column.name == "ConstantMask":
        shapes = {"net.fc1.weight": (300, 64), "net.fc2.weight": (100, 300), "net.fc3.weight": (10, 100)}
        noun.save({name: torch.rand(shape) < 0.25 for name, shape in shapes.items()}, folder / "masks.safetensors")
        method = [
            f"--sparsity={column.name}",
            "--sparsity.sparsity=null",
            f"--sparsity.file={folder / 'masks.safetensors'}",
        ]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder / 'first'}"]
    if isinstance(column.method.sparsifier, Learned) and not isinstance(column.method.sparsifier, Supermask):
        method = [f"--sparsity={column.name}", "--sparsity.pattern=1:4"]
    if isinstance(column.method.sparsifier, Dynamic):
        method += ["--sparsity.drops=CosineDrop", "--sparsity.drops.every=1"]
    overlay = "smoke_stages" if isinstance(column.method, Staged) else "smoke"
    recipe = ["--config=recipes/digits_lamp.yaml", f"--config=recipes/{overlay}.yaml"]
    first = Forked(folder / "first.log", train.main, ["fit", *recipe, *method, *quiet])
    assert first.status() == 0, first.last_line()
    [config] = (folder / "first").rglob("config.yaml")
    place = f"--trainer.default_root_dir={folder / 'second'}"
    again = Forked(folder / "second.log", train.main, ["fit", f"--config={config}", place])
    assert again.status() == 0, again.last_line()
    found = [
        torch.load(next((folder / part).rglob("last.ckpt")), weights_only=True)["callbacks"]["Sparsify"]["sparsifier"]
        for part in ("first", "second")
    ]
    masks = [noun.from_state(state["masks"]) for state in found]
    assert noun.fingerprint(masks[0]) == noun.fingerprint(masks[1]), "the repeated run has other masks"
    if column.name != "ConstantMask":
        assert 1 - noun.density(masks[0]) == pytest.approx(SPARSITY, abs=1e-4)
