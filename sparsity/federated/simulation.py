"""A simulation: all rounds of a federation on this machine, saved after each, and what came of it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from typing import Protocol as Protocol_

import torch

from sparsity.errors import InputError
from sparsity.federated import crew, state
from sparsity.federated.chance import preserved
from sparsity.federated.coordinator import Coordinator, Protocol, Row, check
from sparsity.federated.crew import Crew
from sparsity.federated.engine import Engine
from sparsity.federated.federation import Federation
from sparsity.federated.partition import Parts
from sparsity.federated.site import Site
from sparsity.federated.source import Source, defines
from sparsity.federated.state import State
from sparsity.sensitivity import Sensitivity
from sparsity.sparsifier import Sparsifier

FILE = "federation.ckpt"


class Running:
    """How a simulation runs, none of which changes what comes out of it.

    Args:
        workers: processes that share the clients of a round, of one thread each.
        evaluate_every: rounds from one validation of the global model to the next; the last one is always validated.
        folder: where the state is saved after each round; nowhere if not given.
        resume: the folder of a run to go on from, its own or another.
        devices: where clients train, of which each worker takes one in turn; the model's own if not given. What they
            send is added up on the CPU. Flower's actors stay there.
    """

    def __init__(
        self, workers: int = 1, evaluate_every: int = 1, folder: str | Path | None = None,
        resume: str | Path | None = None, devices: Sequence[str | torch.device] = (),
    ) -> None:  # fmt: skip
        if workers < 1 or evaluate_every < 1:
            raise InputError(f"expected {workers=} and {evaluate_every=} of at least 1")
        if resume is not None and not (Path(resume) / FILE).is_file():
            raise InputError(f"there is no {FILE} in '{resume}' to go on from: give the folder of a run")
        self.workers, self.evaluate_every = workers, evaluate_every
        self.folder = None if folder is None else Path(folder)
        self.resume = None if resume is None else Path(resume)
        self.devices = [_known(device) for device in devices]

    def device_of(self, rank: int) -> torch.device | None:
        """Where this worker's clients train, None where the model is."""
        return self.devices[rank % len(self.devices)] if self.devices else None


class Outcome:
    """What a simulation ended with.

    state: the federation's. metrics: of the final model on the validation split and, read once, the test split.
    clients: those of what each client held out, by client. parts: who had which samples.
    """

    def __init__(
        self, state: State, metrics: dict[str, float], clients: dict[int, dict[str, float]], parts: Parts
    ) -> None:
        self.state, self.metrics, self.clients, self.parts = state, metrics, clients, parts

    @property
    def rows(self) -> list[Row]:
        """What happened in each round."""
        return self.state.rows


def simulate(
    model: Any,
    data: Any,
    method: Any = None,
    federation: Federation | None = None,
    protocol: Protocol | None = None,
    running: Running | None = None,
    *,
    seed: int = 0,
    on_round: Callable[[Row], None] | None = None,
) -> Outcome:
    """Trains a Lightning module over the clients of a federation; it ends with the global weights.

    `data` is a Lightning data module, whose training samples the clients share. `method` is a callback as in `fit`, or
    its sparsifier; None is dense. `on_round` is called after each round, and first for those of
    a run that goes on. The same seed gives the same result, to the
    last bit, for any number of workers, and when a run is resumed.

    Raises `InputError` for what cannot work, before the first round.
    """
    federation, protocol, running = federation or Federation(), protocol or Protocol(), running or Running()
    sparsifier: Sparsifier | None = getattr(method, "sparsifier", method)
    if sparsifier is not None:
        check(sparsifier)
    if seed < 0:
        raise InputError(f"expected {seed=} of at least 0")
    check_here(federation)

    # Before there are several processes: data are read once, and nothing is downloaded twice.
    source = Source(data, _device(model), model)

    def body(member: Crew) -> Outcome:
        # After the fork, as processes in which CUDA has begun cannot be forked.
        site = Site(model, sparsifier, federation.rounds, seed, running.device_of(member.rank))
        source.device = _device(model)
        try:
            return drive(Engine(Coordinator(site, source, federation, protocol, seed), member), running, on_round)
        finally:
            site.close()

    try:
        with preserved():
            return crew.run(running.workers, body)
    finally:
        source.close()


def check_here(federation: Federation) -> None:
    """Raises `InputError` where a simulation would need data that only its clients' machines have."""
    if federation.partition.apart:
        raise InputError(
            f"{type(federation.partition).__name__}: clients have data of their own, each on its own machine, so that "
            "none can simulate them; recipes/federated/FLOWER.md says how to run them over Flower"
        )


class Rounds(Protocol_):
    """What carries a federation: its server, whether this process speaks for it, and a round."""

    server: Coordinator
    first: bool

    def scout(self) -> None: ...

    def round(self) -> Row: ...


def drive(engine: Rounds, running: Running, on_round: Callable[[Row], None] | None = None) -> Outcome:
    """All rounds that are left of a federation, and what it ends with; the first process validates and saves."""
    server, rounds = engine.server, engine.server.federation.rounds
    if running.resume:
        server.state = state.load(running.resume / FILE, server.about())
    if isinstance(server.method, Sensitivity):
        engine.scout()
    if engine.first and server.state.rows:
        _measure_if_due(server, running)  # a run may have ended before it could
        if on_round:
            for row in server.state.rows:
                on_round(row)
    while server.number < rounds:
        row = engine.round()
        if not engine.first:
            continue
        _save(server, running)
        _measure_if_due(server, running)
        if on_round:
            on_round(row)
    _check_any(server.state.rows)
    return outcome(server) if engine.first else Outcome(server.state, {}, {}, [])


def _measure_if_due(server: Coordinator, running: Running) -> None:
    """Validates the state after the last round, where it is to be and is not yet, and saves what came of it."""
    due = server.number == server.federation.rounds or server.number % running.evaluate_every == 0
    measured = "metrics" in server.state.rows[-1]
    if due and not measured and server.source.has("validation") and defines(server.site.model, "validation_step"):
        measure(server, server.state.rows[-1])
        _save(server, running)


def _check_any(rows: list[Row]) -> None:
    """Raises `InputError` where every client has failed in every round: the model is as it was."""
    reasons = [reason for row in rows for reason in row["reasons"].values()]
    lost = any(reason.startswith(("Dropped", "Straggler")) for reason in reasons)  # as a `Tolerance` has it
    if reasons and not lost and not any(row["clients"] for row in rows):
        raise InputError(f"every client failed in every round, and nothing was trained: {reasons[-1]}")


def _save(server: Coordinator, running: Running) -> None:
    if running.folder:
        server.state.save(running.folder / FILE, server.about())


def measure(server: Coordinator, row: Row) -> None:
    """Adds what the global model is worth on the validation split to a round's row."""
    start = time.perf_counter()
    found = server.evaluate()
    row |= {"accuracy": next((value for name, value in found.items() if "acc" in name), None), "metrics": found}
    row["seconds_evaluating"] = round(time.perf_counter() - start, 3)


def outcome(server: Coordinator) -> Outcome:
    """The end of a federation: the model has the global weights, and the test split is read."""
    metrics = dict(server.state.rows[-1].get("metrics", {})) if server.state.rows else {}
    if server.source.has("test") and defines(server.site.model, "test_step"):
        metrics |= server.evaluate("test")
    clients = server.evaluate_clients() if defines(server.site.model, "validation_step") else {}
    server.site.layout.write(server.state.values)
    if server.method is not None:
        server.method.adopt(server.site.layout.masks(server.state.mask), server.number - 1)
    return Outcome(server.state, metrics, clients, server.parts)


def _known(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"expected devices such as 'cuda:1' or 'cpu', got '{device}'") from error
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if (found.index or 0) >= count:
        raise InputError(f"there is no device '{device}': torch finds {count} GPUs")
    return found


def _device(model: Any) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
