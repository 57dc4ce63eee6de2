"""Sparsify: Lightning's hooks, turned into a Sparsifier's three verbs."""

import math
import os
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from torch.nn.parameter import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsity import Horizon, InputError, Sparsifier, masks
from sparsity.constant import Kept
from sparsity.schedules import Constant
from sparsity.targets import clean


class Sparsify(Callback):
    """Trains with a Sparsifier. Every method is a subclass that only builds one.

    Masks are renewed and gradients masked in `on_before_optimizer_step`, after unscaling and before clipping.
    Pruned weights and their state are made sure of in the optimizer's post-step hook, so once per real step: not on
    the micro-batches of an accumulation, and not where a gradient scaler skips the step.

    Steps are those of the optimizer that holds most of the target weights. The schedule, the masks (one bit per
    weight) and the step are in the checkpoint; the model's own `state_dict` keeps its keys and its zeros.

    A checkpoint of another method or another sparsity is refused when a run is resumed, unless `resumes_any` is set.

    Logs `sparsity/global` (also in the progress bar), `sparsity/target`, after each renewal what it did
    (`sparsity/churn`, `sparsity/explored`, `sparsity/dead`; see `History`), and per layer on TensorBoard.
    """

    resumes_any = False

    def __init__(self, sparsifier: Sparsifier) -> None:
        self.sparsifier = sparsifier
        self.step = 0
        self._attached = False
        self._clock: Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self._seen: list[int] = []
        self._achieved = self._target = 0.0

    def scaled(self, what: str = "both") -> Self:
        """The same method with first weights, and learning rates, to match what the masks leave.

            Trainer(callbacks=[StaticMask(0.9).scaled()])

        `what`: "both", or "weights" alone. Why, and when not: `sparsity.scaling.Scaling`. Raises `InputError` for
        methods whose masks are not random at first.
        """
        if not self.sparsifier.begins_at_random:
            raise InputError(
                "weights and rates are scaled for methods whose masks are random at first, such as StaticMask, SET or "
                f"RigL, not for {type(self).__name__}: leave it out (--scaled=null)"
            )
        self.sparsifier.scaled(what)
        return self

    @property
    def state_key(self) -> str:
        """One key for all methods, so that a run can be resumed with another one where that is meant."""
        return "Sparsify"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Averaging callbacks (EMA, SWA) put dense weights into the model: the masks have to come after them.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        later = [self, *trainer.checkpoint_callbacks]
        between = [each for each in callbacks if each not in later and not isinstance(each, _Settle)]
        trainer.callbacks = [_Settle(self.sparsifier), *between, *later]  # type: ignore[attr-defined]
        self._attached = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if saved is not None:
            self._refuse_another(saved)
        else:
            raise InputError(
                "the checkpoint to resume from holds no masks: it was saved without a sparsity callback. To prune a "
                "trained model, load its weights and call fit without ckpt_path (or use OneShot); to keep a pruned "
                "one sparse, do the same with ConstantMask"
            )

    def _refuse_another(self, saved: dict[str, Any]) -> None:
        """Raises `InputError` for the checkpoint of another method or another sparsity, unless they are asked for."""
        mine, asked = type(self).__name__, self.sparsifier.sparsity
        method, sparsity = saved.get("method", mine), saved["sparsifier"].get("sparsity", asked)
        scaling = self.sparsifier.scaling
        was, scaled = saved["sparsifier"].get("scaled"), scaling.what if scaling else None
        same = method == mine and was == scaled and (asked == sparsity or isinstance(self.sparsifier, Kept))
        if self.resumes_any or same:
            return
        raise InputError(
            f"the checkpoint to resume from was trained by {_said(method, sparsity, was)}, this run is "
            f"{_said(mine, asked, scaled)}: resume with what it was trained with or, if the change is meant, set the "
            "callback's `resumes_any = True` (--resumes_any=true on the command line)"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._attached:  # strategies that restore late, after the model is set up
            self._attach(trainer, pl_module)
        if trainer.global_step == 0:
            self.step = 0
        self.sparsifier.begin(self.step)
        # The optimizer's state was restored since the masks were attached.
        self.sparsifier.enforce()
        self._seen = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.sparsifier.relax()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Masks are renewed at the clock's steps; at another optimizer's the last of them has already been made.
        is_clock = optimizer is self._clock
        self.sparsifier.update(self.step if is_clock else self.step - 1, optimizer)
        self.step += is_clock

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        renewed = self._seen != self._moment()
        if renewed:
            self._seen, self._achieved = self._moment(), 1 - self.sparsifier.density()
            self._check_ranks(trainer, pl_module)
            self._warn_of_empty_layers()
        if trainer.barebones:
            return
        if renewed:
            self._log_layers(trainer)
        target = self.sparsifier.target(max(0, self.step - 1))
        # Lightning keeps what was logged until the epoch ends; logging it anew at every step would take longer than
        # everything else here.
        if renewed or target != self._target or batch_idx == 0:
            self._target = target
            pl_module.log("sparsity/global", self._achieved, prog_bar=True)
            pl_module.log("sparsity/target", target)
            for name, number in self.sparsifier.history.last().items():
                pl_module.log(f"sparsity/{name}", number)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sparsifier.enforce()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._attached:  # outside of fit the weights may be a checkpoint's, with other masks
            self.sparsifier.enforce()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sparsifier.enforce()
        due = self.sparsifier.reached()
        if self.sparsifier.renewed < due:
            rank_zero_warn(
                f"training ended at sparsity {1 - self.sparsifier.density():.4f}, before the schedule reached "
                f"{self.sparsifier.sparsity}: that renewal was due at step {due}, training took {self.step} steps"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hooks()
        self._attached = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()
        if self._attached:
            self.sparsifier.settle()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._attached:
            return
        # An averaging callback may have put the average in place of the model's own weights.
        state = checkpoint["state_dict"]
        for name in state:
            if clean(name) in self.sparsifier.masks:
                state[name] = self.sparsifier.stored(clean(name), state[name])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "method": type(self).__name__, "sparsifier": self.sparsifier.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sparsifier.detach()
        self.sparsifier.load_state_dict(state_dict["sparsifier"])
        self.step = state_dict["step"]
        self._attached = False

    def story(self) -> dict[str, Any]:
        """What the report has to say beside the masks: entries of its own."""
        return {"scaled": self.sparsifier.scaling.what} if self.sparsifier.scaling else {}

    def prune(self, pl_module: LightningModule, batches: Callable[[], Iterable[Any]] | None = None) -> None:
        """Prunes the model to the full sparsity at once, outside of any training; by `batches` where data is needed."""
        if self.sparsifier.score.needs_gradient or self.sparsifier.needs_training:
            raise InputError(
                f"{type(self).__name__} finds its masks while it trains, so it cannot prune without training: "
                "use LAMP, GMP or OneShot"
            )
        self.sparsifier.schedule = Constant()
        self.sparsifier.attach(pl_module, seed=_seed())

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        self.sparsifier.attach(pl_module, *trainer.optimizers, horizon=_horizon(trainer), seed=_seed())
        self._clock = _main_optimizer(trainer.optimizers, self.sparsifier.weights().values())
        self._hooks = [optimizer.register_step_post_hook(self._stepped(pl_module)) for optimizer in trainer.optimizers]
        self._attached = True

    def _stepped(self, pl_module: LightningModule) -> Callable[..., None]:
        def apply(*_: Any) -> None:
            self.sparsifier.apply()
            if not pl_module.automatic_optimization:  # another forward pass may follow in the same batch
                self.sparsifier.relax()

        return apply

    def _moment(self) -> list[int]:
        """Tells one renewal from another: its planned step, and when it was noted in the history."""
        return [self.sparsifier.renewed, *self.sparsifier.history.steps[-1:]]

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.sparsifier.scaling:
            self.sparsifier.scaling.leave()

    def _check_ranks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each renewal: all ranks have to hold the same masks, which nothing broadcasts."""
        if trainer.world_size > 1:
            mine = torch.tensor(int(masks.fingerprint(self.sparsifier.masks)[:15], 16), device=pl_module.device)
            hashes = torch.as_tensor(pl_module.all_gather(mine)).flatten().tolist()
            if len(set(hashes)) > 1:
                raise RuntimeError(
                    f"the masks differ between ranks after the renewal at step {self._seen[-1]}: {hashes}"
                )

    def _warn_of_empty_layers(self) -> None:
        empty = [name for name, count in masks.counts(self.sparsifier.masks).items() if count == 0]
        if empty:
            rank_zero_warn(
                f"no weight is left in {empty}, which may cut the network in two: LAMP keeps some in every layer, and "
                "so do GlobalMP(minimum=...) and the distributions Uniform and ERK"
            )

    @rank_zero_only
    def _log_layers(self, trainer: Trainer) -> None:
        kept = masks.counts(self.sparsifier.masks)
        for logger in trainer.loggers:
            if is_tensorboard(logger):
                layers = {
                    f"sparsity/layer/{n}": 1 - kept[n] / mask.numel() for n, mask in self.sparsifier.masks.items()
                }
                logger.log_metrics(layers, step=trainer.global_step)


class _Settle(Callback):
    """Comes first, so that no other callback sees what training has used beside what the masks keep."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self.sparsifier = sparsifier

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.sparsifier.settle()


def _said(method: str, sparsity: float, scaled: str | None) -> str:
    return f"{method} at sparsity {sparsity:g}" + (f", scaled {scaled}" if scaled else "")


def method_of(trainer: Trainer) -> Sparsify | None:
    """The method among a trainer's callbacks, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return next((each for each in callbacks if isinstance(each, Sparsify)), None)


def is_tensorboard(logger: object) -> bool:
    """Whether a logger is a TensorBoardLogger, of either Lightning package."""
    return any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__)


def _horizon(trainer: Trainer) -> Horizon:
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches, steps = trainer.num_training_batches, trainer.estimated_stepping_batches
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None
    return Horizon(int(steps) if math.isfinite(steps) and steps >= 0 else None, per_epoch)


def _seed() -> int:
    # `seed_everything` leaves its seed in the environment, where the processes of all ranks find it.
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def _main_optimizer(optimizers: list[Optimizer], weights: Iterable[Parameter]) -> Optimizer | None:
    """The optimizer that holds most of the target weights: its steps are the ones that are counted."""
    sizes = {id(weight): weight.numel() for weight in weights}
    held = [sum(sizes.get(id(p), 0) for group in o.param_groups for p in group["params"]) for o in optimizers]
    return optimizers[held.index(max(held))] if optimizers else None
