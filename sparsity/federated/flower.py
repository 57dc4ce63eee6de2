"""Flower carries the same federation beyond one machine, or over its Ray engine on one.

Needs the `federated` extra. Flower reports usage to its makers unless `FLWR_TELEMETRY_ENABLED` is 0; here it is off
unless that variable says otherwise.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import InputError
from sparsity.federated.client import Task, client_update, within
from sparsity.federated.coordinator import Coordinator, Protocol, Row, blank, check
from sparsity.federated.federation import Federation
from sparsity.federated.simulation import Outcome, Running, check_here, drive
from sparsity.federated.site import Site
from sparsity.federated.source import Source
from sparsity.sensitivity import Sensitivity

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
try:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise InputError('Flower is missing: pip install "lightning-sparsity[federated]"') from error

Build = Callable[[], tuple[Any, Any, Any]]
SECTION = "sparsity"  # of a message, and of what a client keeps
_HERE: dict[str, Coordinator] = {}  # what this process has built, by plan


class Plan:
    """A federation that every process can build for itself.

    Args:
        build: gives the Lightning module, the data module and the method (or None), each time the same. It is pickled
            with the apps, so it is a function of a module or a small object.
        federation: who takes part, as in a simulation.
        protocol: how clients train, as in a simulation.
        seed: of everything.
    """

    def __init__(self, build: Build, federation: Federation, protocol: Protocol, seed: int = 0) -> None:
        self.build, self.federation, self.protocol, self.seed = build, federation, protocol, seed
        self.key = uuid.uuid4().hex

    @classmethod
    def of(cls, recipe: Any) -> "Plan":
        """That of a recipe (`train.Recipe`): what it describes, with its federation, protocol and seed."""
        found = recipe.settings()
        federation, protocol = found["federation"] or Federation(), found["protocol"] or Protocol()
        return cls(recipe, federation, protocol, found["seed"])

    def here(self) -> Coordinator:
        """What this process needs of the federation, built once."""
        if self.key not in _HERE:
            torch.set_num_threads(1)  # as in the embedded engine: sums in an operation come out differently with more
            model, data, method = self.build()
            sparsifier = getattr(method, "sparsifier", method)
            if sparsifier is not None:
                check(sparsifier)
            if isinstance(sparsifier, Sensitivity):
                raise InputError("FLASH's scouts train in the embedded engine only: leave out engine=flower")
            source = Source(data, next(model.parameters()).device, model)
            site = Site(model, sparsifier, self.federation.rounds, self.seed)
            _HERE[self.key] = Coordinator(site, source, self.federation, self.protocol, self.seed)
        return _HERE[self.key]


def client_app(plan: Plan) -> ClientApp:
    """The app of a SuperNode, which is the client that its `partition-id` says."""
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def identify(message: Message, context: Context) -> Message:
        content = RecordDict({SECTION: ConfigRecord({"client": _client(context)})})
        return Message(content, reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({SECTION: _train(plan, message.content[SECTION], context)}), reply_to=message)

    return app


def server_app(
    plan: Plan, running: Running | None = None, on_round: Callable[[Row], None] | None = None,
    on_end: Callable[[Outcome], None] | None = None,
) -> ServerApp:  # fmt: skip
    """The app of a SuperLink: runs all rounds, saves its state after each, and hands its outcome to `on_end`."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        server = plan.here()
        outcome = drive(FlowerEngine(server, grid), running or Running(), on_round)
        if on_end is not None:
            on_end(outcome)

    return app


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
    """As `sparsity.federated.simulate`, with the same result, over Flower's Ray engine; `workers` are its actors."""
    from flwr.simulation import run_simulation

    running = running or Running()
    check_here(federation or Federation())
    plan = Plan(_Given(model, data, method), federation or Federation(), protocol or Protocol(), seed)
    ended: list[Outcome] = []
    processes = max(1, (os.cpu_count() or 1) // running.workers)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            plan.here()  # what cannot work is said here, in this thread
            run_simulation(
                server_app(plan, running, on_round, ended.append), client_app(plan), plan.federation.clients,
                backend_config={"client_resources": {"num_cpus": processes, "num_gpus": 0.0}},
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
        server = _HERE.pop(plan.key, None)
        if server is not None:
            server.site.close()
    if not ended:
        raise InputError("the federation ended before its last round: Flower's messages above say why")
    return ended[0]


class FlowerEngine:
    """The rounds of a federation whose clients are behind a grid."""

    first = True

    def __init__(self, server: Coordinator, grid: Grid) -> None:
        self.server, self.grid = server, grid
        self._nodes: dict[int, int] = {}

    def scout(self) -> None:
        """Scouts are not carried by Flower; a plan with any is refused before."""

    def round(self) -> Row:
        """One round: the state becomes the next one, and what happened is returned."""
        start, server = time.perf_counter(), self.server
        server.site.reach(server.number)
        sums, kept, notes, tasks = server.sums(), {}, {}, {}
        messages, asked = [], {}
        self._find(server.chosen())
        for client in server.chosen():
            sent, tasks[client] = server.outgoing(client)
            notes[client] = blank(client, sent) | {"failure": "Dropped: did not answer"}
            node = self._nodes.get(client)
            if node is not None and not server.protocol.tolerance.drops(server.seed_of(client)):
                asked[node] = client
                control = server.state.controls.get(client)
                content = RecordDict({SECTION: _written(sent, tasks[client], server.seed_of(client), control)})
                messages.append(Message(content, node, "train", group_id=str(server.number)))
        for reply in self.grid.send_and_receive(messages, timeout=server.protocol.tolerance.timeout):
            node = reply.metadata.src_node_id
            if node not in asked:
                continue
            client = asked.pop(node)
            if reply.has_error():  # the node may be gone, and its client come back as another one
                del self._nodes[client]
            update = self._read(client, reply, tasks[client], notes[client])
            if update is not None:
                sums.add(update)
                needed = server.kept(update)
                if needed is not None:
                    kept[client] = needed
        row = server.close(sums, dict(sorted(kept.items())), [notes[client] for client in sorted(notes)])
        row["seconds"] = round(time.perf_counter() - start, 3)
        return row

    def _read(self, client: int, reply: Message, task: Task, note: Row) -> Any:
        try:
            note["failure"] = str(reply.error.reason) if reply.has_error() else None
            answer = [] if reply.has_error() else list(reply.content[SECTION]["messages"])
            if not answer:
                note["failure"] = note["failure"] or str(reply.content[SECTION]["failure"])
                return None
            note["up"] = sum(map(len, answer))
            update = self.server.incoming(client, answer, task)
            note |= self.server.wire.weighed(answer, update.mask, task.mask)
            return update
        except Exception as error:  # whatever it is, the round goes on without this client, and says why
            note["failure"] = f"{type(error).__name__}: {error}"
            return None

    def _find(self, clients: list[int]) -> None:
        """Asks nodes, which have random numbers, which client each of them is; in the beginning waits for all."""
        if all(client in self._nodes for client in clients):
            return
        beginning, total = not self._nodes, self.server.federation.clients
        nodes = list(self.grid.get_node_ids())
        while beginning and len(nodes) < total:
            time.sleep(0.2)
            nodes = list(self.grid.get_node_ids())
        known = set(self._nodes.values())
        asked = [Message(RecordDict(), node, "query") for node in nodes if node not in known]
        patience = None if beginning else self.server.protocol.tolerance.timeout
        for reply in self.grid.send_and_receive(asked, timeout=patience):
            if not reply.has_error():
                self._nodes[int(reply.content[SECTION]["client"])] = reply.metadata.src_node_id
        missing = [client for client in clients if client not in self._nodes]
        if beginning and missing:
            raise InputError(f"of {len(nodes)} nodes none is client {missing[0]}: start one for each of {total}")


class _Given:
    """Builds what it was given, in each process a copy."""

    def __init__(self, model: Any, data: Any, method: Any) -> None:
        self.given = model, data, method

    def __call__(self) -> tuple[Any, Any, Any]:
        return self.given


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _indices(server: Coordinator, client: int) -> Tensor:
    """The samples of a client; raises `InputError` where this machine's own are not as many as the plan says."""
    indices, here = server.trained[client], len(server.source)
    if server.federation.partition.apart and here != len(indices):
        raise InputError(f"client {client} has {here} training samples, the plan says {len(indices)}: correct the plan")
    return indices


def _written(messages: list[bytes], task: Task, seed: int, control: Tensor | None = None) -> ConfigRecord:
    """What a client is sent; of its own control, which only it and the server have, the mark of the one that counts."""
    mark = b"" if control is None else _mark(control)
    found = {"messages": messages, "round": task.number, "moves": task.moves, "seed": seed, "control": mark}
    return ConfigRecord(found)


def _mark(control: Tensor) -> bytes:
    return hashlib.sha256(_bytes(control)).digest()[:16]


def _bytes(control: Tensor) -> bytes:
    found: bytes = control.float().numpy().tobytes()
    return found


def _control(mine: ConfigRecord, mark: bytes, size: int) -> Tensor:
    """A client's own control: the last one, or where the server has not counted that, the one before."""
    if not mark:
        return torch.zeros(size, dtype=torch.float64)
    for name in {"control", "before"} & set(mine):
        found = torch.frombuffer(bytearray(mine[name]), dtype=torch.float32)
        if _mark(found) == mark:
            return found
    raise InputError("this client's control is not the one that the server has counted: was its state lost?")


def _train(plan: Plan, sent: ConfigRecord, context: Context) -> ConfigRecord:
    """What a client answers; it keeps the mask that it was sent, and SCAFFOLD's control."""
    try:
        server, mine = plan.here(), context.state.get(SECTION, ConfigRecord())
        indices = _indices(server, _client(context))
        layout, wire = server.site.layout, server.wire
        zeros = torch.zeros(layout.size, dtype=torch.float64)
        own = _control(mine, sent["control"], layout.size)
        known = torch.frombuffer(bytearray(mine["mask"]), dtype=torch.bool) if "mask" in mine else None
        controls = (zeros, own) if plan.protocol.server.controls else None
        like = Task(zeros, torch.zeros(layout.masked).bool(), sent["round"], sent["moves"], None, controls)
        task = wire.receive(list(sent["messages"]), like, known)
        before = own
        if task.controls is not None:
            own = within(own, task.mask)
            task.controls = task.controls[0], own
        context.state[SECTION] = mine = ConfigRecord({**mine, "mask": task.mask.numpy().tobytes()})
        server.site.reach(task.number)
        local, tolerance = plan.protocol.local, plan.protocol.tolerance
        update = client_update(server.site, task, server.source, indices, sent["seed"], local, tolerance.timeout)
        answer = wire.answer(update, task)
        if controls is not None:  # as the server reads it
            read = wire.read(answer, task, {name: len(each) for name, each in update.more.items()})
            mine["before"], mine["control"] = _bytes(before), _bytes(own.float() + read.more["controls"])
        return ConfigRecord({"messages": answer, "failure": ""})
    except Exception as error:  # it is the server's to say what becomes of the round
        return ConfigRecord({"messages": [], "failure": f"{type(error).__name__}: {error}"})
