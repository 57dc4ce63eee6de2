"""N:M sparsity on a character-level GPT: masks for a trained network, learned masks, and training through masks.

    python -m benchmarks.nm --data data/tinyshakespeare

Each seed trains one dense network; every method starts from it and has the same number of steps. Runs that a result
file already has are not repeated.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from sparsity.data import TinyShakespeare
from sparsity.models import GPT, LanguageModel

RESULTS = Path(__file__).parent / "results"
DENSE_STEPS = 4000
STEPS = 500
CONTEXT, BATCH = 64, 32


class Trained(LanguageModel):
    """The GPT with AdamW and a cosine."""

    def __init__(self, steps: int, rate: float) -> None:
        super().__init__(GPT(CONTEXT, width=96, depth=4, heads=4))
        self.steps, self.rate = steps, rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.1)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, self.rate / 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def trainer(steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, gradient_clip_val=1.0,
    )  # fmt: skip


def dense(seed: int, data: str | None, folder: Path) -> Path:
    """The trained dense network of a seed."""
    path = folder / f"dense_{seed}.pt"
    if not path.exists():
        pl.seed_everything(seed, verbose=False)
        model = Trained(DENSE_STEPS, 2e-3)
        trainer(DENSE_STEPS).fit(model, TinyShakespeare(data, CONTEXT, BATCH))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return path
