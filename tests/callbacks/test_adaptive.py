"""HyperSparse in a trainer: schedules, qualities, the end of training."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from callbacks import HyperSparse
from callbacks.judge import Judge, hits
from sparsity import InputError, masks
from sparsity.adaptive import FINE_TUNING, Phases
from sparsity.penalties import HyperSparsity
from tests.nets import Batch, Batches, SaveEpochs, Task, ValidatedTask, trainer


class Scheduled(Task):
    """With a schedule for as long as the trainer says."""

    def __init__(self, kind: str = "cosine") -> None:
        super().__init__()
        self.kind, self.asked = kind, -1

    def configure_optimizers(self) -> Any:
        self.asked = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedules: dict[str, tuple[Any, str]] = {
            "cosine": (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.asked), "step"),
            "steps": (torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.1), "epoch"),
        }
        scheduler, interval = schedules[self.kind]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


class Rates(pl.Callback):
    """The learning rate of every step, the phase, and whether there is momentum from before."""

    def __init__(self, method: HyperSparse) -> None:
        self.method = method
        self.seen: list[tuple[str, float]] = []
        self.fresh: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        [optimizer] = trainer.optimizers
        self.seen.append((self.method.sparsifier.phase, optimizer.param_groups[0]["lr"]))
        self.fresh.append(not optimizer.state)


def method(**settings: Any) -> HyperSparse:
    phases = Phases("1ep", "3ep", 0)
    return HyperSparse(0.8, HyperSparsity(1e-4), phases, **settings)


@pytest.mark.parametrize(("kind", "expected"), [
    ("cosine", [0.025 * (1 + math.cos(step / 18 * math.pi)) for step in range(18)]),
    ("steps", [0.05] * 6 + [0.005] * 6 + [0.0005] * 6),
])  # fmt: skip
def test_the_schedule_is_of_the_fine_tuning_and_the_optimizer_is_new(kind: str, expected: list[float]) -> None:
    model, callback = Scheduled(kind), method()
    rates = Rates(callback)
    runner = trainer(rates, callback, epochs=6)
    runner.fit(model, Batches())
    assert model.asked == 18, "steps of three epochs"
    assert runner.max_epochs == 6
    before = [rate for phase, rate in rates.seen if phase != FINE_TUNING]
    after = [rate for phase, rate in rates.seen if phase == FINE_TUNING]
    assert before == [0.05] * len(before)
    assert 12 <= len(before) <= 18
    assert after == pytest.approx(expected)
    assert [step for step, fresh in enumerate(rates.fresh) if fresh] == [0, len(before)]


class Doubtful(Task):
    """Its loss is high when the pruned network is judged."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 9 * (not self.training)


class Cyclic(Scheduled):
    """With a schedule that writes over the optimizer's settings."""

    def configure_optimizers(self) -> Any:
        self.asked = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, self.asked)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_cyclic_schedule_waits_with_the_optimizers_own_rate() -> None:
    model, callback = Cyclic(), method()
    rates = Rates(callback)
    trainer(rates, callback, epochs=6).fit(model, Batches())
    before = [rate for phase, rate in rates.seen if phase != FINE_TUNING]
    after = [rate for phase, rate in rates.seen if phase == FINE_TUNING]
    assert set(before) == {0.05}
    assert after[0] == pytest.approx(0.1 / 25)
    assert max(after) == pytest.approx(0.1, rel=0.01)


class Manual(Scheduled):
    """Steps its own schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_schedules_that_cannot_be_held_are_refused() -> None:
    with pytest.raises(InputError, match="manual optimization HyperSparse can neither hold"):
        trainer(method(), epochs=6).fit(Manual(), Batches())


def test_a_failing_start_gives_the_trainers_epochs_back() -> None:
    class Failing(Task):
        def configure_optimizers(self) -> Any:
            raise KeyError("on purpose")

    runner = trainer(method(), epochs=6)
    with pytest.raises(KeyError):
        runner.fit(Failing(), Batches())
    assert runner.max_epochs == 6


def test_a_checkpoint_of_an_epoch_has_the_network_that_was_trained_in_it(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append(pl_module.state_dict()["net.fc.weight"].clone())

    pl.seed_everything(0, verbose=False)
    look = Look()
    callbacks = [method(), look, SaveEpochs(tmp_path)]
    trainer(*callbacks, epochs=6, enable_checkpointing=True).fit(ValidatedTask(), Batches(), Batches(1))
    look.seen = look.seen[-len(list(tmp_path.iterdir())) :]
    for epoch, weight in enumerate(look.seen):
        saved = torch.load(tmp_path / f"{epoch}.ckpt", weights_only=True)["state_dict"]["net.fc.weight"]
        assert torch.equal(saved, weight), f"epoch {epoch}"


@pytest.mark.parametrize("epochs", [5, 9])
def test_a_resumed_run_keeps_its_lengths(epochs: int, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    whole = method(measure="loss")
    trainer(whole, SaveEpochs(tmp_path), epochs=6, enable_checkpointing=True).fit(Doubtful(), Batches())
    resumed = HyperSparse(0.8, HyperSparsity(1e-4), Phases("1ep", "3ep", 0), measure="loss")
    model = Doubtful()
    runner = trainer(resumed, epochs=epochs)
    runner.fit(model, Batches(), ckpt_path=str(tmp_path / "0.ckpt"), weights_only=True)
    assert resumed.sparsifier.phase == whole.sparsifier.phase == FINE_TUNING
    assert resumed.sparsifier.chosen == whole.sparsifier.chosen
    assert resumed.sparsifier.ends == whole.sparsifier.ends


def test_a_second_fit_trains_on_what_is_left() -> None:
    model, callback = Certain(), method()
    trainer(callback, epochs=9).fit(model, Batches())
    fingerprint = masks.fingerprint(callback.sparsifier.masks)
    again = trainer(callback, epochs=4)
    again.fit(model, Batches())
    assert again.current_epoch == 4
    assert masks.fingerprint(callback.sparsifier.masks) == fingerprint


class Certain(Task):
    """Its pruned network is as good as the dense one: all outputs are the same."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x) * 0
        return logits


def test_training_ends_with_the_fine_tuning() -> None:
    pl.seed_everything(0, verbose=False)
    model, callback = Certain(), method()
    runner = trainer(callback, epochs=9)
    runner.fit(model, Batches())
    assert runner.current_epoch == 5  # one, one, three
    assert callback.sparsifier.story() == {
        "phase": FINE_TUNING, "epochs": 5, "network_of_epoch": 2, "fine_tuning_from_epoch": 2,
        "because": "pruned, the network was as good as dense",
    }  # fmt: skip
    assert callback.measured["sparsity/quality_pruned"] == callback.measured["sparsity/quality_dense"]


def test_the_run_that_has_ended_is_not_gone_on_with(tmp_path: Path) -> None:
    runner = trainer(method(), epochs=9)
    runner.fit(Certain(), Batches())
    runner.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    again = trainer(method(), epochs=9)
    again.fit(Certain(), Batches(), ckpt_path=str(tmp_path / "end.ckpt"), weights_only=True)
    assert again.global_step == runner.global_step


def test_qualities_are_those_of_a_plain_loop() -> None:
    """In eval mode, over all training batches, with what was logged and counted forgotten."""
    model = Task()
    judge, batches = Judge(), Batches()
    found: list[float] = []

    class Ask(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found.append(judge.of(trainer, pl_module))
            found.append(Judge("loss").of(trainer, pl_module))
            assert pl_module.training

    trainer(Ask(), epochs=1).fit(model, batches)
    model.eval()
    right = torch.cat([model(images).argmax(1) == labels for images, labels in batches])
    losses = [nn.functional.cross_entropy(model(images), labels) for images, labels in batches]
    assert found == pytest.approx([right.float().mean().item(), -torch.stack(losses).mean().item()])


def test_hits_find_the_axis_of_the_classes() -> None:
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]])
    scores = nn.functional.one_hot(labels, 5).float()
    assert hits(scores, (None, labels)).all()
    assert hits(scores.movedim(-1, 1), (None, labels)).all()
    for batch in (torch.zeros(3), (1, torch.zeros(2, 3)), (1, torch.zeros(4, dtype=torch.int64))):
        with pytest.raises(InputError, match='take measure="loss"'):
            hits(scores, batch)


class Elsewhere(Task):
    """Never calls its own forward."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Broken(Task):
    """Its loss is NaN in the third epoch, and high when the pruned network is judged."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.current_epoch == 2 else loss + 9 * (not self.training)


def test_what_accuracy_cannot_be_measured_of_is_said_at_once() -> None:
    runner = trainer(method(), epochs=6)
    with pytest.raises(InputError, match="never calls self"):
        runner.fit(Elsewhere(), Batches())
    assert runner.global_step <= 1
    callback = method(measure="loss")
    trainer(callback, epochs=6).fit(Elsewhere(), Batches())
    assert -9 < callback.measured["sparsity/quality_pruned"] < 0
    runner = trainer(method(), epochs=6)
    with pytest.raises(InputError, match="from one dataloader; got a list"):
        runner.fit(Task(), [Batches(), Batches()])
    assert runner.global_step == 0
    with pytest.raises(InputError, match="measure must be one of accuracy, loss, got 'f1'"):
        method(measure="f1")


def test_a_nan_loss_ends_the_phase_with_what_was_good() -> None:
    pl.seed_everything(0, verbose=False)
    model, callback = Broken(), method(measure="loss")
    with pytest.warns(UserWarning, match="NaN or infinite in epoch 2: regularisation ends"):
        trainer(callback, epochs=7).fit(model, Batches())
    assert callback.sparsifier.story()["because"] == "the loss was not finite"
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert callback.sparsifier.density() == pytest.approx(0.2, abs=1e-3)


def test_a_training_without_an_end_is_refused() -> None:
    with pytest.raises(InputError, match="set max_epochs, which is -1"):
        trainer(method(), epochs=-1, max_steps=3).fit(Task(), Batches())
    with pytest.raises(InputError, match="finds its masks while it trains"):
        method().prune(Task())
