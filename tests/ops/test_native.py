"""The C++ is compiled once, kept, and done without where it cannot be had."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsity.ops import compressed, kth_largest, native, product, select, sparse_linear


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def works(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would run in C++ gives its results."""
    monkeypatch.setattr(product, "WORK", 0)
    monkeypatch.setattr(select, "LARGE", 0)
    weight, x = torch.eye(3), torch.randn(2, 3)
    assert torch.equal(sparse_linear(x, *compressed(weight)), x)
    assert float(kth_largest([torch.arange(5.0)], 2)) == 3.0


@pytest.mark.parametrize(("name", "value", "says"), [
    ("SPARSITY_NATIVE", "0", "SPARSITY_NATIVE=0"),
    ("CXX", "no-such-compiler", "no C++ could be compiled"),
    ("CXX", "false", "no C++ could be compiled"),
    ("XDG_CACHE_HOME", "/proc/none", "no C++ could be compiled"),
])  # fmt: skip
def test_without_it_plain_torch_does_the_same(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        assert native.library("linear") is None
        works(monkeypatch)
    assert [says in each.message for each in caplog.records] == [True, True], "a line of each file says why"


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library("linear") is None:
        pytest.skip("no C++ compiler")
    native.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    works(monkeypatch)
    made = {each: each.stat().st_mtime_ns for each in (tmp_path / "lightning-sparsity").iterdir()}
    assert len(made) == 2, "one of each file that was used"
    code = "from sparsity.ops import native; assert native.library('linear') and native.library('select')"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    assert {each: each.stat().st_mtime_ns for each in (tmp_path / "lightning-sparsity").iterdir()} == made


def test_what_is_damaged_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.library("linear") is None:
        pytest.skip("no C++ compiler")
    made = native._compiled("linear")
    native.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lightning-sparsity").mkdir()
    (tmp_path / "lightning-sparsity" / made.name).write_bytes(made.read_bytes()[:100])
    with caplog.at_level(logging.INFO):
        works(monkeypatch)
    assert "no C++ could be compiled" in caplog.text
