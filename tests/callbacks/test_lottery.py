"""Lottery tickets in a trainer: schedules, rows of the report, batch norms."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.loggers import CSVLogger

from callbacks import SWAMP, IterativeMagnitude, SparsityReport
from sparsity import masks
from sparsity.lottery import Particles
from tests.callbacks.test_adaptive import Scheduled
from tests.nets import Batch, Batches, SaveEpochs, Task, ValidatedTask, trainer


class Watched(Scheduled, ValidatedTask):
    """With a schedule and a validation step."""


class Rates(pl.Callback):
    """The learning rate of every step, and whether the optimizer is new."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.fresh: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        [optimizer] = trainer.optimizers
        self.seen.append(optimizer.param_groups[0]["lr"])
        self.fresh.append(not optimizer.state)


@pytest.mark.parametrize("kind", ["cosine", "steps"])
def test_the_schedule_goes_back_with_the_weights(kind: str) -> None:
    plain = Rates()
    trainer(plain, epochs=3).fit(Scheduled(kind), Batches())
    rates, model = Rates(), Scheduled(kind)
    method = IterativeMagnitude(0.6, rate=0.5, rewind="1ep")
    runner = trainer(method, rates, epochs=8)
    runner.fit(model, Batches())
    assert model.asked == 18, "the schedule of a round"
    assert runner.max_epochs == 8
    assert runner.current_epoch == 7  # 3 + 2 + 2
    assert rates.seen == pytest.approx(plain.seen + 2 * plain.seen[6:])
    assert [step for step, fresh in enumerate(rates.fresh) if fresh] == [0, 18, 30]


def test_the_report_has_a_row_for_each_round(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    method = IterativeMagnitude(0.6, rate=0.5, rewind="1ep")
    runner = trainer(method, SparsityReport(), epochs=7, logger=CSVLogger(tmp_path))
    runner.fit(Watched(), Batches(), Batches(2, seed=5))
    report = json.loads((Path(str(runner.log_dir)) / "report.json").read_text())
    assert [row["round"] for row in report["rounds"]] == [0, 1, 2]
    assert [row["epochs"] for row in report["rounds"]] == [3, 5, 7]
    assert [row["sparsity"] for row in report["rounds"]] == pytest.approx([0.0, 0.5, 0.6], abs=1e-3)
    assert all(row["metrics"].keys() == {"val/loss"} for row in report["rounds"])
    assert report["rounds"][-1]["metrics"] == report["metrics"]


@pytest.mark.parametrize("epoch", range(6))
def test_a_run_with_a_schedule_is_resumed_anywhere(epoch: int, tmp_path: Path) -> None:
    def make() -> SWAMP:
        return SWAMP(0.6, rate=0.6, rewind="1ep", particles=Particles(2, 0.5))

    pl.seed_everything(0, verbose=False)
    model, method = Watched("steps"), make()
    trainer(method, SaveEpochs(tmp_path), epochs=9, enable_checkpointing=True).fit(model, Batches(), Batches(2, seed=5))
    again, resumed, rates = Watched("steps"), make(), Rates()
    trainer(resumed, rates, epochs=9).fit(
        again, Batches(), Batches(2, seed=5), ckpt_path=str(tmp_path / f"{epoch}.ckpt"), weights_only=True
    )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert resumed.rows == method.rows
    assert [row["epochs"] for row in method.rows] == [5, 9]


def test_the_best_checkpoint_is_as_good_as_its_name(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    saver = ModelCheckpoint(
        tmp_path, "{epoch}-{val/loss:.6f}", "val/loss", save_top_k=-1, auto_insert_metric_name=False
    )
    method = IterativeMagnitude(0.6, rate=0.5, rewind="1ep")
    trainer(method, saver, epochs=7, enable_checkpointing=True).fit(Watched(), Batches(), Batches(2, seed=5))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        model = Watched()
        model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        [found] = trainer(epochs=1).validate(model, Batches(2, seed=5), verbose=False)
        assert found["val/loss"] == pytest.approx(float(file.stem.split("-")[1]), abs=1e-5)


class SaveBatches(Checkpoint):
    """Saves a checkpoint after the last batch of every epoch, before its validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt", weights_only=False)


@pytest.mark.parametrize("step", [6, 12, 18, 24, 30])
def test_a_checkpoint_of_the_last_batch_is_gone_on_from(step: int, tmp_path: Path) -> None:
    def make() -> SWAMP:
        return SWAMP(0.6, rate=0.6, rewind="1ep", particles=Particles(2, 0.5))

    pl.seed_everything(0, verbose=False)
    model, method = Watched("steps"), make()
    trainer(method, SaveBatches(tmp_path), epochs=9, enable_checkpointing=True).fit(
        model, Batches(), Batches(2, seed=5)
    )
    again, resumed = Watched("steps"), make()
    trainer(resumed, epochs=9).fit(
        again, Batches(), Batches(2, seed=5), ckpt_path=str(tmp_path / f"{step}.ckpt"), weights_only=True
    )
    assert [row["epochs"] for row in resumed.rows] == [5, 9]
    assert resumed.sparsifier.done()
    assert masks.fingerprint(resumed.sparsifier.masks) == masks.fingerprint(method.sparsifier.masks)


def test_rows_have_no_metrics_of_another_epoch() -> None:
    pl.seed_everything(0, verbose=False)
    method = IterativeMagnitude(0.6, rate=0.5, rewind="1ep")  # rounds end after epochs 3, 5, 7
    runner = trainer(method, epochs=7, check_val_every_n_epoch=3)
    runner.fit(Watched(), Batches(), Batches(2, seed=5))
    assert [sorted(row["metrics"]) for row in method.rows] == [["val/loss"], [], []]


def test_more_steps_than_planned_prune_nothing_by_themselves() -> None:
    class Twice(Task):
        """Two steps of the optimizer per batch."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # manual optimization
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

    class Densities(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[set[float]] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.seen.append(set())

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen[-1].add(round(method.sparsifier.density(), 2))

    method, densities = IterativeMagnitude(0.75, rate=0.5), Densities()
    trainer(method, densities, epochs=6).fit(Twice(), Batches())
    assert densities.seen == [{1.0}, {1.0}, {0.5}, {0.5}, {0.25}, {0.25}]


def test_the_statistics_of_batch_norms_are_those_of_the_average() -> None:
    pl.seed_everything(0, verbose=False)
    model, batches = Task(), Batches()
    trainer(SWAMP(0.6, rate=0.6, rewind="1ep", particles=Particles(2, 0.5)), epochs=9).fit(model, batches)
    features = torch.cat([model.net.conv(images) for images, _ in batches])
    torch.testing.assert_close(model.net.norm.running_mean, features.mean((0, 2, 3)))
    assert model.training
