"""The callback's seam to Lightning: hooks, checkpoints, averaging, logging, several optimizers."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.tuner.tuning import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from callbacks import GMP, LAMP, ConstantMask, OneShot, Sparsify, StaticMask
from sparsity import InputError, Targets, masks
from sparsity.schedules import Cubic, Linear
from tests.nets import Batch, Batches, Task, ValidatedTask, task, trainer


def zeros(model: nn.Module, method: Sparsify) -> float:
    weights = [dict(model.named_parameters())[name] for name in method.sparsifier.masks]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def test_one_line_in_a_lightning_pytorch_trainer() -> None:
    class LightningTask(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(12, 8)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.net(batch).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    method, model = LAMP(sparsity=0.9), LightningTask()
    runner = lightning.pytorch.Trainer(
        max_epochs=2, callbacks=[method],  # type: ignore[list-item]  # the other package's Callback
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    batches = torch.randn(5, 4, 12)
    loader = Batches()
    loader.batches = list(batches)
    runner.fit(model, loader)
    assert int(model.net.weight.count_nonzero()) == round(0.1 * 96) == 10


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("averaging", ["EMA", "SWA"])
def test_averaged_weights_are_sparse_at_the_end_and_in_checkpoints(averaging: str, first: bool, tmp_path: Path) -> None:
    class AtValidation(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                seen.append(1 - masks.density(masks.from_zeros(method.sparsifier.weights())))
                wanted.append(1 - method.sparsifier.density())

    seen: list[float] = []
    wanted: list[float] = []
    method = GMP(sparsity=0.9, schedule=Cubic(0.1, 0.6, 0.05))
    average: pl.Callback = (
        EMAWeightAveraging(decay=0.9) if averaging == "EMA" else StochasticWeightAveraging(0.05, swa_epoch_start=0.5)
    )
    task()
    model = ValidatedTask()
    # The averaging callback swaps weights back in its own hook, so the observer has to come before it.
    callbacks = [AtValidation(), *([method, average] if first else [average, method])]
    saver = ModelCheckpoint(tmp_path, save_last=True)
    runner = trainer(*callbacks, saver, epochs=6, enable_checkpointing=True)
    runner.fit(model, Batches(), Batches(2, seed=1))
    assert method.sparsifier.density() == pytest.approx(0.1, abs=1e-3)
    assert zeros(model, method) == pytest.approx(1 - method.sparsifier.density())
    assert [round(each, 6) for each in seen] == [round(each, 6) for each in wanted]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, mask in method.sparsifier.masks.items():
        assert not saved[name][~mask].any()


def test_resuming_from_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    runner = trainer(epochs=1)
    runner.fit(task(), Batches())
    runner.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(InputError, match="the checkpoint to resume from holds no masks"):
        trainer(LAMP(sparsity=0.9)).fit(task(), Batches(), ckpt_path=str(tmp_path / "dense.ckpt"), weights_only=True)


def test_a_run_can_be_resumed_with_another_method_and_sparsity(tmp_path: Path) -> None:
    runner = trainer(OneShot(sparsity=0.5), epochs=1)
    runner.fit(task(), Batches())
    runner.save_checkpoint(tmp_path / "half.ckpt")
    method = LAMP(sparsity=0.8, schedule=Linear(0.5, 0.8, 0.1))
    method.resumes_any = True
    trainer(method, epochs=3).fit(task(1), Batches(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert method.sparsifier.density() == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (OneShot(sparsity=0.8), "trained by OneShot at sparsity 0.5, this run is OneShot at sparsity 0.8"),
        (LAMP(sparsity=0.5), "trained by OneShot at sparsity 0.5, this run is LAMP at sparsity 0.5"),
    ],
)
def test_another_method_or_sparsity_is_refused_unless_it_is_meant(other: Sparsify, said: str, tmp_path: Path) -> None:
    runner = trainer(OneShot(sparsity=0.5), epochs=1)
    runner.fit(task(), Batches())
    runner.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(InputError, match=f"{said}.*resumes_any"):
        trainer(other, epochs=3).fit(task(1), Batches(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)


def test_testing_a_checkpoint_does_not_apply_the_masks_of_another(tmp_path: Path) -> None:
    class Tested(Task):
        def test_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("nonzero", float(self.net.fc.weight.count_nonzero()))

    task()
    model, method = Tested(), GMP(sparsity=0.9, schedule=Linear(0.5, 0.8, 0.1))
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    runner = trainer(method, saver, enable_checkpointing=True)
    runner.fit(model, Batches())
    [result] = runner.test(
        model, Batches(1), ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False, weights_only=True
    )
    assert result["nonzero"] == 32 * 16


def test_the_learning_rate_finder_leaves_no_trace() -> None:
    class Tunable(Task):
        lr = 0.01

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    task()
    model, method = Tunable(), LAMP(sparsity=0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = trainer(method)
    Tuner(runner).lr_find(model, Batches(20), num_training=15)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    runner.fit(model, Batches(20))
    assert method.step == 60
    assert zeros(model, method) == pytest.approx(0.9, abs=1e-3)


def test_a_second_fit_keeps_the_masks() -> None:
    method, model = LAMP(sparsity=0.9), task()
    trainer(method).fit(model, Batches())
    before = masks.fingerprint(method.sparsifier.masks)
    trainer(method).fit(model, Batches())
    assert masks.fingerprint(method.sparsifier.masks) == before
    assert zeros(model, method) == pytest.approx(0.9, abs=1e-3)


def test_the_same_callback_on_another_model_starts_afresh() -> None:
    method = LAMP(sparsity=0.9)
    trainer(method).fit(task(0), Batches())
    before = masks.fingerprint(method.sparsifier.masks)
    other = task(1)
    trainer(method).fit(other, Batches())
    assert masks.fingerprint(method.sparsifier.masks) != before
    assert zeros(other, method) == pytest.approx(0.9, abs=1e-3)


def test_two_optimizers_in_manual_optimization_step_one_clock() -> None:
    class Two(Task):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            body = [p for n, p in self.named_parameters() if "head" not in n]
            return [torch.optim.SGD(self.net.head.parameters(), lr=0.1), torch.optim.Adam(body)]

        def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # manual optimization returns nothing
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            head, body = self.optimizers()  # type: ignore[attr-defined]  # a list of two
            head.zero_grad()
            body.zero_grad()
            self.manual_backward(loss)
            head.step()
            if batch_idx % 2 == 0:
                body.step()

    task()
    method, model = GMP(sparsity=0.9, schedule=Linear(0, 6, 2)), Two()
    trainer(method).fit(model, Batches())
    assert method.step == 9
    assert zeros(model, method) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_gradients_that_are_not_finite_leave_the_masks_alone(poison: float) -> None:
    class Poisoned(Task):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            densities.append(method.sparsifier.density())
            optimizer.zero_grad()  # the step itself is skipped, as a scaler would

        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                weight = self.net.head.bias
                assert weight.grad is not None
                weight.grad[0] = poison

    densities: list[float] = []
    task()
    model, method = Poisoned(), OneShot(sparsity=0.5, at=3)
    trainer(method, epochs=1).fit(model, Batches())
    assert densities[:3] == [1.0, 1.0, 1.0]
    assert densities[3] == 1.0, "the update step had a gradient that is not finite"
    assert densities[4] == 0.5, "the renewal was not made up for"


def test_logs_for_every_logger_and_per_layer_on_tensorboard(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "csv")
    method = GMP(sparsity=0.9, schedule=Linear(0.1, 0.8, 0.1))
    runner = trainer(method, logger=[board, table])
    runner.fit(task(), Batches())
    assert runner.progress_bar_metrics["sparsity/global"] == pytest.approx(0.9, abs=1e-3)
    rows = Path(table.log_dir, "metrics.csv").read_text().splitlines()
    assert {"sparsity/global", "sparsity/target"} <= set(rows[0].split(","))
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert len(events.Scalars("sparsity/global")) == 18
    assert events.Scalars("sparsity/global")[-1].value == pytest.approx(0.9, abs=1e-3)
    for name, mask in method.sparsifier.masks.items():
        last = events.Scalars(f"sparsity/layer/{name}")[-1]
        assert last.value == pytest.approx(1 - float(mask.float().mean()), abs=1e-6)


@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": True}, {"barebones": True}, {"max_time": "00:00:01:00", "log_every_n_steps": 1}]
)
def test_unusual_trainers_run(settings: dict[str, Any]) -> None:
    runner = pl.Trainer(accelerator="cpu", callbacks=[method := LAMP(sparsity=0.5)], max_epochs=1, **settings)
    runner.fit(task(), Batches())
    assert method.sparsifier.density() == 0.5


def test_training_that_ends_early_says_that_the_target_was_missed() -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"training ended at sparsity 0\.\d+, before the schedule reached 0.9"):
        trainer(LAMP(sparsity=0.9), Stop(), min_epochs=1).fit(task(), Batches())


def test_a_training_without_end_needs_times_in_steps() -> None:
    with pytest.raises(InputError, match="a fraction of a training without end: set max_epochs or max_steps"):
        trainer(LAMP(sparsity=0.9), epochs=-1).fit(task(), Batches())
    method = LAMP(sparsity=0.9, schedule=Linear(0, 8, 4))
    trainer(method, epochs=-1, max_steps=10).fit(task(), Batches())
    assert method.sparsifier.density() == pytest.approx(0.1, abs=1e-3)


def test_epochs_count_accumulated_steps() -> None:
    method = OneShot(sparsity=0.5, at="2ep")
    trainer(method, accumulate_grad_batches=2).fit(task(), Batches())
    assert method.sparsifier.last_renewal() == 6


def test_hooks_are_gone_after_fit_and_after_an_exception() -> None:
    class Fails(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise RuntimeError("stop here")

    runner = trainer(StaticMask(sparsity=0.5))
    runner.fit(task(), Batches())
    assert not runner.optimizers[0]._optimizer_step_post_hooks
    runner = trainer(StaticMask(sparsity=0.5), Fails())
    with pytest.raises(RuntimeError, match="stop here"):
        runner.fit(task(), Batches())
    assert not runner.optimizers[0]._optimizer_step_post_hooks


def test_a_layer_that_is_emptied_is_named() -> None:
    model = task()
    model.net.head.weight.data.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"no weight is left in \['net.head.weight'\], .*GlobalMP"):
        trainer(OneShot(sparsity=0.5), epochs=1).fit(model, Batches())


def test_a_model_without_targets_or_with_an_unknown_glob_is_refused() -> None:
    method = LAMP(sparsity=0.5, targets=Targets(include=["nat.*"]))
    with pytest.raises(InputError, match=r"'nat.\*' matches no parameter of the model; the nearest names are \['net"):
        trainer(method).fit(task(), Batches())


def test_constant_mask_from_a_file(tmp_path: Path) -> None:
    source = StaticMask(sparsity=0.8)
    trainer(source, epochs=1).fit(task(), Batches())
    masks.save(source.sparsifier.masks, tmp_path / "masks.safetensors")
    method = ConstantMask(file=str(tmp_path / "masks.safetensors"))
    model = task(2)
    trainer(method).fit(model, Batches())
    assert zeros(model, method) == pytest.approx(0.8, abs=1e-3)
    assert masks.fingerprint(method.sparsifier.masks) == masks.fingerprint(source.sparsifier.masks)


def test_fp16_scaler_that_skips_an_update_step() -> None:
    """A scaler's skipped step leaves weights and masks alone, in a plain loop with torch's own scaler on the CPU."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    method = OneShot(sparsity=0.5, at=1).sparsifier
    method.attach(model, optimizer)
    for step in range(3):
        loss = model(torch.randn(4, 8)).square().mean() * (math.inf if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before = model.weight.detach().clone()
        method.update(step)
        scaler.step(optimizer)
        scaler.update()
        method.apply()
        optimizer.zero_grad()
        if step == 1:
            assert torch.equal(model.weight, before)
            assert method.density() == 1.0
    assert method.density() == 0.5
    assert int(model.weight.count_nonzero()) == 32
