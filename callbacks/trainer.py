"""The trainer of the command line: Lightning's, with a method for each subcommand that Lightning does not have."""

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ModelSummary, ProgressBar
from pytorch_lightning.cli import SaveConfigCallback
from rich.console import Console
from torch import nn

from sparsity import InputError, Sparsifier, advice, checkpoints, export, masks
from sparsity.distributions import Uniform
from sparsity.federated import Federation, Protocol, Running, partition, simulation
from sparsity.federated import report as federated
from sparsity.federated.source import samples_of
from sparsity.files import written
from sparsity.patterns import NM
from sparsity.report import finite
from sparsity.scores import Random

from . import SparsityReport
from .sparsify import method_of


class SparseTrainer(Trainer):
    """Lightning's Trainer that prunes a checkpoint, measures, exports, and trains over clients."""

    def oneshot(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, ckpt_path: str | None = None
    ) -> None:
        """Prunes a checkpoint at once, validates it, and saves it and its masks beside the report.

        Methods that need data get training batches.
        """
        method = method_of(self)
        if method is None or ckpt_path is None:
            raise InputError("oneshot needs a method (the recipe's `sparsity:`) and a checkpoint (--ckpt_path)")
        checkpoints.load_weights(model, ckpt_path)
        method.prune(model, (lambda: _batches(datamodule)) if datamodule else None)
        self.strategy.connect(model)
        path = Path(self.log_dir or self.default_root_dir) / "oneshot.ckpt"
        self.save_checkpoint(path, weights_only=False)
        masks.save(method.sparsifier.masks, path.with_name("masks.safetensors"))
        print(f"pruned checkpoint: {path} (masks: {path.with_name('masks.safetensors')})")
        self.validate(model, datamodule=datamodule)

    def advise(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        seconds: float = 0.2,
    ) -> None:
        """Measures which layers are faster by their kept weights on this machine, and what the whole model gains.

        Writes `advice.json` and `advice.png`. Without a checkpoint all layers are pruned at random to the sparsity of
        the recipe, by which the times of a network in training can be told before there is one.

        Args:
            ckpt_path: of a pruned network; its zeros are what is pruned.
            seconds: of each measurement.
        """
        method = method_of(self)
        if ckpt_path is not None:
            checkpoints.load_weights(model, ckpt_path)
        elif method is None:
            raise InputError("advise needs a pruned network: a checkpoint (--ckpt_path), or a method (`sparsity:`)")
        else:
            asked = method.sparsifier
            Sparsifier(asked.sparsity, Random(), Uniform(), asked.pattern.name, targets=asked.targets).attach(model)
        model.to(self.strategy.root_device)
        batch = self.strategy.batch_to_device(next(_batches(datamodule)))
        found = advice.advise(model, [batch[0] if isinstance(batch, list | tuple) else batch], seconds=seconds)
        folder = Path(self.log_dir or self.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / "advice.json") as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n")
        if find_spec("matplotlib"):
            advice.figure(found).savefig(folder / "advice.png", dpi=110)
        Console().print(advice.summary(found))
        print(f"advice: {folder / 'advice.json'}")

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        format: Literal["dense", "compressed", "nm", "shrunk", "torch", "onnx"] = "compressed",
        output: str | None = None,
        part: str | None = None,
    ) -> None:
        """Writes a checkpoint's weights for others to read, and beside them a `.json` of how many bytes they are.

        `sparsity.export.load` gives the first four formats back, every weight as it was.

        Args:
            format: zeros and all (dense), a bit for each weight and the values that are not zero (compressed), N of
                each M and their places (nm), a smaller model (shrunk), or a program (torch, onnx).
            output: the file to write; in the log folder if not given.
            part: the name of a part of the model, such as `net`, if it is not all of it.
        """
        if ckpt_path is None:
            raise InputError("export needs the checkpoint of a trained network (--ckpt_path)")
        checkpoints.load_weights(model, ckpt_path)
        method = method_of(self)
        asked = method.sparsifier.pattern if method else None
        pattern = f"{asked.n}:{asked.m}" if isinstance(asked, NM) else "2:4"
        inputs = _inputs(model, part, datamodule) if format in ("torch", "onnx", "shrunk") else None
        folder = Path(self.log_dir or self.default_root_dir)
        path = Path(output) if output else folder / f"{format}{export.ENDINGS[format]}"
        result = export.save(_part(model, part), path, format, pattern, inputs)
        with written(path.with_name(f"{path.name}.json")) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
        Console().print(export.summary(result))
        print(f"export: {path}")

    def federate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        federation: Federation | None = None,
        protocol: Protocol | None = None,
        workers: int = 1,
        evaluate_every: int = 1,
        resume: str | None = None,
        engine: Literal["embedded", "flower"] = "embedded",
    ) -> None:
        """Trains over the clients of a federation on this machine; saves its state each round, and its end.

        Args:
            federation: clients, rounds, and how the training samples are divided.
            protocol: how clients train, what the server does, which failures are tolerated, precision on the wire.
            workers: processes that share the clients of a round.
            evaluate_every: rounds from one validation to the next.
            resume: the folder of a run to go on from, or "last".
            engine: "flower" runs the same federation over Flower's Ray engine, with the same result.
        """
        self._refuse_what_clients_do_not_have()
        method = method_of(self)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        federation = federation or Federation()
        if resume == "last":
            resume = str(newest(Path(self.default_root_dir), simulation.FILE).parent)
        folder = Path(self.log_dir or self.default_root_dir)
        device = self.strategy.root_device
        devices = [torch.device("cuda", number) for number in self.device_ids] if device.type == "cuda" else [device]
        running = Running(workers, evaluate_every, folder, resume, devices)
        progress = Progress(self, federation.rounds)
        if engine == "flower":
            from sparsity.federated.flower import simulate
        else:
            from sparsity.federated.simulation import simulate
        try:
            outcome = simulate(model, datamodule, method, federation, protocol, running, seed=seed, on_round=progress)
        except KeyboardInterrupt:
            print(f"interrupted: --resume={folder} (or last) goes on from the last whole round", file=sys.stderr)
            raise
        self.strategy.connect(model)
        self.save_checkpoint(folder / "federated.ckpt", weights_only=False)
        print(f"global model: {folder / 'federated.ckpt'}")
        report = next(each for each in self.callbacks if isinstance(each, SparsityReport))  # type: ignore[attr-defined]  # set by a connector
        report.metrics = {name: finite(value) for name, value in outcome.metrics.items()}
        if find_spec("matplotlib"):
            name = type(method).__name__ if method else "dense"
            federated.figure({name: outcome.rows}).savefig(folder / "accuracy.png", dpi=110)
            if federation.partition.needs_labels:
                labels = partition.labels_of(samples_of(datamodule.train_dataloader()))
                partition.figure(outcome.parts, labels).savefig(folder / "holdings.png", dpi=110)
        batch = next(iter(datamodule.train_dataloader()))
        batch = datamodule.on_after_batch_transfer(datamodule.on_before_batch_transfer(batch, 0), 0)
        more = {**federated.describe(outcome), **(method.story() if method else {})}
        report.finish(self, model, batch, folder, finite(more))
        for logger in self.loggers:
            logger.finalize("success")

    def _refuse_what_clients_do_not_have(self) -> None:
        if self.precision != "32-true" or self.accumulate_grad_batches != 1:
            raise InputError(
                f"clients train in the model's own precision and step at each batch: leave out trainer.precision="
                f"{self.precision} and trainer.accumulate_grad_batches={self.accumulate_grad_batches}"
            )
        if self.gradient_clip_val is not None:
            raise InputError("clients clip by protocol.local.clip: set that, not trainer.gradient_clip_val")
        gpus = self.strategy.root_device.type == "cuda"  # which workers take in turn
        if self.num_nodes != 1 or (self.num_devices != 1 and not gpus):
            raise InputError("a federation runs in processes of its own: set workers, not trainer.devices or num_nodes")
        harmless = (ProgressBar, ModelSummary, Checkpoint, LearningRateMonitor, SaveConfigCallback)
        given = self.callbacks  # type: ignore[attr-defined]  # set by a connector
        foreign = (each for each in given if not type(each).__module__.startswith(f"{__package__}."))
        others = [type(each).__name__ for each in foreign if not isinstance(each, harmless)]
        if others:
            raise InputError(
                f"no trainer trains the clients, so nothing would call {', '.join(others)}: leave them out"
            )
        lightnings = {
            "max_epochs": 1000, "max_steps": -1, "limit_train_batches": 1.0, "limit_val_batches": 1.0,
            "limit_test_batches": 1.0, "overfit_batches": 0.0,
        }  # fmt: skip
        limits = [name for name, own in lightnings.items() if getattr(self, name) not in (None, own)]
        if limits:
            raise InputError(
                "clients train for federation.rounds of protocol.local.epochs, and what is measured takes all samples: "
                f"leave out {', '.join(f'trainer.{name}={getattr(self, name)}' for name in limits)}"
            )


class Progress:
    """Prints a line for each round of a federation, and logs it."""

    def __init__(self, trainer: Trainer, rounds: int) -> None:
        self.trainer, self.rounds = trainer, rounds
        self.seconds = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        self.seconds += row["seconds"] + row.get("seconds_evaluating", 0.0)
        left = self.seconds / (row["round"] + 1) * (self.rounds - row["round"] - 1)
        print(federated.line(row, self.rounds, left), flush=True)
        names = ("bytes_up", "bytes_down", "clients", "failures", "density")
        numbers = {f"federated/{name}": row[name] for name in names}
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers | row.get("metrics", {}), step=row["round"])


def _batches(datamodule: LightningDataModule) -> Iterator[Any]:
    """The training batches, as a model gets them."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    for batch in datamodule.train_dataloader():
        yield datamodule.on_after_batch_transfer(datamodule.on_before_batch_transfer(batch, 0), 0)


def _part(model: LightningModule, name: str | None) -> nn.Module:
    try:
        return model.get_submodule(name or "")
    except AttributeError as error:
        parts = ", ".join(each for each, _ in model.named_children())
        raise InputError(f"the model has no part called '{name}': its parts are {parts}") from error


def _inputs(model: LightningModule, part: str | None, datamodule: LightningDataModule | None) -> tuple[Any, ...]:
    """What a part of the model is given when the model is, for two samples: its example input, or from the data."""
    given = model.example_input_array
    if given is None:
        if datamodule is None:
            raise InputError("a program is traced on inputs: give the recipe data, or the model an example_input_array")
        batch = next(_batches(datamodule))
        given = (batch[0] if isinstance(batch, list | tuple) else batch)[:2]
    found: list[tuple[Any, ...]] = []
    hook = _part(model, part).register_forward_pre_hook(lambda _, inputs: found.append(inputs))
    with hook, torch.no_grad():
        model.eval()(*given) if isinstance(given, tuple) else model.eval()(given)
    if not found:
        raise InputError(f"the model's forward pass does not use its part '{part}', so it cannot be traced")
    return found[0]


def newest(folder: Path, *names: str) -> Path:
    """The newest file of these names of the runs that logged under a folder."""
    found = sorted(
        (path for name in names for path in folder.glob(f"**/{name}")), key=lambda path: path.stat().st_mtime
    )
    if not found:
        raise InputError(f"no {names[0]} under '{folder}': train with ModelCheckpoint(save_last=True), or give a path")
    return found[-1]
