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
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

from sparsity import InputError, checkpoints, data, memory, models
from sparsity.federated import report as federated

from . import DryRun, SaveOnInterrupt, Sparsify, SparsityReport
from .commands import bench, diff, import_sparseml, recipes
from .interrupt import INTERRUPTED
from .plain import PlainParser, reason
from .sparsify import method_of
from .trainer import SparseTrainer, newest

# Imported, a module makes its classes known to recipes by their short names.
CATALOGUE = (data, models, federated)


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
            "--scaled", type=Literal["both", "weights"] | None, default=None,
            help="for methods whose masks are random at first: weights to begin with, and learning rates, that make up "
            "for what the masks take from each layer; see sparsity.scaling",
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
                newest(Path(settings["trainer"]["default_root_dir"] or "."), "last.ckpt", INTERRUPTED)
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
        settings = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        given = settings["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        for method in (each for each in (*extra, *given) if isinstance(each, Sparsify)):
            method.resumes_any = method.resumes_any or self._get(self.config_init, "resumes_any")
            if scaled := self._get(self.config_init, "scaled"):
                method.scaled(scaled)
        if self._get(self.config_init, "dry_run"):
            self.save_config_callback = None
            kept = [each for each in given if isinstance(each, Sparsify)]
            nothing = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
            nothing |= {"enable_progress_bar": False, "enable_model_summary": False}
            return self._instantiate_trainer({**settings, **nothing, "callbacks": kept}, [*extra, DryRun()])
        return self._instantiate_trainer(settings, [*extra, SaveOnInterrupt()])


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
    memory.keep_freed()
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
