"""Both ways of every operation that has two: by its definition, and in C++."""

import pytest

from sparsity.ops import linear, native, select


@pytest.fixture(params=["plain", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs by the definition and, for tensors of any size, in C++."""
    if request.param == "native" and native.library() is None:
        pytest.skip("no C++ compiler")
    least = 0 if request.param == "native" else 1 << 60
    monkeypatch.setattr(linear, "WORK", least)
    monkeypatch.setattr(select, "LARGE", least)
    return str(request.param)
