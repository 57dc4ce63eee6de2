"""Ctrl-C ends training between two steps, with a checkpoint that training goes on from."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from callbacks import LAMP, SaveOnInterrupt
from tests.nets import Batches, task, trainer


class PressCtrlC(pl.Callback):
    """At the start of a batch, as often as asked for."""

    def __init__(self, batch: int, times: int = 1) -> None:
        self.batch, self.times = batch, times

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def handler() -> Iterator[Any]:
    """Python's own: programs that a shell starts in the background ignore Ctrl-C, as Lightning does behind it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def fit(folder: Path, *callbacks: pl.Callback, ckpt: Path | None = None, **settings: Any) -> tuple[Any, Any]:
    module, run = task(), trainer(*callbacks, default_root_dir=folder, **settings)
    run.fit(module, Batches(), ckpt_path=ckpt, weights_only=True)
    return module, run


def test_it_ends_after_a_whole_step_with_a_checkpoint(tmp_path: Path) -> None:
    keeper, method = SaveOnInterrupt(), LAMP(0.9)
    with pytest.raises(SystemExit):
        # Asked for at the first of two batches that make a step.
        fit(tmp_path, keeper, method, PressCtrlC(2), accumulate_grad_batches=2)
    assert keeper.path == tmp_path / "checkpoints" / "interrupted.ckpt"
    saved = torch.load(keeper.path, weights_only=True)
    assert saved["global_step"] == 2
    assert saved["callbacks"]["Sparsify"]["step"] == 2
    for name, mask in method.sparsifier.masks.items():
        assert not saved["state_dict"][name][~mask].any()


# Lightning begins the epoch's batches anew, and says so.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_training_goes_on_from_there(tmp_path: Path) -> None:
    keeper = SaveOnInterrupt()
    with pytest.raises(SystemExit):
        fit(tmp_path, keeper, LAMP(0.9), PressCtrlC(3))
    method = LAMP(0.9)
    _, run = fit(tmp_path, method, ckpt=keeper.path)
    assert run.global_step == 3 * len(Batches())
    assert method.sparsifier.density() == pytest.approx(0.1, abs=1e-3)


def test_a_second_one_ends_at_once(tmp_path: Path) -> None:
    keeper = SaveOnInterrupt()
    with pytest.raises(SystemExit):
        fit(tmp_path, keeper, LAMP(0.9), PressCtrlC(3, times=2))
    assert keeper.path is None
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_ctrl_c_did_before_it_does_again_after(tmp_path: Path, handler: Any) -> None:
    fit(tmp_path, SaveOnInterrupt(), LAMP(0.9), epochs=1)
    assert signal.getsignal(signal.SIGINT) is handler


class Slow(torch.utils.data.Dataset[Any]):
    """Samples that take workers as long as they take training."""

    def __len__(self) -> int:
        return 240

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.01)
        return torch.randn(4, 6, 6), place % 3


def test_workers_of_a_loader_survive_the_terminals_ctrl_c(tmp_path: Path) -> None:
    class PressForAll(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                for each in [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]:
                    os.kill(each or 0, signal.SIGINT)

    keeper = SaveOnInterrupt()
    loader = torch.utils.data.DataLoader(Slow(), batch_size=8, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(SystemExit):
        trainer(keeper, PressForAll(), default_root_dir=tmp_path, accumulate_grad_batches=4).fit(task(), loader)
    assert keeper.path is not None
    assert torch.load(keeper.path, weights_only=True)["global_step"] == 1


def test_a_fit_after_an_interrupted_one_leaves_ctrl_c_as_it_was(tmp_path: Path, handler: Any) -> None:
    keeper = SaveOnInterrupt()
    for _ in range(2):
        with pytest.raises(SystemExit):
            fit(tmp_path, keeper, LAMP(0.9), PressCtrlC(3))
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    fit(tmp_path, keeper, LAMP(0.9), epochs=1)
    assert signal.getsignal(signal.SIGINT) is handler
