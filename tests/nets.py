"""A small network with everything that goes wrong elsewhere, and a trainer that is quiet about it."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class Batches:
    """A loader over fixed batches: always the same order, nothing random."""

    def __init__(self, count: int = 6, size: int = 8, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batches = [
            (torch.randn(size, 4, 6, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))
            for _ in range(count)
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Net(nn.Module):
    """A convolution with a norm, tied, frozen and unused layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(32, 16)
        self.tied = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.tied.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.unused = nn.Linear(16, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(torch.relu(self.norm(self.conv(x))).flatten(1)))
        x = torch.relu(self.again(torch.relu(self.tied(x))))
        logits: Tensor = self.head(torch.relu(self.frozen(x)))
        return logits


class Task(pl.LightningModule):
    """Classification with `Net`."""

    def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
        super().__init__()
        self.net = Net()
        self.make_optimizer = make_optimizer

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class ValidatedTask(Task):
    """`Task` with a validation step."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]))


class SaveEpochs(Checkpoint):
    """Saves a checkpoint at the end of every epoch, after all other callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt", weights_only=False)


def task(seed: int = 0, make_optimizer: MakeOptimizer = sgd) -> Task:
    """A task whose weights depend on the seed alone, and a seeded run."""
    pl.seed_everything(seed, verbose=False)
    return Task(make_optimizer)


def trainer(*callbacks: pl.Callback, epochs: int = 3, **settings: Any) -> pl.Trainer:
    """A CPU trainer without output; `settings` go to Lightning's."""
    defaults: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1,
    }  # fmt: skip
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **(defaults | settings))


class Small(nn.Module):
    """Two linear layers around a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.relu(self.norm(self.first(x))))
        return outputs

    def nonzero(self) -> int:
        return int(self.first.weight.count_nonzero() + self.last.weight.count_nonzero())


def small(seed: int = 0) -> Small:
    """Two layers whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Small()
