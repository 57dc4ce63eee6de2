"""The code in Markdown pages: Python blocks, and what the block of text right after one says that it prints."""

import re

import pytorch_lightning as pl

from tests.nets import Batches, task, trainer

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str | None]]:
    """Each Python block of a page, and what it is said to print."""
    return [(code, printed or None) for code, printed in BLOCK.findall(text)]


def names() -> dict[str, object]:
    """What a page takes for granted: a model, its data and a quiet `Trainer`, a fifteenth as long as it says."""

    def quiet(callbacks: list[pl.Callback], max_epochs: int = 30, **settings: object) -> pl.Trainer:
        return trainer(*callbacks, epochs=max_epochs // 15, **settings)

    return {"Trainer": quiet, "model": task(), "datamodule": Batches(), "__name__": "__main__"}
