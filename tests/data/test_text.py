"""Text: windows and what follows them, splits, and files that cannot be read."""

import os
from pathlib import Path

import pytest
import torch

from sparsity import InputError
from sparsity.data import Text, TinyShakespeare
from sparsity.data.text import Windows

REAL = Path(os.environ.get("SPARSITY_DATA", "/nowhere")) / "tinyshakespeare"


def write(path: Path, contents: str | bytes) -> str:
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return str(path)


def test_windows_are_followed_by_the_next_bytes() -> None:
    windows = Windows(torch.arange(20, dtype=torch.uint8), context=6)
    assert len(windows) == 3
    assert [window.tolist() for window in windows[1]] == [[6, 7, 8, 9, 10, 11], [7, 8, 9, 10, 11, 12]]
    assert windows[2][1][-1] == 18
    assert len(Windows(torch.arange(19, dtype=torch.uint8), context=6)) == 3
    assert len(Windows(torch.arange(18, dtype=torch.uint8), context=6)) == 2


def test_shifted_windows_start_anywhere_and_stay_inside() -> None:
    windows = Windows(torch.arange(25, dtype=torch.uint8), context=6, shifts=True)
    starts = {int(windows[index][0][0]) for index in range(len(windows)) for _ in range(200)}
    assert starts == set(range(18))
    for _ in range(100):
        window, following = windows[len(windows) - 1]
        assert torch.equal(window[1:], following[:-1])


def test_splits_are_consecutive_parts_of_the_text(tmp_path: Path) -> None:
    text = "".join(chr(33 + index % 90) for index in range(1000))
    data = Text(write(tmp_path / "a.txt", text), context=10, batch_size=4, validation=0.2, test=0.1)
    data.setup()
    parts = [bytes(data.splits[name].tolist()).decode() for name in ("train", "validation", "test")]
    assert "".join(parts) == text
    assert [len(part) for part in parts] == [700, 200, 100]
    batch = next(iter(data.val_dataloader()))
    assert [each.shape for each in batch] == [(4, 10), (4, 10)]
    assert batch[0].dtype == torch.int64
    assert bytes(batch[0][0].tolist()).decode() == parts[1][:10]


def test_evaluation_is_the_same_and_training_is_not(tmp_path: Path) -> None:
    data = Text(write(tmp_path / "a.txt", "abcdefghij" * 100), context=10)
    data.setup()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data.test_dataloader(), data.test_dataloader(), strict=True))
    torch.manual_seed(0)
    first = next(iter(data.train_dataloader()))[0]
    assert not torch.equal(first, next(iter(data.train_dataloader()))[0])
    torch.manual_seed(0)
    assert torch.equal(first, next(iter(data.train_dataloader()))[0])


def test_characters_beyond_ascii_are_bytes(tmp_path: Path) -> None:
    data = Text(write(tmp_path / "a.txt", "Größe ✓ " * 50), context=8)
    data.setup()
    assert int(data.splits["train"].max()) > 127


def test_the_standard_library_is_always_there() -> None:
    data = Text()
    data.setup()
    assert sum(map(len, data.splits.values())) > 500_000
    assert b"def " in bytes(data.splits["train"].tolist())


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = write(tmp_path / "latin.txt", "Größe".encode("latin-1") * 200)
    with pytest.raises(InputError, match=r"latin.txt' is not UTF-8: byte 0xf6 at 2 .*iconv"):
        Text(latin).setup()
    with pytest.raises(InputError, match=r"no text file at '.*nothing.txt'"):
        Text(str(tmp_path / "nothing.txt")).setup()
    with pytest.raises(InputError, match=r"the text has 100 bytes, its shortest part 10: .*context=64 wants 129"):
        Text(write(tmp_path / "short.txt", "a" * 100), context=64).setup()
    with pytest.raises(InputError, match=r"no text file at '.*input.txt'"):
        TinyShakespeare(str(tmp_path)).setup()
    with pytest.raises(InputError, match="validation and test must be above 0"):
        Text(validation=0.5, test=0.5)
    with pytest.raises(InputError, match="context and batch_size must be at least 1"):
        Text(context=0)
    with pytest.raises(InputError, match="Text holds no text yet"):
        Text().train_dataloader()


def test_shakespeare_from_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "input.txt", "To be, or not to be. " * 300)
    data = TinyShakespeare(str(tmp_path), context=16)
    data.prepare_data()
    data.setup()
    assert bytes(data.splits["train"][:5].tolist()) == b"To be"


@pytest.mark.skipif(not REAL.is_dir(), reason="SPARSITY_DATA names no folder with tinyshakespeare")
def test_the_real_text_is_all_there() -> None:
    data = TinyShakespeare(str(REAL))
    data.setup()
    assert sum(map(len, data.splits.values())) == 1_115_394
    assert len(set(torch.cat(list(data.splits.values())).tolist())) == 65
