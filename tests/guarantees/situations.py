"""The rows of the guarantee matrix: each function trains with one column, and fails where the guarantee is broken."""

import copy
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks import Sparsify
from sparsity import InputError
from sparsity import masks as noun
from sparsity.dynamic import Dynamic
from sparsity.scores import Gradient
from tests.guarantees.columns import SPARSITY, Column, Named, Ours, column, kept
from tests.nets import Batch, MakeOptimizer, SaveEpochs, trainer

ROOT = Path(__file__).parents[2]
STEPS = 18  # three epochs of six batches


class NotHere(Exception):
    """The situation cannot be made on this machine, or means nothing for this column; the message says why."""


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)


class Task(pl.LightningModule):
    """Three linear layers, 1,216 weights, of which 304 are to stay."""

    def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
        super().__init__()
        self.one, self.norm, self.two, self.head = (
            nn.Linear(32, 24),
            nn.LayerNorm(24),
            nn.Linear(24, 16),
            nn.Linear(16, 4),
        )
        self.make_optimizer, self.lr = make_optimizer, 0.05

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.two(torch.relu(self.norm(self.one(x))))))
        return result

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Batches:
    """Six batches, always the same."""

    def __init__(self, count: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(8, 32, generator=generator), torch.randint(0, 4, (8,), generator=generator))
            for _ in range(count)
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Watch(pl.Callback):
    """Checks after every real step: the count to the weight, pruned weights and, if asked, their optimizer state."""

    def __init__(self, column: Column, seen: int = 0, states: bool = False, asked: float | None = None) -> None:
        self.column, self.steps, self.states, self.asked = column, seen, states, asked

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps += 1
        assert trainer.global_step == self.steps
        right(self.column, pl_module, self.column.asked() if self.asked is None else self.asked)
        for name, weight in self.column.parameters(pl_module).items() if self.states_are_zero() else ():
            for optimizer in trainer.optimizers:
                for key, state in optimizer.state.get(weight, {}).items():
                    if isinstance(state, Tensor) and state.shape == weight.shape:
                        pruned = state[~self.column.masks(pl_module)[name]]
                        assert not pruned.any(), f"{key} of pruned weights is not zero (step {self.steps})"

    def states_are_zero(self) -> bool:
        return self.states and not self.column.keeps_state


def right(column: Column, model: nn.Module, sparsity: float) -> None:
    """The sparsity is exact, by the masks and by the weights, and what is pruned is zero."""
    masks, weights = column.masks(model), column.weights(model)
    if sparsity == 0:
        return
    total = sum(mask.numel() for mask in masks.values())
    assert masks, "there are no masks"
    assert kept(masks) == round((1 - sparsity) * total), f"{kept(masks)} of {total} kept, {1 - sparsity:.3f} asked for"
    for name, mask in masks.items():
        assert not weights[name][~mask].any(), f"pruned weights of {name} are not zero"


def task(make: MakeOptimizer = sgd, kind: type[Task] = Task, seed: int = 0) -> Task:
    pl.seed_everything(seed, verbose=False)
    return kind(make)


def fit(column: Column, model: Task | None = None, *more: pl.Callback, watch: bool = True, **settings: Any) -> Task:
    """Trains three epochs (or what the settings say), watched, and checks the end."""
    model = model or task()
    runner, seen = start(column, model, *more, watch=watch, **settings)
    runner.fit(model, Batches())
    assert seen is None or seen.steps == runner.global_step > 0
    right(column, model, SPARSITY)
    return model


def start(
    column: Column, model: Task, *more: pl.Callback, watch: bool = True, seen: int = 0, **settings: Any
) -> tuple[pl.Trainer, Watch | None]:
    watching = Watch(column, seen) if watch else None
    extra = [watching] if watching else []
    return trainer(*column.callbacks(model), *more, *extra, **settings), watching


# --- Optimizers ------------------------------------------------------------------------------------------------------


def optimizer(make: MakeOptimizer) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        model = task(make)
        watch = Watch(column, states=True)
        trainer(*column.callbacks(model), watch).fit(model, Batches())
        assert watch.steps == STEPS
        right(column, model, SPARSITY)

    return check


def capturable(column: Column, folder: Path) -> None:
    if not torch.cuda.is_available():
        raise NotHere("capturable optimizers need a GPU")
    fit(column, task(lambda p: torch.optim.AdamW(p, lr=1e-2, capturable=True)), accelerator="gpu", devices=1)


# --- The training step -----------------------------------------------------------------------------------------------


def setting(**settings: Any) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        fit(column, None, **settings)

    return check


class Overflow(Task):
    """A loss that overflows in one step, so that a scaler skips it."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.loss(batch) * (math.inf if self.trainer.fit_loop.total_batch_idx == self.at else 1.0)


class Skips(pl.Callback):
    """Sees that the skipped step left weights and masks as they were."""

    def __init__(self, column: Column, at: int) -> None:
        self.column, self.at, self.seen = column, at, False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before = copy.deepcopy((pl_module.state_dict(), self.column.masks(pl_module)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.at:
            self.seen = True
            assert same(self.before[0], pl_module.state_dict()), "the skipped step changed the model"
            assert same(self.before[1], self.column.masks(pl_module)), "the skipped step changed the masks"


def same(one: Named, other: Named) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def fp16(at: int) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        pl.seed_everything(0, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        skips = Skips(column, at)
        # The steps that the optimizer really takes are one fewer than Lightning counts, so the watch stays away.
        fit(
            column, Overflow(at), skips, watch=False,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        )  # fmt: skip
        assert skips.seen

    return check


class Poisoned(Task):
    """A NaN in the gradients of the third step, which the user skips, as a scaler would."""

    def __init__(self, column: Column) -> None:
        super().__init__()
        self.column, self.skipped = column, False

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = {name: mask.clone() for name, mask in self.column.masks(self).items()}

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 2 and self.head.bias.grad is not None:
            self.head.bias.grad[0] = math.nan

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if any(p.grad is not None and not torch.isfinite(p.grad).all() for p in self.parameters()):
            self.skipped = True
            assert same(self.before, self.column.masks(self)), "the masks were renewed"
            optimizer.zero_grad()


def nan_skipped(column: Column, folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    model = Poisoned(column)
    fit(column, model, watch=False)
    assert model.skipped


def nan_gradient(column: Column, folder: Path) -> None:
    class Poisoned(Task):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 16:
                for name, weight in column.parameters(self).items():
                    assert weight.grad is not None
                    weight.grad[~column.masks(self)[name]] = math.nan

    fit(column, task(kind=Poisoned))


def clipped_nan(column: Column, folder: Path) -> None:
    class Poisoned(Task):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 17 and self.head.bias.grad is not None:
                self.head.bias.grad[0] = math.nan

    fit(column, task(kind=Poisoned), gradient_clip_val=0.5)


# --- Growth ----------------------------------------------------------------------------------------------------------


def grows(column: Column) -> Dynamic:
    """The column's sparsifier, if it grows weights."""
    if isinstance(column, Ours) and isinstance(column.method.sparsifier, Dynamic):
        return column.method.sparsifier
    raise NotHere("grows no weights")


class Grown(Task):
    """Sees, between an update and the optimizer's step, that newly grown weights and their state are zero."""

    def __init__(self, make_optimizer: MakeOptimizer, sparsifier: Dynamic) -> None:
        super().__init__(make_optimizer)
        self.sparsifier, self.count = sparsifier, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self.sparsifier.masks

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        for name, weight in self.sparsifier.weights().items():
            grown = self.sparsifier.masks[name] & ~self.before[name]
            self.count += int(grown.count_nonzero())
            assert not weight[grown].any(), f"newly grown weights of {name} are not zero"
            for key, state in optimizer.state.get(weight, {}).items():
                if isinstance(state, Tensor) and state.shape == weight.shape:
                    assert not state[grown].any(), f"{key} of newly grown weights of {name} is not zero"


def grown_start_at_zero(make: MakeOptimizer) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        pl.seed_everything(0, verbose=False)
        model = Grown(make, grows(column))
        fit(column, model)
        assert model.count > 100, f"only {model.count} weights were grown"

    return check


class Window(Task):
    """Adds up the gradients of an accumulation window by itself, micro-batch by micro-batch."""

    def __init__(self, column: Column) -> None:
        super().__init__()
        self.column, self.total, self.looked = column, {}, 0  # type: ignore[var-annotated]  # a dictionary of tensors

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        found = torch.autograd.grad(self.loss(batch) / 3, [*self.column.parameters(self).values()])
        for name, gradient in zip(self.column.masks(self), found, strict=True):
            self.total[name] = self.total.get(name, 0) + gradient
        self.before = self.column.masks(self)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        for name, mask in self.column.masks(self).items():
            grown, free = mask & ~self.before[name], ~mask
            if grown.any() and type(grows(self.column).regrowth.grow) is Gradient:
                self.looked += 1
                size = self.total[name].abs()
                assert size[grown].min() >= size[free].max() - 1e-7, (
                    f"{name} grew by another gradient than the window's"
                )
        self.total = {}


def window(column: Column, folder: Path) -> None:
    rule = grows(column).regrowth.grow
    pl.seed_everything(0, verbose=False)
    model = Window(column)
    fit(column, model, accumulate_grad_batches=3)
    assert model.looked > 3 or type(rule) is not Gradient


# --- Averaging, several optimizers, unusual parameters ---------------------------------------------------------------


def ema(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, EMAWeightAveraging(decay=0.9), watch=False)
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


def swa(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, StochasticWeightAveraging(0.01, 0.4, device=None), watch=False, epochs=5)
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


class Manual(Task):
    """Manual optimization with two optimizers, one of which steps every other time."""

    def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        body = [*self.one.parameters(), *self.norm.parameters(), *self.two.parameters()]
        return [sgd(body), torch.optim.Adam(self.head.parameters(), weight_decay=0.1)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        body, head = self.optimizers()  # type: ignore[attr-defined]  # a list of two
        for each in (body, head):
            each.zero_grad()
        self.manual_backward(self.loss(batch))
        body.step()
        if batch_idx % 2 == 0:
            head.step()


class WatchZeros(Watch):
    """The checks of `Watch`, where Lightning's count of steps adds several optimizers up."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps = trainer.global_step - 1
        super().on_train_batch_end(trainer, pl_module)


def two_optimizers(column: Column, folder: Path) -> None:
    model = task(kind=Manual)
    runner, _ = start(column, model, WatchZeros(column), watch=False)
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


def manual(column: Column, folder: Path) -> None:
    class One(Manual):
        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    fit(column, task(kind=One))


def tied(column: Column, folder: Path) -> None:
    class Tied(Task):
        def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
            super().__init__(make_optimizer)
            self.embedding = nn.Embedding(16, 32)
            self.decoder = nn.Linear(32, 16, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            tokens = (x[:, :4].abs() * 8).long() % 16
            hidden = self.embedding(tokens).mean(1)
            logits: Tensor = super().forward(hidden) + self.decoder(hidden)[:, :4]
            return logits

    if isinstance(column, Ours):
        # A tie is one weight under its first name; an embedding is left alone unless it is named.
        column.method.sparsifier.targets.include = ["*", "embedding.weight"]

    class BothPruned(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 2:
                [mask] = [m for n, m in column.masks(model).items() if n in ("embedding.weight", "decoder.weight")]
                assert not model.embedding.weight[~mask].any(), "the head is pruned, the embedding it is tied to is not"

    pl.seed_everything(0, verbose=False)
    model = Tied()
    runner, _ = start(column, model, BothPruned())
    runner.fit(model, Batches())
    right(column, model, SPARSITY)
    column.finish(model)
    assert model.embedding.weight is model.decoder.weight, "the embedding and the head are no longer tied"


def frozen(column: Column, folder: Path) -> None:
    class Frozen(Task):
        def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
            super().__init__(make_optimizer)
            self.two.requires_grad_(False)
            self.unused = nn.Linear(16, 8)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                for weight in self.parameters():
                    weight.requires_grad_(True)

    fit(column, task(kind=Frozen))


def compiled(column: Column, folder: Path) -> None:
    class Compiled(Task):
        def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
            super().__init__(make_optimizer)
            self.one = torch.compile(self.one, backend="eager")  # type: ignore[assignment]  # a module all the same

    fit(column, task(kind=Compiled))


# --- The trainer's settings ------------------------------------------------------------------------------------------


def lr_finder(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model, watch=False, default_root_dir=folder)
    before = copy.deepcopy(model.state_dict())
    Tuner(runner).lr_find(model, Batches(20), num_training=15)
    assert same(before, model.state_dict()), "the learning rate finder left its traces in the model"
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


def second_fit(column: Column, folder: Path) -> None:
    model = task()
    runner, _ = start(column, model)
    runner.fit(model, Batches())
    callbacks: list[pl.Callback] = runner.callbacks  # type: ignore[attr-defined]  # set by a connector
    kinds = (Sparsify, ModelPruning)
    again = trainer(*(each for each in callbacks if isinstance(each, kinds)), Watch(column, asked=SPARSITY))
    again.fit(model, Batches())
    right(column, model, SPARSITY)


def lightning_pytorch(column: Column, folder: Path) -> None:
    class Modern(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(32, 24), nn.Linear(24, 4)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.two(torch.relu(self.one(batch[0]))), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return sgd(self.parameters())

    if column.name == "ModelPruning":
        from lightning.pytorch.callbacks import ModelPruning as Modern_

        callbacks: list[Any] = [
            Modern_("l1_unstructured", amount=SPARSITY, apply_pruning=lambda epoch: epoch == 0,
                    parameter_names=["weight"], use_lottery_ticket_hypothesis=False)
        ]  # fmt: skip
    model = Modern()
    if column.name != "ModelPruning":
        callbacks = column.callbacks(model)  # type: ignore[arg-type]  # the same class under its other name
    runner = lightning.pytorch.Trainer(
        max_epochs=3, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    runner.fit(model, Batches())
    right(column, model, SPARSITY)


# --- Several processes -----------------------------------------------------------------------------------------------


def processes(strategy: str) -> Callable[[Column, Path], None]:
    def check(column: Column, folder: Path) -> None:
        done = python("-m", "tests.guarantees.distributed", column.name, strategy, str(folder))
        reports = [path.read_text() for path in sorted(folder.glob("rank*"))]
        if len(reports) != 2:
            raise RuntimeError(last_line(done))
        assert reports[0] == reports[1], f"the ranks differ: {reports}"
        assert f"{SPARSITY} " in reports[0], f"sparsity and hash of the masks: {reports[0]}"

    return check


def python(*arguments: str, check: bool = False) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("PL_GLOBAL_SEED", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check, timeout=300)


def last_line(done: "subprocess.CompletedProcess[str]") -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"status {done.returncode}"


# --- Checkpoints -----------------------------------------------------------------------------------------------------


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
    assert watch.steps == STEPS
    if isinstance(fresh, Ours) and isinstance(column, Ours):
        assert fresh.method.step == STEPS
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


def afresh(column_: Column) -> Column:
    return column(column_.name)


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
    runner, _ = start(column, model, watch=False, max_steps=9)
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
    done = python("-m", "tests.guarantees.killed", column.name, str(folder))
    assert done.returncode == -signal.SIGKILL, last_line(done)
    last = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    step = int(last.stem.split("=")[1])
    fresh, again = afresh(column), task(seed=5)
    second, watch = start(fresh, again, seen=step)
    second.fit(again, Batches(), ckpt_path=str(last), weights_only=True)
    assert watch is not None
    assert watch.steps == STEPS
    right(fresh, again, SPARSITY)


def command_line(column: Column, folder: Path) -> None:
    if not isinstance(column, Ours):
        raise NotHere("has no command line; its targets cannot be named in YAML")
    method = [f"--sparsity={column.name}", f"--sparsity.sparsity={SPARSITY}"]
    if column.name == "ConstantMask":
        shapes = {"net.fc1.weight": (300, 64), "net.fc2.weight": (100, 300), "net.fc3.weight": (10, 100)}
        noun.save({name: torch.rand(shape) < 0.25 for name, shape in shapes.items()}, folder / "masks.safetensors")
        method = [
            f"--sparsity={column.name}",
            "--sparsity.sparsity=null",
            f"--sparsity.file={folder / 'masks.safetensors'}",
        ]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder / 'first'}"]
    if isinstance(column.method.sparsifier, Dynamic):
        method += ["--sparsity.drops=CosineDrop", "--sparsity.drops.every=1"]
    recipe = ["--config=recipes/digits_lamp.yaml", "--config=recipes/smoke.yaml"]
    first = python("train.py", "fit", *recipe, *method, *quiet)
    assert first.returncode == 0, last_line(first)
    [config] = (folder / "first").rglob("config.yaml")
    again = python("train.py", "fit", f"--config={config}", f"--trainer.default_root_dir={folder / 'second'}")
    assert again.returncode == 0, last_line(again)
    found = [
        torch.load(next((folder / part).rglob("last.ckpt")), weights_only=True)["callbacks"]["Sparsify"]["sparsifier"]
        for part in ("first", "second")
    ]
    masks = [noun.from_state(state["masks"]) for state in found]
    assert noun.fingerprint(masks[0]) == noun.fingerprint(masks[1]), "the repeated run has other masks"
    if column.name != "ConstantMask":
        assert 1 - noun.density(masks[0]) == pytest.approx(SPARSITY, abs=1e-4)


adamw: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
SITUATIONS: dict[str, Callable[[Column, Path], None]] = {
    "exact density after every real step": setting(),
    "pruned weights and their optimizer state zero: SGD, momentum, weight decay": optimizer(sgd),
    "the same: SGD, Nesterov": optimizer(
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)),
    "the same: Adam": optimizer(lambda p: torch.optim.Adam(p, lr=1e-2)),
    "the same: Adam with L2": optimizer(lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1)),
    "the same: AdamW, for-loop": optimizer(lambda p: torch.optim.AdamW(p, foreach=False, **adamw)),
    "the same: AdamW, foreach": optimizer(lambda p: torch.optim.AdamW(p, foreach=True, **adamw)),
    "the same: AdamW, fused": optimizer(lambda p: torch.optim.AdamW(p, fused=True, **adamw)),
    "the same: AdamW, capturable": capturable,
    "gradient accumulation": setting(accumulate_grad_batches=2),
    "clipping by norm": setting(gradient_clip_val=0.5),
    "clipping by value": setting(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "bf16 autocast": setting(precision="bf16-mixed"),
    "fp16, the scaler skips a step": fp16(at=3),
    "fp16, the scaler skips an update step": fp16(at=2),
    "NaN gradients on an update step that the user skips: masks stay": nan_skipped,
    "NaN in the gradients of pruned weights": nan_gradient,
    "NaN norm while clipping": clipped_nan,
    "newly grown weights start at zero, with optimizer state of zero: SGD": grown_start_at_zero(sgd),
    "the same: AdamW, growing": grown_start_at_zero(lambda p: torch.optim.AdamW(p, **adamw)),
    "growth by gradients of the whole accumulation window": window,
    "EMAWeightAveraging": ema,
    "StochasticWeightAveraging": swa,
    "two optimizers": two_optimizers,
    "manual optimization": manual,
    "tied embedding and head": tied,
    "frozen, unused and newly unfrozen parameters": frozen,
    "learning rate finder": lr_finder,
    "overfit_batches": setting(overfit_batches=4),
    "limit_train_batches": setting(limit_train_batches=4),
    "max_steps": setting(max_steps=14, epochs=-1),
    "max_time": setting(max_time="00:00:05:00"),
    "a second fit": second_fit,
    "torch.compile": compiled,
    "DDP, two processes: identical masks": processes("ddp"),
    "FSDP2, two processes: identical masks": processes("fsdp2"),
    "resume at an epoch boundary: bit-identical": resume_epoch,
    "resume in the middle of an epoch: masks, schedule, counters": resume_mid_epoch,
    "weights-only checkpoint": weights_only_checkpoint,
    "loading with weights_only=True": weights_only_loading,
    "kill -9 while a checkpoint is written, then resume": killed,
    "the checkpoint loads in the plain dense model": dense_model,
    "a lightning.pytorch Trainer": lightning_pytorch,
    "a command line run, repeated from its saved config": command_line,
}  # fmt: skip


def verdict(situation: str, name: str, folder: Path) -> tuple[str, str]:
    """One cell: "yes", "no" where the guarantee is broken, "refused", "error" or "not run", and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            SITUATIONS[situation](column(name), folder)
        except NotHere as reason:
            return "not run", str(reason)
        except AssertionError as error:
            return "no", str(error).splitlines()[0] if str(error) else "an assertion failed"
        except InputError as error:
            return "refused", str(error)
        except Exception as error:  # a peer may raise anything: the cell says what
            return "error", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "yes", ""
