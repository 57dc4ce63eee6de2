"""The command line: `python -m sparsity fit --config recipe.yaml`, in a checkout `python train.py fit ...`.

Subcommands: fit, validate, test, oneshot, which prunes a checkpoint without training, advise, which measures what
sparse layers are worth on this machine, export, which writes a checkpoint for others to read, and federate, which
trains over the clients of a simulated federation; beside them diff, which compares two runs, import-sparseml, which
translates a recipe, bench, which runs the benchmarks of this repository that measure time, and completion. Every key of
a recipe can be overridden, for example `--sparsity.sparsity=0.95`, `--sparsity=GMP` or `--sparsity=null` for the dense
baseline.
"""

import argparse
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console
from torch import nn

from sparsity import InputError, Sparsifier, advice, checkpoints, data, export, masks, models
from sparsity.distributions import Uniform
from sparsity.federated import Federation, Protocol, Running, partition, simulation
from sparsity.federated import report as federated
from sparsity.files import written
from sparsity.patterns import NM
from sparsity.report import finite
from sparsity.scores import Random

from . import DryRun, SaveOnInterrupt, Sparsify, SparsityReport
from .commands import bench, diff, import_sparseml, recipes
from .interrupt import INTERRUPTED
from .plain import PlainParser, reason
from .sparsify import method_of

# Imported, a module makes its classes known to recipes by their short names.
CATALOGUE = (data, models, federated)


class SparseTrainer(Trainer):
    """Lightning's Trainer with `oneshot`."""

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
            resume = str(_last(Path(self.default_root_dir), simulation.FILE).parent)
        folder = Path(self.log_dir or self.default_root_dir)
        running = Running(workers, evaluate_every, folder, resume)
        model.to(self.strategy.root_device)
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
                labels = partition.labels_of(datamodule.train_dataloader().dataset)
                partition.figure(outcome.parts, labels).savefig(folder / "holdings.png", dpi=110)
        batch = next(iter(datamodule.train_dataloader()))
        batch = datamodule.on_after_batch_transfer(datamodule.on_before_batch_transfer(batch, 0), 0)
        report.finish(self, model, batch, folder, finite(federated.describe(outcome)))
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
        lightnings = {
            "max_epochs": 1000, "max_steps": -1, "limit_train_batches": 1.0, "limit_val_batches": 1.0,
            "limit_test_batches": 1.0,
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


class SparsityCLI(LightningCLI):
    """LightningCLI with the method under a key of its own, `sparsity:`, and a report of every run."""

    begun = -1  # the step of the checkpoint that a run goes on from

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        model_and_data = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return dict.fromkeys(("fit", "validate", "test", "oneshot", "advise", "export", "federate"), model_and_data)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Sparsify, "sparsity", subclass_mode=True, required=False)
        parser.add_lightning_class_args(SparsityReport, "report")
        parser.add_argument(
            "--weights", type=str | None, default=None,
            help="a checkpoint whose weights training starts from, with a fresh optimizer and a fresh method",
        )  # fmt: skip
        parser.add_argument(
            "--resumes_any", type=bool, default=False,
            help="resume from a checkpoint of another method or another sparsity, which is refused otherwise",
        )  # fmt: skip
        parser.add_argument(
            "--dry-run", "--dry_run", action="store_true",
            help="of fit: check everything, print the targets and how many weights each keeps, and write nothing",
        )  # fmt: skip

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        if settings["dry_run"] and self.config["subcommand"] != "fit":
            raise InputError(f"dry_run is of fit: {self.config['subcommand']} has none")
        if settings.get("ckpt_path") == "last" and self.config["subcommand"] not in ("oneshot", "advise"):
            settings["ckpt_path"] = str(
                _last(Path(settings["trainer"]["default_root_dir"] or "."), "last.ckpt", INTERRUPTED)
            )
        if settings.get("ckpt_path") and settings["ckpt_path"] != "best":
            self.begun = checkpoints.read(settings["ckpt_path"]).get("global_step", -1)
        if settings.get("config"):
            settings["report"]["recipe"] = settings["report"]["recipe"] or Path(str(settings["config"][0])).stem

    def before_fit(self) -> None:
        """Loads the weights to start from."""
        if weights := self._get(self.config_init, "weights"):
            checkpoints.load_weights(self.model, weights)

    before_federate = before_fit

    def after_fit(self) -> None:
        """Says so where a run that went on had nothing left to train."""
        if self.trainer.global_step == self.begun:
            print(
                f"nothing was trained: the checkpoint is of step {self.begun}, where this run ends\n"
                "try: a larger --trainer.max_epochs", file=sys.stderr
            )  # fmt: skip

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        keys = self._parser(self.subcommand).callback_keys
        extra = [callback for key in keys if (callback := self._get(self.config_init, key)) is not None]
        for method in extra:
            if isinstance(method, Sparsify):
                method.resumes_any = self._get(self.config_init, "resumes_any")
        settings = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if self._get(self.config_init, "dry_run"):
            self.save_config_callback = None
            given = settings["callbacks"] or []
            kept = [each for each in (given if isinstance(given, list) else [given]) if isinstance(each, Sparsify)]
            nothing = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
            nothing |= {"enable_progress_bar": False, "enable_model_summary": False}
            return self._instantiate_trainer({**settings, **nothing, "callbacks": kept}, [*extra, DryRun()])
        return self._instantiate_trainer(settings, [*extra, SaveOnInterrupt()])


def _last(folder: Path, *names: str) -> Path:
    """The newest file of these names of the runs that logged under a folder."""
    found = sorted(
        (path for name in names for path in folder.glob(f"**/{name}")), key=lambda path: path.stat().st_mtime
    )
    if not found:
        raise InputError(f"no {names[0]} under '{folder}': train with ModelCheckpoint(save_last=True), or give a path")
    return found[-1]


class Recipe:
    """What a federated recipe describes, built anew wherever it is called: for Flower, whose processes are apart.

    plan = Plan.of(Recipe("recipes/federated/mnist_fedsgc.yaml"))
    """

    def __init__(self, path: str, *overrides: str) -> None:
        self.path, self.overrides = path, overrides

    def settings(self) -> dict[str, Any]:
        """The arguments that `federate` would get, and the method and the seed beside them."""
        found: dict[str, Any] = {}

        class Reader(SparseTrainer):
            def federate(self, *args: Any, **settings: Any) -> None:
                method = method_of(self)
                found.update(settings, method=method, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)))

        Reader.federate.__signature__ = inspect.signature(SparseTrainer.federate)  # type: ignore[attr-defined]  # a function's
        # Lightning would print the command line of Flower's process, in which there is a token.
        given, sys.argv = sys.argv, sys.argv[:1]
        try:
            run(Reader, ["federate", "--config", self.path, *self.overrides])
        finally:
            sys.argv = given
        return found

    def __call__(self) -> tuple[Any, Any, Any]:
        """The module, its data and the method."""
        found = self.settings()
        return found["model"], found["datamodule"], found["method"]


ABOUT = """Sparse training and pruning: one recipe, one run. Beside the subcommands there are `diff A B`, which compares
two runs, checkpoints or mask files, `recipes`, which prints those that there are, `import-sparseml FILE`, which
translates one, `bench`, which measures time, and `completion SHELL`."""


def run(trainer: type[Trainer], args: ArgsType = None) -> None:
    """The command line with this trainer."""
    SparsityCLI(
        LightningModule, trainer_class=trainer, parser_class=PlainParser, subclass_mode_model=True, args=args,
        parser_kwargs={"description": ABOUT},
    )  # fmt: skip


CTRL_C = 130  # the status that shells expect of a program that Ctrl-C has ended


class Completion(SparsityCLI):
    """Prints a completion script of the subcommands and their options, and ends."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        import shtab

        # The parser itself knows every class that a recipe could name, which takes shtab minutes.
        plain = argparse.ArgumentParser("sparsity")
        commands = plain.add_subparsers()
        for name in COMMANDS:
            commands.add_parser(name, help=name)
        for name, each in self._subcommand_parsers.items():
            command = commands.add_parser(name, help=name)  # without a help shtab leaves it out
            for option in each._option_string_actions:
                if option.startswith("--") and option not in ("--help", "--print_shtab"):
                    added = command.add_argument(option)
                    if option in ("--config", "--ckpt_path", "--weights"):
                        added.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
        print(shtab.complete(plain, next(iter(args or []))))
        sys.exit(0)


def completion(words: Sequence[str]) -> None:
    """Prints a completion script of the command `sparsity` for bash, zsh or tcsh."""
    if list(words) not in (["bash"], ["zsh"], ["tcsh"]):
        print("usage: sparsity completion {bash,zsh,tcsh}", file=sys.stderr)
        sys.exit(0 if "--help" in words else 2)
    if not find_spec("shtab"):
        print("error: completion needs shtab: pip install '.[completion]'", file=sys.stderr)
        sys.exit(2)
    Completion(
        LightningModule,
        trainer_class=SparseTrainer,
        parser_class=PlainParser,
        subclass_mode_model=True,
        args=list(words),
    )


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "bench": bench, "completion": completion, "diff": diff, "recipes": recipes, "import-sparseml": import_sparseml,
}  # fmt: skip


def main(args: ArgsType = None) -> None:
    """Runs the command line. Status 2 and a plain message: input that cannot work; 130: Ctrl-C."""
    given = sys.argv[1:] if args is None else args
    words = given if isinstance(given, list) else []
    command = COMMANDS.get(words[0]) if words else None
    # Lightning's own call, and its advice to add workers, which data in memory does not need.
    warnings.filterwarnings("ignore", r".*LeafSpec\)` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    try:
        if command:
            command(words[1:])
        else:
            run(SparseTrainer, args)
    except KeyboardInterrupt:
        sys.exit(CTRL_C)
    except BrokenPipeError:  # `... | head`: what is read no more is not written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning's
            sys.exit(CTRL_C)
        raise
    except ValueError as error:
        # The parser wraps what a constructor raises in a message about types.
        if not isinstance(error, InputError) and "Union subtypes" not in str(error):
            raise
        print(f"error: {reason(str(error)) if 'Union subtypes' in str(error) else error}", file=sys.stderr)
        sys.exit(2)
