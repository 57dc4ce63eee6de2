"""The engine: a federation on one machine, in this process or a few, with all that is sent as real bytes."""

import time
from typing import Any

import torch
from torch import Tensor

from sparsity import masks
from sparsity.congruent import Congruent
from sparsity.constant import Kept
from sparsity.dynamic import Dynamic
from sparsity.errors import InputError
from sparsity.federated.client import Local, Task, client_update
from sparsity.federated.crew import Crew
from sparsity.federated.federation import Federation, fingerprint, seed_of, share
from sparsity.federated.partition import Parts, labels_of
from sparsity.federated.payload import PRECISIONS
from sparsity.federated.scouting import fixed, scouted
from sparsity.federated.server import FedAvg, Sums, Update, server_step
from sparsity.federated.site import Site, Source
from sparsity.federated.state import State
from sparsity.federated.tolerance import Tolerance, refuse
from sparsity.federated.wire import Wire
from sparsity.importance import Importance
from sparsity.schedules import Constant, Horizon
from sparsity.sensitivity import Sensitivity
from sparsity.sparsifier import Sparsifier

Row = dict[str, Any]


class Protocol:
    """How the clients of a federation train, what the server does with it, and what is sent.

    Args:
        local: a client's training; `Local()` if not given.
        server: `FedAvg()` if not given.
        tolerance: for failures; `Tolerance()` if not given.
        precision: of weights on the wire: "float32", "float16" or "int8".
    """

    def __init__(
        self, local: Local | None = None, server: FedAvg | None = None, tolerance: Tolerance | None = None,
        precision: str = "float32",
    ) -> None:  # fmt: skip
        if precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.local, self.server = local or Local(), server or FedAvg()
        self.tolerance, self.precision = tolerance or Tolerance(), precision


class Engine:
    """The rounds of a federation, in one of the processes that share its clients.

    All processes hold the server's state and take its steps, each on the same sums; so nothing is broadcast.
    """

    def __init__(
        self, site: Site, source: Source, federation: Federation, protocol: Protocol, seed: int,
        crew: Crew | None = None,
    ) -> None:  # fmt: skip
        self.site, self.source, self.federation, self.protocol, self.seed = site, source, federation, protocol, seed
        self.crew = crew or Crew()
        self.method = site.sparsifier  # as it was asked for
        self.wire = Wire(site.layout, protocol.precision)
        labels = labels_of(source.dataset) if federation.partition.needs_labels else torch.zeros(len(source))
        self.parts: Parts = federation.partition(labels, federation.clients, seed)
        self.trained, self.held_out = federation.divide(self.parts, seed)
        self.samples = sum(map(len, self.trained))
        moves = site.sparsifier is not None and not isinstance(site.sparsifier, Sensitivity)
        self.plan = site.sparsifier.plan(Horizon(federation.rounds, 1)) if site.sparsifier and moves else {}
        self.state = State(site.layout.read(), site.mask)
        if protocol.server.controls:
            _check_plain(site)
            self.state.controls = {-1: torch.zeros(site.layout.size, dtype=torch.float64)}

    def about(self) -> dict[str, Any]:
        """What a saved state has to have been made with."""
        sparsifier, layout = self.method, self.site.layout
        return {
            "seed": self.seed, "clients": self.federation.clients, "per_round": self.federation.per_round,
            "rounds": self.federation.rounds, "partition": fingerprint(self.trained),
            "model": {name: list(each.shape) for name, each in layout.tensors.items()},
            "method": type(sparsifier).__name__, "sparsity": sparsifier.sparsity if sparsifier else 0.0,
            "server": type(self.protocol.server).__name__, "precision": self.protocol.precision,
        }  # fmt: skip

    def scout(self) -> None:
        """Lets scouts find the densities of the layers, unless they have, and goes on with fixed masks of these."""
        method, begun = self.site.sparsifier, self.state.scouting
        assert isinstance(method, Sensitivity)
        about = begun or scouted(self.site, self.source, self.trained, self.seed, self.crew)
        self.site.attach(fixed(method, about["densities"]))
        if not begun:
            self.state.values, self.state.mask = self.site.layout.read(), self.site.mask
            self.state.scouting = about

    def round(self) -> Row:
        """One round: the state becomes the next one, and what happened is returned."""
        start, before = time.perf_counter(), self.state
        chosen = self.federation.chosen(before.round, self.seed)
        updates: list[tuple[int, Update]] = []
        sums, notes = Sums(self.site.layout, self._more()), []
        cache: dict[int, tuple[int, Task]] = {}
        for client in share(chosen, self.trained, self.crew.count)[self.crew.rank]:
            note, update = self._client(client, cache)
            notes.append(note)
            if update is not None:
                sums.add(update)
                if self._keeps(update):
                    updates.append((client, update))
        self.crew.add(sums.tensors())
        notes = sorted(self.crew.gather(notes), key=lambda note: note["client"])
        updates = sorted(self.crew.gather(updates), key=lambda each: each[0])
        if before.round == 0:
            _check_first(notes)
        if sums.clients < self.protocol.tolerance.quorum:
            sums, updates = Sums(self.site.layout, self._more()), []
        self.state = self._next(sums, updates, chosen)
        row = _row(before.round, notes, self.state, sums, 4 * self.site.layout.size)
        row["seconds"] = round(time.perf_counter() - start, 3)
        self.state.rows = [*before.rows, row]
        return row

    def evaluate(self, stage: str = "validation") -> dict[str, float]:
        """What the module measures on the validation or the test split with the global model."""
        self.site.layout.write(self.state.values)
        return self.site.evaluate(self.source.evaluation(stage), stage)

    def evaluate_clients(self) -> list[dict[str, float]]:
        """The same on what each client has held out."""
        self.site.layout.write(self.state.values)
        return [self.site.evaluate(self.source.batches(held), "validation") for held in self.held_out if len(held)]

    def _client(self, client: int, cache: dict[int, tuple[int, Task]]) -> tuple[Row, Update | None]:
        """Sends the task to a client, lets it train, and looks at what comes back."""
        tolerance = self.protocol.tolerance
        length, task = self._task(client, cache)
        note: Row = {"client": client, "down": length, "up": 0, "bound": 0.0, "failure": None}
        seed = seed_of(self.seed, self.state.round, client)
        try:
            if tolerance.drops(seed):
                raise Dropped("did not answer")
            update = client_update(
                self.site, task, self.source, self.trained[client], seed, self.protocol.local, tolerance.timeout
            )
            messages = self.wire.answer(update, task)
            note["up"] = sum(map(len, messages))
            note["bound"] = self.wire.bound(update.mask, task.mask)
            update = self.wire.read(messages, task, self._more())
            refuse(update, self.site.layout, self._more())
            return note, tolerance.clipped(update, self.state.values)
        except Exception as error:  # whatever it is, the round goes on without this client, and says why
            note["failure"] = f"{type(error).__name__}: {error}"
            return note, None

    def _task(self, client: int, cache: dict[int, tuple[int, Task]]) -> tuple[int, Task]:
        """What a client gets, and its length; made once for all that know the same mask."""
        state, moves = self.state, self.state.round in self.plan and self.state.round > 0
        version = state.known.get(client, -1)
        known = state.versions.get(version)
        server = state.controls.get(-1)
        if version not in cache:
            directed = moves and isinstance(self.site.sparsifier, Congruent) and bool(state.directions.any())
            controls = None if server is None else (server, server)
            sent = Task(state.values, state.mask, state.round, moves, state.directions if directed else None, controls)
            messages = self.wire.send(sent, known)
            cache[version] = (sum(map(len, messages)), self.wire.receive(messages, sent, known))
        length, task = cache[version]
        if server is None or task.controls is None:
            return length, task
        own = state.controls.get(client, torch.zeros_like(server))
        return length, Task(task.values, task.mask, task.number, moves, task.directions, (task.controls[0], own))

    def _more(self) -> dict[str, int]:
        """The further vectors of this round's updates, and their sizes."""
        found = {"controls": self.site.layout.size} if self.protocol.server.controls else {}
        if isinstance(self.site.sparsifier, Importance) and self.state.round in self.plan and self.state.round > 0:
            found["squares"] = self.site.layout.masked
        return found

    def _keeps(self, update: Update) -> bool:
        return self.protocol.server.gathers or "controls" in update.more

    def _next(self, sums: Sums, updates: list[tuple[int, Update]], chosen: list[int]) -> State:
        before, server, layout = self.state, self.protocol.server, self.site.layout
        after = server_step(before, sums, server, layout, self.samples, [update for _, update in updates])
        if isinstance(self.site.sparsifier, Congruent) and self.site.sparsifier.congruity.remembers:
            after.directions = torch.where(after.directions != 0, after.directions, before.directions)
        if server.controls:
            after.controls = self._controls(sums, updates)
        self._renew(after, sums, before.round)
        after.know(chosen, before)
        return after

    def _controls(self, sums: Sums, updates: list[tuple[int, Update]]) -> dict[int, Tensor]:
        found = dict(self.state.controls)
        found[-1] = found[-1] + sums.more["controls"].value() / self.federation.clients
        for client, update in updates:
            found[client] = found.get(client, torch.zeros_like(found[-1])) + update.more["controls"]
        return found

    def _renew(self, after: State, sums: Sums, number: int) -> None:
        """Renews the masks that the server finds, where they are due after this round."""
        sparsifier, layout = self.site.sparsifier, self.site.layout
        if sparsifier is None or number not in self.plan or number == 0 or sums.clients == 0:
            return
        if isinstance(sparsifier, Dynamic) and not isinstance(sparsifier, Importance):
            return
        layout.write(after.values)
        sparsifier.adopt(_placed(layout.masks(after.mask), layout.tensors), number - 1)
        if isinstance(sparsifier, Importance):
            sparsifier.collects = False
            sparsifier.squares = layout.masks(sums.more["squares"].value())
        sparsifier.update(number)
        after.mask, after.values = self.site.mask, layout.read()


class Dropped(Exception):
    """A client did not answer."""


def _check_first(notes: list[Row]) -> None:
    """Raises `InputError` where every client has failed for one reason: the code, rather than a client, is wrong."""
    reasons = {note["failure"] for note in notes}
    if len(reasons) == 1 and None not in reasons and not next(iter(reasons)).startswith("Dropped"):
        raise InputError(f"all {len(notes)} clients of the first round failed: {reasons.pop()}")


def _row(number: int, notes: list[Row], after: State, sums: Sums, dense: int) -> Row:
    failed = {str(note["client"]): note["failure"] for note in notes if note["failure"]}
    return {
        "round": number, "accuracy": None, "clients": sums.clients, "failures": len(failed), "reasons": failed,
        "bytes_down": sum(note["down"] for note in notes), "bytes_up": sum(note["up"] for note in notes),
        "bytes_dense": dense * (len(notes) + sum(note["up"] > 0 for note in notes)),
        "mask_bound_up": round(sum(note["bound"] for note in notes)),
        "density": int(after.mask.count_nonzero()) / len(after.mask) if len(after.mask) else 1.0,
    }  # fmt: skip


def _placed(found: masks.Masks, weights: dict[str, Tensor]) -> masks.Masks:
    return {name: mask.to(weights[name].device) for name, mask in found.items()}


def _check_plain(site: Site) -> None:
    """Raises `InputError` unless a client's path is the sum of its gradients times their rates."""
    optimizer = site.optimizer
    plain = not any(group.get("momentum") for group in optimizer.param_groups)
    if type(optimizer) is not torch.optim.SGD or not plain:
        raise InputError(
            "SCAFFOLD takes gradients from how far a client has walked, so its optimizer has to be SGD without "
            f"momentum, got {type(optimizer).__name__} with {optimizer.defaults}"
        )


def check(sparsifier: Sparsifier) -> None:
    """Raises `InputError` for a method that keeps more than weights and masks, which a federation does not send."""
    if type(sparsifier) in (Sparsifier, Kept) and not sparsifier.score.needs_gradient:
        return
    if not isinstance(sparsifier, Dynamic):
        raise InputError(
            f"{type(sparsifier).__name__} finds its masks by more than weights and gradients, which clients do not "
            "share: take FedSGC, FedDST, PruneFL, RigL, SET, StaticMask, ConstantMask, GMP or LAMP"
        )
    if isinstance(sparsifier, Sensitivity):
        return  # its masks move before the first round only
    if sparsifier.regrowth.redistribution.score is not None or type(sparsifier.schedule) is not Constant:
        raise InputError(
            "the weights of each layer have to stay as many when clients move them: take a method that neither "
            "redistributes them nor prunes on, such as FedDST, RigL or SET"
        )
