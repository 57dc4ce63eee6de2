"""A run that saves a checkpoint every two steps and is killed in the middle of writing the fifth."""

import os
import signal
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileOpener  # type: ignore[import-untyped]  # has no types
from pytorch_lightning.callbacks import ModelCheckpoint

from tests.guarantees.columns import column
from tests.guarantees.runs import Batches, start, task

written = 0
write = LocalFileOpener.write


def half(self: LocalFileOpener, data: bytes, *more: Any) -> Any:
    """Writes the whole file, four times; then half of it, to the disk, and dies."""
    global written
    written += 1
    if written < 5:
        return write(self, data, *more)
    write(self, data[: len(data) // 2], *more)
    self.f.flush()
    os.fsync(self.f.fileno())
    os.kill(os.getpid(), signal.SIGKILL)


def main(name: str, folder: Path) -> None:
    LocalFileOpener.write = half  # the kill is the point
    method, model = column(name), task()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    runner, _ = start(method, model, saver, watch=False, enable_checkpointing=True)
    runner.fit(model, Batches())
