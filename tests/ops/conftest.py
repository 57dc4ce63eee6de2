"""Both ways of every operation that has two: by its definition, and in C++; and kernels for GPUs without a GPU."""

import os
from typing import Any

import pytest
import torch

from sparsity.ops import cuda, native, product, select, sums

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where kernels are imported, at their first use


@pytest.fixture(params=["plain", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs by the definition and, for tensors of any size, in C++."""
    if request.param == "native" and native.library("linear") is None:
        pytest.skip("no C++ compiler")
    least = 0 if request.param == "native" else 1 << 60
    monkeypatch.setattr(product, "WORK", least)
    monkeypatch.setattr(select, "LARGE", least)
    monkeypatch.setattr(sums, "LEAST", least)
    return str(request.param)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels in Triton run: on a GPU or, without one, on the CPU in Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    # The interpreter computes with the bits of bfloat16 as if they were integers.
    given = (torch.float16, torch.float32)
    monkeypatch.setattr(cuda, "serves", lambda tensor: tensor.dtype in given and tensor.numel() > 0)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return torch.device("cpu")


def poisoned(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
    """`new_empty`, of numbers that nobody may read."""
    found: torch.Tensor = torch.empty(*shape, **{"dtype": self.dtype, "device": self.device, **options})
    return found.fill_(torch.nan if found.is_floating_point() else -(1 << 6))
