"""Files: written in one piece or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsity.errors import InputError


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A place to write a file to, which becomes `path` if nothing is raised, and is removed if something is."""
    if path.is_dir():
        raise InputError(f"'{path}' is a folder: give the path of the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder of '{path}': {error.strerror}") from error
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
