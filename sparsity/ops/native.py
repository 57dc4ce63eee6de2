"""Native: the C++ of this package, each file of it compiled for this machine at its first use.

Without a compiler, plain PyTorch does the same. `CXX` names another compiler, `SPARSITY_NATIVE=0` does without any.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

SOURCES = Path(__file__).with_name("cpu")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
THREADED = "-fopenmp"  # left out where a compiler does not have it

log = logging.getLogger(__name__)


@cache
def library(source: str) -> ctypes.CDLL | None:
    """The library of this file, such as "linear"; None where there is none, of which one line of the log says why."""
    if os.environ.get("SPARSITY_NATIVE") == "0":
        log.info("SPARSITY_NATIVE=0: %s runs in plain PyTorch", source)
        return None
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        log.info("no C++ could be compiled: %s runs in plain PyTorch, which is slower: %s", source, error)
        return None


def at(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's memory begins."""
    return ctypes.c_void_p(tensor.data_ptr())


def _compiled(source: str) -> Path:
    """The library's file in the user's cache: made where it is not there yet, in one piece."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        raise OSError("no compiler was found (c++, g++, clang++; CXX names another)")
    compiler = shlex.split(found)
    code = SOURCES / f"{source}.cpp"
    parts = [part.read_bytes() for part in [code, *sorted(SOURCES.glob("*.h"))]]
    name = hashlib.sha256(b"\0".join([*parts, _made_for(compiler)])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-sparsity"
    target = folder / f"{name[:32]}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / target.name
            command = [*compiler, *FLAGS, str(code), "-o", str(made)]
            if subprocess.run([*command, THREADED], capture_output=True).returncode:
                subprocess.run(command, capture_output=True, check=True)
            made.replace(target)
    return target


def _made_for(compiler: list[str]) -> bytes:
    """What else decides about the code: flags, compiler, and the processor, of which homes on a network have many."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return "\0".join([*FLAGS, THREADED, version.decode(errors="replace"), platform.machine(), features]).encode()
