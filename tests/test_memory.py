"""Freed memory is kept: it stays in the heap, where the next tensor finds it."""

import os
import platform
import subprocess
import sys

import pytest

HEAP = """
import sys
import torch
from sparsity import memory

kept = memory.keep_freed() if "keep" in sys.argv else None

def heap():
    [line] = [line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")]
    return [int(end, 16) for end in line.split()[0].split("-")]

tensors = [torch.ones(6_500_000) for _ in range(3)]
begin, end = heap()
inside = all(begin <= tensor.data_ptr() < end for tensor in tensors)
del tensors
print(kept, inside, heap()[1] == end)
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def run(*words: str, **more: str) -> list[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", HEAP, *words], env=plain | more, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@on_glibc
def test_freed_tensors_stay_in_the_heap() -> None:
    assert run("keep") == ["True", "True", "True"]
    assert run()[:2] == ["None", "False"]  # pages of their own, gone with them


@on_glibc
@pytest.mark.parametrize("setting", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_settings_of_the_environment_are_left_alone(setting: dict[str, str]) -> None:
    assert run("keep", **setting)[:2] == ["False", "False"]
