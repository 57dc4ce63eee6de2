"""Two processes hold the same masks, without being told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

from callbacks import LAMP, OneShot, Sparsify, StaticMask
from sparsity import Targets, masks
from sparsity.initial import SNIP, GraSP
from sparsity.schedules import Linear
from tests.nets import Task, trainer

METHODS: dict[str, Callable[[], Sparsify]] = {
    "LAMP": lambda: LAMP(sparsity=0.9, schedule=Linear(0.1, 0.8, 0.1)),
    "StaticMask": lambda: StaticMask(sparsity=0.9),
    "SNIP": lambda: OneShot(0.9, score=SNIP(), targets=Targets(exclude=["*unused*"])),
    "GraSP": lambda: OneShot(0.9, score=GraSP(), targets=Targets(exclude=["*unused*"])),
}


class SameEverywhere(pl.Callback):
    """Fails on every rank unless all ranks have the same masks and weights, at the asked-for density."""

    def __init__(self, method: Sparsify, folder: Path) -> None:
        self.method, self.folder = method, folder

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        mine = [masks.fingerprint(self.method.sparsifier.masks), float(sum(p.sum() for p in pl_module.parameters()))]
        found: list[object] = [None, None]
        torch.distributed.all_gather_object(found, mine)
        assert found[0] == found[1]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = sum(mask.numel() for mask in self.method.sparsifier.masks.values())
        assert self.method.sparsifier.density() == round(0.1 * total) / total
        (self.folder / f"{trainer.global_rank}").write_text(f"{trainer.global_step} steps")


# Lightning's launcher and torch's process groups warn about one another's choices here; none of it is about masks.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_ranks_agree_on_masks_and_weights(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 4, 6, 6), torch.randint(0, 3, (48,)))
    method = METHODS[name]()
    runner = trainer(
        method,
        SameEverywhere(method, tmp_path),
        strategy="ddp_fork_find_unused_parameters_true",
        devices=2,
        use_distributed_sampler=True,
    )
    runner.fit(Task(), DataLoader(data, batch_size=6, shuffle=True))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "12 steps", "1": "12 steps"}


class OneRankDiffers(pl.Callback):
    """Turns one mask upside down on rank 1."""

    def __init__(self, method: Sparsify) -> None:
        self.method = method

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1:
            self.method.sparsifier.masks["net.fc.weight"].logical_not_()


@pytest.mark.filterwarnings("ignore")
def test_masks_that_differ_between_ranks_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    method = StaticMask(sparsity=0.9)
    runner = trainer(method, OneRankDiffers(method), strategy="ddp_fork_find_unused_parameters_true", devices=2)
    data = TensorDataset(torch.randn(48, 4, 6, 6), torch.randint(0, 3, (48,)))
    with pytest.raises(ProcessRaisedException, match="the masks differ between ranks"):
        runner.fit(Task(), DataLoader(data, batch_size=6))
