"""The command line: `python train.py fit --config recipes/digits_lamp.yaml`.

Subcommands: fit, validate, test, and oneshot, which prunes a checkpoint without training. Every key of a recipe can be
overridden, for example `--sparsity.sparsity=0.95`, `--sparsity=GMP` or `--sparsity=null` for the dense baseline.
"""

import sys
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

import sparsity.data
import sparsity.distributions
import sparsity.models  # with the other modules: makes their classes known to recipes by their short names
from callbacks import Sparsify, SparsityReport
from sparsity import InputError, checkpoints


class SparseTrainer(Trainer):
    """Lightning's Trainer with `oneshot`."""

    def oneshot(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, ckpt_path: str | None = None
    ) -> None:
        """Prunes a checkpoint at once, validates it, and saves it as `oneshot.ckpt` beside the report."""
        method = next((each for each in self.callbacks if isinstance(each, Sparsify)), None)  # type: ignore[attr-defined]  # set by a connector
        if method is None or ckpt_path is None:
            raise InputError("oneshot needs a method (the recipe's `sparsity:`) and a checkpoint (--ckpt_path)")
        checkpoints.load_weights(model, ckpt_path)
        method.prune(model)
        self.validate(model, datamodule=datamodule, verbose=False)
        path = Path(self.log_dir or self.default_root_dir) / "oneshot.ckpt"
        self.save_checkpoint(path)
        print(f"pruned checkpoint: {path}")


class SparsityCLI(LightningCLI):
    """LightningCLI with the method under a key of its own, `sparsity:`, and a report of every run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        model_and_data = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {name: model_and_data for name in ("fit", "validate", "test", "oneshot")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Sparsify, "sparsity", subclass_mode=True, required=False)
        parser.add_lightning_class_args(SparsityReport, "report")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        keys = self._parser(self.subcommand).callback_keys
        extra = [callback for key in keys if (callback := self._get(self.config_init, key)) is not None]
        return self._instantiate_trainer({**self._get(self.config_init, "trainer", default={}), **kwargs}, extra)


def main(args: ArgsType = None) -> None:
    """Runs the command line; input that cannot work ends it with a plain message and status 2."""
    SparsityCLI(
        LightningModule, trainer_class=SparseTrainer, subclass_mode_model=True, subclass_mode_data=True, args=args
    )


if __name__ == "__main__":
    main()
