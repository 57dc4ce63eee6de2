"""Text as a sequence of bytes: a file, tiny Shakespeare, or the source of Python's standard library."""

import sysconfig
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsity.errors import InputError

Batch = tuple[Tensor, Tensor]

SHAKESPEARE = "karpathy/tiny_shakespeare"
SOURCES = (
    "argparse.py", "ast.py", "configparser.py", "dataclasses.py", "datetime.py", "decimal.py", "difflib.py",
    "doctest.py", "enum.py", "functools.py", "inspect.py", "ipaddress.py", "locale.py", "mailbox.py", "optparse.py",
    "pathlib.py", "pickle.py", "pickletools.py", "platform.py", "shutil.py", "socket.py", "statistics.py",
    "subprocess.py", "tarfile.py", "threading.py", "turtle.py", "typing.py", "uuid.py", "zipfile.py",
)  # fmt: skip


class Windows(Dataset[Batch]):
    """Windows of ``context`` bytes, each with the bytes that follow: ``[context]`` and ``[context]``, int64.

    The windows do not overlap. With ``shifts``, each is moved by a random number of bytes below ``context`` every time
    it is asked for, drawn from torch's global generator.
    """

    def __init__(self, values: Tensor, context: int, shifts: bool = False) -> None:
        self.values, self.context, self.shifts = values, context, shifts

    def __len__(self) -> int:
        # The last byte has no successor; shifted windows need room for the shift.
        return (len(self.values) - 1) // self.context - self.shifts

    def __getitem__(self, index: int) -> Batch:
        """One window and its successors."""
        start = index * self.context + (int(torch.randint(self.context, ())) if self.shifts else 0)
        window = self.values[start : start + self.context + 1].long()
        return window[:-1], window[1:]


class Text(pl.LightningDataModule):
    """Training, validation and test text, as bytes of UTF-8; for ASCII, bytes are characters.

    A batch, at every stage, is (bytes ``[B, context]``, the bytes that follow each ``[B, context]``), int64 in
    0 .. 255. Validation and test are the last parts of the text, in this order, read in windows that do not overlap;
    training windows start anywhere. After ``setup`` the bytes are in ``splits["train"]``, ``splits["validation"]`` and
    ``splits["test"]``, uint8.

    Args:
        file: a text file in UTF-8; None reads the source of some modules of Python's standard library, which is always
            there, but not the same in every version of Python.
        context: bytes per window.
        batch_size: windows per batch.
        validation: share of the text held out for validation, in (0, 1).
        test: share of the text held out for the test, in (0, 1).
    """

    def __init__(
        self,
        file: str | None = None,
        context: int = 128,
        batch_size: int = 32,
        validation: float = 0.1,
        test: float = 0.1,
    ) -> None:
        super().__init__()
        if min(validation, test) <= 0 or validation + test >= 1:
            raise InputError(f"validation and test must be above 0 and below 1 in all, got {validation=}, {test=}")
        if min(context, batch_size) < 1:
            raise InputError(f"context and batch_size must be at least 1, got {context=}, {batch_size=}")
        self.file, self.context, self.batch_size = file, context, batch_size
        self.validation, self.test = validation, test
        self.splits: dict[str, Tensor] = {}

    def read(self) -> bytes:
        """All of the text."""
        return read_text(Path(self.file).expanduser()) if self.file else standard_library()

    def setup(self, stage: str | None = None) -> None:
        """Reads the text into memory; a second call does nothing."""
        if self.splits:
            return
        values = torch.frombuffer(bytearray(self.read()), dtype=torch.uint8)
        shares = (1 - self.validation - self.test, 1 - self.test)
        parts = values.tensor_split([round(share * len(values)) for share in shares])
        shortest = min(map(len, parts))
        if shortest < 2 * self.context + 1:
            raise InputError(
                f"the text has {len(values)} bytes, its shortest part {shortest}: a window of context={self.context} "
                f"wants {2 * self.context + 1}; give a longer text or a shorter context"
            )
        self.splits = dict(zip(("train", "validation", "test"), parts, strict=True))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Windows that start anywhere, in a new random order every epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The windows of the validation text, always the same."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The windows of the test text, always the same."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The windows of the test text again."""
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Batch]:
        if not self.splits:
            raise InputError(f"{type(self).__name__} holds no text yet; call setup() first")
        windows = Windows(self.splits[split], self.context, shifts=shuffle)
        return DataLoader(windows, batch_size=self.batch_size, shuffle=shuffle)


class TinyShakespeare(Text):
    """About a million characters of Shakespeare's plays, ASCII; nine tenths minus ``validation`` are trained on.

    Source: Karpathy, "The unreasonable effectiveness of recurrent neural networks" (2015).

    Args:
        data_dir: folder with ``input.txt``; None downloads it from the Hugging Face hub (the ``hub`` extra).
        context: characters per window.
        batch_size: windows per batch.
        validation: share of the text held out for validation, in (0, 1).
        test: share of the text held out for the test, in (0, 1).
    """

    def __init__(
        self,
        data_dir: str | None = None,
        context: int = 128,
        batch_size: int = 32,
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        super().__init__(None, context, batch_size, validation, test)
        self.data_dir = data_dir

    def prepare_data(self) -> None:
        """Downloads what ``setup`` will read; nothing where it lies in a folder or in the hub's cache."""
        if self.data_dir is None:
            _download()

    def read(self) -> bytes:
        """All of the text."""
        folder = _download().parent if self.data_dir is None else Path(self.data_dir).expanduser()
        return read_text(folder / "input.txt")


def read_text(path: Path) -> bytes:
    """The bytes of a text file; raises `InputError` where it is missing or not UTF-8."""
    if not path.is_file():
        raise InputError(f"no text file at '{path}'")
    contents = path.read_bytes()
    try:
        contents.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is not UTF-8: byte {contents[error.start]:#04x} at {error.start} ({error.reason}); "
            "convert it first, for example with iconv -f latin1 -t utf-8"
        ) from error
    return contents


def standard_library() -> bytes:
    """The source of some modules of Python's standard library, one after the other: about a million characters."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [read_text(folder / name) for name in SOURCES if (folder / name).is_file()]
    if not found:
        raise InputError(f"no source text in '{folder}': give a text file, data.init_args.file=<path>")
    return b"\n".join(found)


def _download() -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InputError(
            'huggingface_hub is missing: pass data_dir=<folder>, or pip install "lightning-sparsity[hub]"'
        ) from error
    try:
        return Path(hf_hub_download(SHAKESPEARE, "input.txt", repo_type="dataset"))
    except Exception as error:  # the hub's errors have no common base class
        raise InputError(
            f"could not load '{SHAKESPEARE}' from the Hugging Face hub ({error}): "
            "check the network connection, or pass data_dir=<folder with input.txt>"
        ) from error
