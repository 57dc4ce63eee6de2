"""Labelled images in parquet files, in a folder or on the Hugging Face hub.

Both hold tables of the same layout: a column ``image`` or ``img``, a struct with the encoded image in its
field ``bytes``, and a column ``label`` of integers.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparsity.data.images import Batch, Images
from sparsity.errors import InputError

IMAGE_FIELDS = ("image.bytes", "img.bytes")
CHANNELS = {"L": 1, "RGB": 3}
DATA_DIR = "data_dir=<folder with train-*.parquet and test-*.parquet>"


class ParquetImages(Images):
    """Images read from the parquet files in a folder, or else from the hub; a subclass gives ``repository``.

    Args:
        data_dir: folder with ``train-*.parquet`` and ``test-*.parquet``; None downloads ``repository``.
        batch_size: as in ``Images``.
        validation: as in ``Images``.
        augment: as in ``Images``.
    """

    repository: ClassVar[str]

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        validation: float = 0.1,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, validation, augment)
        self.data_dir = data_dir

    def prepare_data(self) -> None:
        """Downloads what ``setup`` will read; nothing where it lies in a folder or in the hub's cache."""
        if self.data_dir is None:
            _load_hub(self.repository)

    def read(self, split: str) -> Batch:
        """Images of ``"train"`` or ``"test"``, uint8 ``[N, C, H, W]``, and their labels, int64 ``[N]``."""
        if self.data_dir is None:
            return read_hub(self.repository, split)
        return read_split(self.data_dir, split)


class Pixels(NamedTuple):
    """A decoded image: its height, width and channels, and one byte per value in that order."""

    shape: tuple[int, int, int]
    values: bytes


def read_split(folder: str | Path, split: str) -> Batch:
    """Images, uint8 ``[N, C, H, W]``, and labels, int64 ``[N]``, of the files ``<split>-*.parquet`` by name.

    Greyscale images have one channel, colour images three (RGB).
    """
    parquet = _require("pyarrow.parquet", 'pip install "lightning-sparsity[data]"')
    files = _files(Path(folder).expanduser(), split)
    return _decode((f"'{file}'", parquet.read_table(file)) for file in files)


def read_hub(repository: str, split: str) -> Batch:
    """``read_split`` for a repository of the hub, such as ``"ylecun/mnist"``, or for its cached copy."""
    table = _load_hub(repository, split).with_format("arrow")[:]
    return _decode([(f"the {split} split of '{repository}'", table)])


def _load_hub(repository: str, split: str | None = None) -> Any:
    """The ``datasets.Dataset`` of one split, or a dictionary of all of them."""
    datasets = _require("datasets", f'pass {DATA_DIR}, or pip install "lightning-sparsity[hub]"')
    try:
        return datasets.load_dataset(repository, split=split)
    except Exception as error:  # the hub's errors have no common base class
        raise InputError(
            f"could not load '{repository}' from the Hugging Face hub ({error}): "
            f"check the network connection, or pass {DATA_DIR}"
        ) from error


def _files(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no folder '{folder}': pass {DATA_DIR}")
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise InputError(f"expected {split}-*.parquet in '{folder}', found {found}: pass {DATA_DIR}")
    return files


def _decode(tables: Iterable[tuple[str, Any]]) -> Batch:
    """Images and labels of ``pyarrow`` tables, each with what a message calls it."""
    pixels: list[Pixels] = []
    labels: list[int] = []
    for name, table in tables:
        encoded, label = _columns(name, table)
        # One thread: decoding images this small is mostly Python, so threads only contend for its lock.
        pixels += [_pixels(data, f"row {row} of {name}") for row, data in enumerate(encoded)]
        labels += label
    return _stack(pixels), torch.tensor(labels, dtype=torch.int64)


def _columns(name: str, table: Any) -> tuple[list[bytes | None], list[int]]:
    """Encoded images and labels."""
    flat = table.flatten()
    image = next((field for field in IMAGE_FIELDS if field in flat.column_names), None)
    if image is None or "label" not in flat.column_names:
        raise InputError(
            f"{name} has the columns {', '.join(flat.column_names)}: "
            "expected image or img, a struct with the field bytes, and label"
        )
    return flat[image].to_pylist(), flat["label"].to_pylist()


def _pixels(encoded: bytes | None, where: str) -> Pixels:
    pillow = _require("PIL.Image", 'pip install "lightning-sparsity[data]"')
    try:
        image = pillow.open(BytesIO(encoded or b""))
        values = image.tobytes()
    except (OSError, SyntaxError, ValueError) as error:  # all three come from Pillow's decoders
        raise InputError(f"{where} is not a readable image ({error}): download the file again") from error
    if image.mode not in CHANNELS:
        raise InputError(f"{where} is an image of mode {image.mode}, expected L or RGB: convert it first")
    return Pixels((image.height, image.width, CHANNELS[image.mode]), values)


def _stack(pixels: Sequence[Pixels]) -> Tensor:
    """uint8 ``[N, C, H, W]``."""
    shapes = list(dict.fromkeys(image.shape for image in pixels))
    if len(shapes) != 1:
        found = " and ".join(map(str, shapes[:2])) or "no image"
        raise InputError(f"expected one (height, width, channels) of all images, found {found}: convert them")
    values = torch.frombuffer(bytearray().join(image.values for image in pixels), dtype=torch.uint8)
    return values.view(-1, *shapes[0]).permute(0, 3, 1, 2).contiguous()


def _require(module: str, remedy: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"{module.partition('.')[0]} is missing: {remedy}") from error
