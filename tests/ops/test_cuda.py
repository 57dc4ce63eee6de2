"""Kernels for GPUs are used where they can be, and done without elsewhere; all compile for GPUs that are not here."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from sparsity.ops import cuda


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda._available.cache_clear()


@pytest.mark.parametrize(("capability", "missing", "says"), [
    ((7, 5), False, "GPU 0 is older than compute capability 8.0"), ((9, 0), True, "Triton cannot be used"),
])  # fmt: skip
def test_without_them_one_line_says_why(
    capability: tuple[int, int], missing: bool, says: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if missing:
        monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.INFO):
        assert not cuda._available(0)
        assert not cuda._available(0)
    assert [says in each.message for each in caplog.records] == [True]


def test_tensors_that_are_not_on_a_gpu_are_left_alone() -> None:
    assert not cuda.serves(torch.ones(3))


@pytest.mark.parametrize("capability", ["80", "90"])
def test_all_kernels_compile(capability: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.compiled", capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12
    most = {"80": 163 << 10, "90": 227 << 10}[capability]  # what an A100 and an H100 have for one program
    assert all(int(shared) <= most for _, shared, _ in lines)
    products = {"_product_kernel", "_values_kernel", "_linear_kernel"}
    assert all((tensor_cores == "True") == (name in products) for name, _, tensor_cores in lines)
