"""Freed memory is kept: tensors of the next step are not mapped page by page."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from sparsity import memory

kept = memory.keep_freed() if "keep" in sys.argv else None
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    [torch.ones(5_000_000) for _ in range(4)]
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **more: str) -> tuple[str, int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, *words], env=plain | more, capture_output=True, text=True, check=True
    )
    kept, count = run.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_mapped_once() -> None:
    told, plain = faults()
    assert told == "None"
    if plain < 400_000:
        pytest.skip(f"this system maps larger pages: {plain} of them for 50 times 80 MB")
    kept, count = faults("keep")
    assert kept == "True"
    assert count < plain / 4


@pytest.mark.parametrize("setting", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_settings_of_the_environment_are_left_alone(setting: dict[str, str]) -> None:
    assert faults("keep", **setting)[0] == "False"
