"""The rows of the guarantee matrix: each function trains with one column, and fails where the guarantee is broken."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsity import InputError
from tests.guarantees.checkpoints import (
    command_line,
    dense_model,
    killed,
    resume_epoch,
    resume_mid_epoch,
    weights_only_checkpoint,
    weights_only_loading,
)
from tests.guarantees.columns import Column, column
from tests.guarantees.growth import grown_start_at_zero, window
from tests.guarantees.models import compiled, ema, frozen, manual, swa, tied, two_optimizers
from tests.guarantees.runs import NotHere, sgd
from tests.guarantees.steps import capturable, clipped_nan, fp16, nan_gradient, nan_skipped, optimizer, setting
from tests.guarantees.trainers import lightning_pytorch, lr_finder, processes, second_fit

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
