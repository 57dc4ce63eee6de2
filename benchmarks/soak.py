"""Twenty thousand steps of the digits recipe with a renewal every ten: does memory grow, does the count drift?

python -m benchmarks.soak
"""

import gc
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from callbacks import GMP, LAMP, GlobalMP, Sparsify
from sparsity import data, masks, models
from sparsity.schedules import Linear

RESULT = Path(__file__).parent / "results" / "soak.json"
STEPS, EVERY, SAMPLES = 20_000, 10, 1_000
METHODS: list[type[LAMP] | type[GMP] | type[GlobalMP]] = [LAMP, GMP, GlobalMP]


class Watch(pl.Callback):
    """The kept count against the planned one after every step; memory and live tensors once in a while."""

    def __init__(self, method: Sparsify) -> None:
        self.method = method
        self.drift, self.renewals, self.last = 0, 0, -1
        self.samples: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        sparsifier, step = self.method.sparsifier, trainer.global_step
        total = sum(mask.numel() for mask in sparsifier.masks.values())
        planned = round((1 - sparsifier.target(step - 1)) * total)
        self.drift = max(self.drift, abs(sum(masks.counts(sparsifier.masks).values()) - planned))
        self.renewals += sparsifier.renewed != self.last
        self.last = sparsifier.renewed
        if step % SAMPLES == 0:
            gc.collect()
            tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
            self.samples.append({"step": step, "rss_kb": resident(), "tensors": tensors})


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


class Trained(models.Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def run(kind: type[LAMP] | type[GMP] | type[GlobalMP]) -> dict[str, Any]:
    pl.seed_everything(1, verbose=False)
    method = kind(0.9, schedule=Linear(start=0, end=STEPS - EVERY, every=EVERY))
    watch = Watch(method)
    trainer = pl.Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", callbacks=[method, watch], logger=False,
        enable_checkpointing=False, limit_val_batches=0, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Trained(models.LeNet300100(inputs=64)), data.Digits(batch_size=64))
    first, last = watch.samples[1], watch.samples[-1]
    return {
        "method": kind.__name__, "steps": trainer.global_step, "renewals": watch.renewals, "largest_drift": watch.drift,
        "achieved": 1 - method.sparsifier.density(), "rss_growth_kb": last["rss_kb"] - first["rss_kb"],
        "tensor_growth": last["tensors"] - first["tensors"], "samples": watch.samples,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    results = [run(kind) for kind in METHODS]
    RESULT.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")
    for result in results:
        print({key: value for key, value in result.items() if key != "samples"})


if __name__ == "__main__":
    main()
