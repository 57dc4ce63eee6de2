"""What the embedded engine costs beside the training of its clients, and what the codec of masks does.

    python -m benchmarks.federation                # rows of Flower and of pfl where these are installed

Engine: a network of 19,340 parameters, two steps of plain SGD for each client, one process of one thread; `bare` is a
plain loop with the same steps that copies the global weights in and adds the client's up. Flower has two actors.
Memory is the highest of all processes, of 1,000 clients with 100 in a round. The codec's masks are random.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import FedSGC, StaticMask
from sparsity.congruent import Congruity
from sparsity.federated import Federation, Local, Protocol, Running, bits, simulation
from sparsity.federated.coordinator import Coordinator
from sparsity.federated.engine import Engine
from sparsity.federated.site import Site
from sparsity.federated.source import Source
from sparsity.schedules import CosineDrop

RESULTS = Path(__file__).parent / "results"
CLIENTS, SAMPLES, BATCH = 200, 32, 16


class Points(TensorDataset):
    """Indexed a whole batch at a time."""

    def __getitems__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(places)
        return self.tensors[0][rows], self.tensors[1][rows]


class Data(pl.LightningDataModule):
    """Random points of 64 coordinates in 10 classes, 32 for each client."""

    def __init__(self, clients: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(clients * SAMPLES, 64, generator=generator)
        self.y = torch.randint(0, 10, (clients * SAMPLES,), generator=generator)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Points(self.x, self.y), BATCH, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 30), nn.ReLU(), nn.Linear(30, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


METHODS: dict[str, Callable[[], Any]] = {
    "dense": lambda: None,
    "StaticMask, 80 %": lambda: StaticMask(0.8),
    "FedSGC, 80 %, masks move in every round": lambda: FedSGC(0.8, Congruity(0.4), CosineDrop(0.1, 1, 1.0)),
}


def fastest(step: Callable[[], object], repeats: int = 10) -> float:
    step(), step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def engine(method: Any, clients: int = CLIENTS) -> Engine:
    data = Data(clients)
    source = Source(data, torch.device("cpu"))
    site = Site(Net(), method.sparsifier if method else None, 1000, 1)
    epochs = 2 if method and "FedSGC" in type(method).__name__ else 1  # masks move after the first
    return Engine(Coordinator(site, source, Federation(clients, clients, 1000), Protocol(Local(epochs)), 1))


def bare(clients: int = CLIENTS, epochs: int = 1) -> Callable[[], None]:
    data, model = Data(clients), Net()
    weights: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.SGD(weights, 0.1)
    begun = [weight.detach().clone() for weight in weights]
    parts = torch.split(torch.arange(len(data.y)), SAMPLES)

    def round_() -> None:
        sums = [torch.zeros_like(weight) for weight in begun]
        for part in parts:
            with torch.no_grad():
                torch._foreach_copy_(weights, begun)
            for _ in range(epochs):
                for places in torch.split(part[torch.randperm(len(part))], BATCH):
                    model.training_step((data.x[places], data.y[places])).backward()  # type: ignore[no-untyped-call]  # torch's
                    optimizer.step()
                    optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_add_(sums, weights, alpha=SAMPLES)

    return round_


def flower(clients: int = CLIENTS) -> float | None:
    """Seconds of a round after the first ones, with two actors."""
    if not find_spec("flwr"):
        return None
    from sparsity.federated.flower import simulate

    outcome = simulate(Net(), Data(clients), None, Federation(clients, clients, 6), Protocol(Local(1)), Running(2))
    return float(min(row["seconds"] for row in outcome.rows[2:]))


def pfl(clients: int = CLIENTS) -> float | None:
    """Seconds of a round of pfl-research, which encodes nothing, in this process."""
    if not find_spec("pfl"):
        return None
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net

        def loss(self, x: Tensor, y: Tensor, is_eval: bool = False) -> Tensor:
            return nn.functional.cross_entropy(self.net(x), y)

        def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {}

    times = [time.perf_counter()]

    class Clock(TrainingProcessCallback):  # type: ignore[misc]  # pfl has no types here
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            times.append(time.perf_counter())
            return False, Metrics()

    data, module = Data(clients), Module()
    parts = torch.split(torch.arange(len(data.y)), SAMPLES)
    users = {client: (data.x[part], data.y[part]) for client, part in enumerate(parts)}
    federated = FederatedDataset(lambda user: PyTorchTensorDataset(users[user]), MinimizeReuseUserSampler(list(users)))
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), 1.0))
    rounds = NNAlgorithmParams(
        central_num_iterations=12, evaluation_frequency=1000, train_cohort_size=clients, val_cohort_size=0
    )
    local = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.1, local_batch_size=BATCH)
    backend = SimulatedBackend(training_data=federated, val_data=federated)
    FederatedAveraging().run(
        rounds, backend, model, local, NNEvalHyperParams(local_batch_size=None), [Clock()],
        send_metrics_to_platform=False,
    )  # fmt: skip
    return min(after - before for before, after in itertools.pairwise(times[2:]))


def memory() -> float:
    """GB at most in a process of its own: 1,000 clients, 100 in a round, FedSGC."""
    code = "from benchmarks.federation import many; many()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout.split()[-1])


def many() -> None:
    method = FedSGC(0.8, Congruity(0.4), CosineDrop(0.1, 2, 1.0))
    simulation.simulate(Net(), Data(1000), method, Federation(1000, 100, 20), Protocol(Local(2)), seed=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def codec(density: float, size: int = 1_000_000) -> dict[str, Any]:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(0)) < density
    data = bits.encode(mask)
    bound = bits.entropy_bound(mask)
    encoding = fastest(lambda: bits.encode(mask), 5)
    decoding = fastest(lambda: bits.decode(data, (size,)), 5)
    # Of the mask as bools, which is what goes in and comes out.
    return {
        "density": density, "bytes": len(data), "over_bound": round(len(data) / bound - 1, 4),
        "encode_mb_per_s": round(size / encoding / 1e6), "decode_mb_per_s": round(size / decoding / 1e6),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, make in METHODS.items():
        method = make()
        epochs = 2 if name.startswith("FedSGC") else 1
        # Both in turn, so that they see the same machine.
        running, plain = engine(method), bare(epochs=epochs)
        ours, theirs = fastest(running.round), fastest(plain)
        rows.append({
            "method": name, "ms_per_client": round(1e3 * ours / CLIENTS, 3),
            "bare_ms_per_client": round(1e3 * theirs / CLIENTS, 3),
            "overhead_ms": round(1e3 * (ours - theirs) / CLIENTS, 3),
        })  # fmt: skip
    for name, seconds, processes in (("dense, pfl 0.6", pfl(), 1), ("dense, over Flower's Ray engine", flower(), 2)):
        if seconds:
            plain_seconds = fastest(bare())
            rows.append({
                "method": name, "ms_per_client": round(1e3 * seconds / CLIENTS, 3),
                "bare_ms_per_client": round(1e3 * plain_seconds / CLIENTS, 3),
                "overhead_ms": round(1e3 * (seconds - plain_seconds / processes) / CLIENTS, 3),
            })  # fmt: skip
    result = {
        "torch": torch.__version__, "clients": CLIENTS, "engine": rows, "memory_gb_1000_clients": memory(),
        "codec": [codec(density) for density in (0.05, 0.1, 0.2, 0.5)],
    }  # fmt: skip
    (RESULTS / "federation.json").write_text(json.dumps(result, indent=1) + "\n")
    for found in (rows, result["codec"]):
        view = Table(*map(str, found[0]))  # type: ignore[index]  # a list of rows
        for row in found:  # type: ignore[attr-defined]
            view.add_row(*map(str, row.values()))
        Console().print(view)
    print(f"1,000 clients, 100 in a round: {result['memory_gb_1000_clients']:.2f} GB")


if __name__ == "__main__":
    main()
