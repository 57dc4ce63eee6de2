import json
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparsity import InputError
from sparsity.data.parquet import ParquetImages, read_hub, read_split

GREY = torch.randint(256, (5, 1, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
COLOUR = torch.randint(256, (5, 3, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = [3, 1, 4, 1, 5]


class Photographs(ParquetImages):
    repository = "somebody/photographs"
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)


def encode(image: Tensor, kind: str = "PNG") -> bytes:
    """An image file of `[C, H, W]`."""
    stream = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(stream, kind)
    return stream.getvalue()


def write(file: Path, encoded: Sequence[bytes | None], labels: Sequence[int], column: str = "image") -> None:
    """A file as the hub has it: an image struct, labels, and the features in the metadata of the schema."""
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {
        column: {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": [str(label) for label in range(10)]},
    }
    schema = pa.schema(
        {column: struct, "label": pa.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    cells = [{"bytes": data, "path": None} for data in encoded]
    pq.write_table(pa.table({column: cells, "label": labels}, schema=schema), file)


def write_images(file: Path, images: Tensor, labels: Sequence[int], column: str = "image") -> None:
    write(file, [encode(image) for image in images], labels, column)


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_png_comes_back_exactly(tmp_path: Path, images: Tensor, column: str) -> None:
    write_images(tmp_path / "train-00000-of-00001.parquet", images, LABELS, column)
    read, labels = read_split(tmp_path, "train")
    assert torch.equal(read, images)
    assert torch.equal(labels, torch.tensor(LABELS))
    assert (read.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert read.is_contiguous()


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_jpeg_is_what_pillow_decodes(tmp_path: Path, images: Tensor) -> None:
    encoded = [encode(image, "JPEG") for image in images]
    write(tmp_path / "test-0.parquet", encoded, LABELS)
    read, _ = read_split(tmp_path, "test")
    decoded = [np.array(Image.open(BytesIO(data))).reshape(6, 4, -1) for data in encoded]
    assert torch.equal(read.permute(0, 2, 3, 1), torch.from_numpy(np.stack(decoded)))


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_images(tmp_path / "train-00001-of-00002.parquet", GREY[2:], LABELS[2:])
    write_images(tmp_path / "train-00000-of-00002.parquet", GREY[:2], LABELS[:2])
    write_images(tmp_path / "test-00000-of-00001.parquet", GREY[:1], [9])
    images, labels = read_split(str(tmp_path), "train")
    assert torch.equal(images, GREY)
    assert labels.tolist() == LABELS


def test_the_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "train-0.parquet", GREY, LABELS)
    assert len(read_split("~", "train")[1]) == 5


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder '.*nowhere': pass data_dir=<folder with"):
        read_split(tmp_path / "nowhere", "train")


def test_a_folder_without_the_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected train-\*.parquet in '.*', found nothing: pass"):
        read_split(tmp_path, "train")
    (tmp_path / "mnist").mkdir()
    write_images(tmp_path / "test-0.parquet", GREY, LABELS)
    with pytest.raises(InputError, match=r"in '.*', found mnist, test-0.parquet: pass data_dir="):
        read_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"picture": [{"bytes": b""}], "label": [0]}, r"picture\.bytes, label"),
        ({"image": [{"bytes": b""}], "fine_label": [0]}, r"image\.bytes, fine_label"),
        ({"image": [b""], "label": [0]}, "image, label"),
    ],
)
def test_missing_columns(tmp_path: Path, columns: dict[str, list[Any]], found: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    with pytest.raises(InputError, match=rf"train-0.parquet' has the columns {found}: expected image or img"):
        read_split(tmp_path, "train")


@pytest.mark.parametrize("other", [GREY[:, :, :5], COLOUR], ids=["height", "channels"])
def test_images_of_several_sizes(tmp_path: Path, other: Tensor) -> None:
    write_images(tmp_path / "train-0.parquet", GREY, LABELS)
    write_images(tmp_path / "train-1.parquet", other, LABELS)
    sizes = rf"\(6, 4, 1\) and \({other.shape[2]}, 4, {other.shape[1]}\)"
    with pytest.raises(InputError, match=rf"expected one \(height, .*\) of all images, found {sizes}"):
        read_split(tmp_path, "train")


def test_no_image_at_all(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [], [])
    with pytest.raises(InputError, match="of all images, found no image"):
        read_split(tmp_path, "train")


@pytest.mark.parametrize(
    "broken",
    [None, b"", b"text", encode(COLOUR[0])[:-30], encode(COLOUR[0], "JPEG")[:-200]],
    ids=["null", "empty", "text", "cut PNG", "cut JPEG"],
)
def test_a_broken_image_is_named(tmp_path: Path, broken: bytes | None) -> None:
    write(tmp_path / "train-0.parquet", [encode(COLOUR[0]), broken], [0, 1])
    with pytest.raises(InputError, match=r"row 1 of '.*train-0.parquet' is not a readable image \(.+\): "):
        read_split(tmp_path, "train")


def test_an_image_with_transparency_is_refused(tmp_path: Path) -> None:
    transparent = torch.zeros(4, 6, 4, dtype=torch.uint8)
    write(tmp_path / "train-0.parquet", [encode(transparent)], [0])
    with pytest.raises(InputError, match=r"row 0 of '.*' is an image of mode RGBA, expected L or RGB"):
        read_split(tmp_path, "train")


@pytest.mark.parametrize(("missing", "name"), [("pyarrow.parquet", "pyarrow"), ("PIL.Image", "PIL")])
def test_a_missing_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, name: str) -> None:
    write_images(tmp_path / "train-0.parquet", GREY, LABELS)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf'{name} is missing: pip install "lightning-sparsity\[data\]"'):
        read_split(tmp_path, "train")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has `load_dataset` build its data set from local files; lists the repositories it was asked for."""
    write_images(tmp_path / "train-0.parquet", COLOUR, LABELS, "img")
    write_images(tmp_path / "test-0.parquet", COLOUR[:2], LABELS[:2], "img")
    build, asked = datasets.load_dataset, list[str]()

    def load(repository: str, split: str | None) -> Any:
        asked.append(repository)
        files = {name: str(tmp_path / f"{name}-0.parquet") for name in ("train", "test")}
        return build("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize(("split", "count"), [("train", 5), ("test", 2)])
def test_the_hub_gives_what_the_files_hold(hub: list[str], split: str, count: int) -> None:
    images, labels = read_hub("somebody/photographs", split)
    assert torch.equal(images, COLOUR[:count])
    assert labels.tolist() == LABELS[:count]
    assert hub == ["somebody/photographs"]


def test_an_error_of_the_hub_names_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ConnectionError("no route to host")

    def load(repository: str, split: str | None) -> None:
        raise cause

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = r"could not load 'somebody/photographs' from .* \(no route to host\): .* or pass data_dir="
    with pytest.raises(InputError, match=message) as caught:
        read_hub("somebody/photographs", "train")
    assert caught.value.__cause__ is cause


def test_the_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r'datasets is missing: pass data_dir=<.*>, or pip install "lightning-sparsity\[hub\]"'
    with pytest.raises(InputError, match=message):
        read_hub("somebody/photographs", "train")


def test_without_a_folder_the_images_come_from_the_hub(hub: list[str]) -> None:
    data = Photographs()
    data.prepare_data()
    assert hub == ["somebody/photographs"]
    data.setup()
    assert (len(data.splits["train"]), len(data.splits["test"])) == (5, 2)
    assert hub == ["somebody/photographs"] * 3


def test_with_a_folder_the_hub_is_never_asked(hub: list[str], tmp_path: Path) -> None:
    data = Photographs(str(tmp_path), validation=0.4)
    data.prepare_data()
    data.setup()
    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [3, 2, 2]
    assert hub == []
