"""Crew: processes that share the clients of each round."""

import multiprocessing
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsity.errors import InputError

Result = TypeVar("Result")
PATIENCE = timedelta(hours=2)  # the longest that one worker may wait for another


class Crew:
    """This process's place among the others.

    Their group is not torch's default one: metrics of the user's module would take it for training in parallel, and
    wait for the others in an evaluation.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Path | None = None) -> None:
        self.rank, self.count = rank, count
        if store is not None:
            file = torch._C._distributed_c10d.FileStore(str(store), count)
            self._group: Any = dist.ProcessGroupGloo(file, rank, count, PATIENCE)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Adds tensors of integers up over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                self._group.allreduce([tensor]).wait()

    def gather(self, mine: list[Any]) -> list[Any]:
        """All processes' lists, one after the other."""
        if self.count == 1:
            return mine
        data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        lengths = torch.zeros(self.count, dtype=torch.int64)
        lengths[self.rank] = len(data)
        self.add([lengths])
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in range(self.count)]
        self._group.allgather([found], [padded]).wait()
        parts = zip(found, lengths.tolist(), strict=True)
        # Pickled by this program's own processes, which are forks of one.
        return [each for part, length in parts for each in pickle.loads(part[:length].numpy().tobytes())]


def run(count: int, body: Callable[[Crew], Result]) -> Result:
    """Runs `body` in so many processes, of which this is the first, and returns what it returns here.

    One thread each: sums inside of an operation come out differently with more. Raises `InputError` where one dies.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return body(Crew()) if count == 1 else _run(count, body)
    finally:
        torch.set_num_threads(threads)


def _run(count: int, body: Callable[[Crew], Result]) -> Result:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
        raise InputError(
            f"workers={count} are forked, which a GPU in use rules out: take workers=1, or leave the model on the CPU "
            "and give devices (Running(devices=['cuda:0']))"
        )
    # Forked, they need not pickle the user's model and data.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        others = [context.Process(target=_serve, args=(rank, count, store, body)) for rank in range(1, count)]
        for process in others:
            process.daemon = True
            process.start()
        try:
            return body(Crew(0, count, store))
        except RuntimeError as error:
            ended = {rank: process.exitcode for rank, process in enumerate(others, 1) if process.exitcode}
            if not ended:
                raise
            raise InputError(
                f"workers ended with exit codes {ended} (-9: killed, often for memory): the rounds before this one are "
                "saved, go on with resume"
            ) from error
        finally:
            for process in others:
                process.join(timeout=5)
                process.kill()


def _serve(rank: int, count: int, store: Path, body: Callable[[Crew], Any]) -> None:
    torch.set_num_threads(1)
    try:
        body(Crew(rank, count, store))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
