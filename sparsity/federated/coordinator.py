"""The coordinator: the server's side of a federation, whatever engine carries what it sends."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsity.congruent import Congruent
from sparsity.constant import Kept
from sparsity.dynamic import Dynamic
from sparsity.errors import InputError
from sparsity.federated.chance import seed_all
from sparsity.federated.client import Local, Task, within
from sparsity.federated.federation import Federation, fingerprint, seed_of
from sparsity.federated.identity import flat, plain, rule, settings
from sparsity.federated.partition import labels_of
from sparsity.federated.payload import PRECISIONS
from sparsity.federated.server import FedAvg, Sums, Update, server_step
from sparsity.federated.site import Site
from sparsity.federated.source import Source
from sparsity.federated.state import State
from sparsity.federated.tolerance import Tolerance, refuse
from sparsity.federated.wire import Messages, Wire
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


class Coordinator:
    """Who takes part, what each client is sent, what is made of the answers, and the state that comes of it.

    `site` is where the global model lives; in a simulation the clients train there, too.
    """

    def __init__(self, site: Site, source: Source, federation: Federation, protocol: Protocol, seed: int) -> None:
        self.site, self.source, self.federation, self.protocol, self.seed = site, source, federation, protocol, seed
        self.method = site.sparsifier  # as it was asked for
        self.wire = Wire(site.layout, protocol.precision)
        labels = labels_of(source.dataset) if federation.partition.needs_labels else torch.zeros(len(source))
        parts = federation.partition(labels, federation.clients, seed)
        self.own, self.parts = federation.reserve(parts, protocol.server.share, seed)
        self.trained, self.held_out = federation.divide(self.parts, seed)
        self.samples = sum(map(len, self.trained))
        moves = site.sparsifier is not None and not isinstance(site.sparsifier, Sensitivity)
        self.plan = site.sparsifier.plan(Horizon(federation.rounds, 1)) if site.sparsifier and moves else {}
        self.state = State(site.layout.read(), site.mask)
        self._sent: dict[int, tuple[Messages, Task]] = {}
        _check_congruity(site.sparsifier, protocol.local)
        _check_apart(federation, protocol.server)
        _check_quorum(federation, protocol.tolerance)
        if protocol.server.controls:
            _check_plain(site)
            self.state.controls = {-1: torch.zeros(site.layout.size, dtype=torch.float64)}

    def about(self) -> dict[str, Any]:
        """What a saved state has to have been made with."""
        sparsifier, layout, protocol = self.method, self.site.layout, self.protocol
        optimizer = {"class": type(self.site.optimizer).__name__, **plain(self.site.settings)}
        return flat({
            "seed": self.seed, "clients": self.federation.clients, "per_round": self.federation.per_round,
            "rounds": self.federation.rounds, "partition": fingerprint(self.trained), "precision": protocol.precision,
            "model": {name: list(each.shape) for name, each in layout.tensors.items()},
            "order": list(layout.tensors), "masked": layout.masked, "batch_size": self.source.batch_size,
            "method": rule(sparsifier), "plan": [[step, level] for step, level in self.plan.items()],
            "optimizer": optimizer, "schedule": self.site.schedule,
            **{name: settings(getattr(protocol, name)) for name in ("local", "server", "tolerance")},
        })  # fmt: skip

    @property
    def number(self) -> int:
        """The present round."""
        return self.state.round

    @property
    def moves(self) -> bool:
        """Whether masks move in this round, or what moves them is collected."""
        return self.number in self.plan and self.number > 0

    def chosen(self) -> list[int]:
        """Who takes part in this round, in ascending order."""
        return self.federation.chosen(self.number, self.seed)

    def seed_of(self, client: int) -> int:
        """Where all random numbers of a client in this round come from."""
        return seed_of(self.seed, self.number, client)

    def known(self, client: int) -> Tensor | None:
        """The mask that a client has, None where it has none."""
        return self.state.versions.get(self.state.known.get(client, -1))

    def outgoing(self, client: int) -> tuple[Messages, Task]:
        """What a client is sent, and what it reads in that; made once for all that have the same mask."""
        version, server = self.state.known.get(client, -1), self.state.controls.get(-1)
        if version not in self._sent:
            state, known = self.state, self.known(client)
            directed = self.moves and isinstance(self.site.sparsifier, Congruent) and bool(state.directions.any())
            controls = None if server is None else (server, server)
            directions = state.directions if directed else None
            task = Task(state.values, state.mask, self.number, self.moves, directions, controls)
            messages = self.wire.send(task, known)
            self._sent[version] = messages, self.wire.receive(messages, task, known)
        messages, task = self._sent[version]
        if server is None or task.controls is None:
            return messages, task
        own = within(self.state.controls.get(client, torch.zeros_like(server)), task.mask)
        return messages, Task(task.values, task.mask, task.number, task.moves, task.directions, (task.controls[0], own))

    def incoming(self, client: int, messages: Messages, task: Task) -> Update:
        """A client's answer; raises `InputError` for what cannot be trusted."""
        return self.accepted(client, self.wire.read(messages, task, self.more()))

    def accepted(self, client: int, update: Update) -> Update:
        """An update of this client, shortened where it is too long; raises `InputError` where it is refused."""
        refuse(update, self.site.layout, self.more(), len(self.trained[client]))
        return self.protocol.tolerance.clipped(update, self.state.values, self.site.layout)

    def more(self) -> dict[str, int]:
        """The further vectors of this round's updates, and their sizes."""
        found = {"controls": self.site.layout.size} if self.protocol.server.controls else {}
        if isinstance(self.site.sparsifier, Importance) and self.moves:
            found["squares"] = self.site.layout.masked
        return found

    def sums(self) -> Sums:
        """Empty sums for this round's updates."""
        return Sums(self.site.layout, self.more())

    def kept(self, update: Update) -> Update | None:
        """What is needed of an update beside its sum, None if nothing is."""
        if self.protocol.server.gathers:
            return update
        if "controls" not in update.more:
            return None
        return Update(update.values[:0], update.mask[:0], update.samples, {"controls": update.more["controls"]})

    def close(self, sums: Sums, updates: dict[int, Update], notes: list[Row]) -> Row:
        """Ends the round: the state is the next one, and what happened is returned. All processes of a crew do it.

        `updates` are those by client that are kept, in ascending order; `notes` say what each client has sent and got.
        """
        if self.number == 0:
            _check_first(notes)
        if sums.clients < self.protocol.tolerance.quorum:
            sums, updates = self.sums(), {}
        before, server, layout = self.state, self.protocol.server, self.site.layout
        after = server_step(before, sums, server, layout, self.samples, list(updates.values()), self._slopes)
        if isinstance(self.site.sparsifier, Congruent) and self.site.sparsifier.congruity.remembers:
            after.directions = torch.where(after.directions != 0, after.directions, before.directions)
        if server.controls:
            after.controls = self._controls(sums, updates)
        self._renew(after, sums)
        after.know([note["client"] for note in notes if not note["failure"]], before)
        for note in notes:
            if note["failure"]:  # it may have lost what it was sent: a whole mask the next time
                after.known.pop(note["client"], None)
        row = _row(self.number, notes, after, sums, layout.bytes)
        after.rows = [*before.rows, row]
        self.state, self._sent = after, {}
        return row

    def evaluate(self, stage: str = "validation") -> dict[str, float]:
        """What the module measures on the validation or the test split with the global model."""
        self.site.layout.write(self.state.values)
        return self.site.evaluate(self.source.evaluation(stage), stage)

    def evaluate_clients(self) -> dict[int, dict[str, float]]:
        """The same on what each client has held out, by client."""
        self.site.layout.write(self.state.values)
        held = {client: part for client, part in enumerate(self.held_out) if len(part)}
        return {c: self.site.evaluate([self.source.batches(part)], "validation") for c, part in held.items()}

    def _slopes(self, where: Callable[[], Tensor]) -> Iterator[Tensor]:
        """The slope of the loss at the values that `where` gives, for each batch of the server's own samples."""
        layout, model, seed = self.site.layout, self.site.model, self.seed_of(self.federation.clients)  # that of nobody
        seed_all(seed)
        self.site.begin()
        for number, batch in enumerate(self.source.batches(self.own, torch.Generator().manual_seed(seed))):
            layout.write(where())
            model.zero_grad()
            try:
                loss = self.site.loss(batch, number)
            except Exception as error:
                raise InputError(
                    f"{type(self.protocol.server).__name__} cannot learn by the {len(self.own)} samples of the server, "
                    f"in batches of {self.source.batch_size}: {type(error).__name__}: {error}"
                ) from error
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]  # torch's
                slopes = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in layout.tensors.items()}
                yield layout.join(slopes)
        model.zero_grad()

    def _controls(self, sums: Sums, updates: dict[int, Update]) -> dict[int, Tensor]:
        """The server's stays the mean of all clients': what one forgets of its own, of pruned weights, leaves it."""
        found, mask = dict(self.state.controls), self.state.mask
        change = sums.more["controls"].value()
        for client, update in updates.items():
            whole = found.get(client, torch.zeros(self.site.layout.size))
            before = within(whole, mask)
            change -= whole - before
            found[client] = (before + update.more["controls"]).float()  # as precise as what was sent
        found[-1] = found[-1] + change / self.federation.clients
        return found

    def _renew(self, after: State, sums: Sums) -> None:
        """Renews the masks that the server finds, where they are due after this round."""
        sparsifier, layout = self.site.sparsifier, self.site.layout
        by_squares = isinstance(sparsifier, Importance)
        if sparsifier is None or (isinstance(sparsifier, Dynamic) and not by_squares):
            return
        if by_squares and (not self.moves or sums.clients == 0):
            return
        layout.write(after.values)
        masks = layout.masks(after.mask)
        sparsifier.adopt({name: mask.to(layout.tensors[name].device) for name, mask in masks.items()}, after.renewed)
        if isinstance(sparsifier, Importance):
            sparsifier.collects = False
            sparsifier.squares = layout.masks(sums.more["squares"].value())
        sparsifier.update(self.number)
        after.mask, after.values, after.renewed = self.site.mask, layout.read(), sparsifier.renewed


def blank(client: int, sent: Messages) -> Row:
    """What there is to say of a client that has been sent its task and has not answered yet."""
    return {"client": client, "down": sum(map(len, sent)), "up": 0, "masks": 0, "bound": 0.0, "failure": None}


def _check_first(notes: list[Row]) -> None:
    """Raises `InputError` where every client has failed in the same way: the code, rather than a client, is wrong.

    A single client that was dropped, was too slow, or sent what is refused, may just have had bad luck.
    """
    reasons = [note["failure"] or "" for note in notes]
    kinds = {reason.partition(":")[0] for reason in reasons}
    fortune = {"", "Dropped", "Straggler"} | ({"InputError"} if len(notes) == 1 else set())
    if len(kinds) == 1 and not kinds & fortune:
        raise InputError(f"all {len(notes)} clients of the first round failed: {reasons[0]}")


def _row(number: int, notes: list[Row], after: State, sums: Sums, dense: int) -> Row:
    failed = {str(note["client"]): note["failure"] for note in notes if note["failure"]}
    return {
        "round": number, "accuracy": None, "clients": sums.clients, "failures": len(failed), "reasons": failed,
        "bytes_down": sum(note["down"] for note in notes), "bytes_up": sum(note["up"] for note in notes),
        "bytes_dense": dense * (len(notes) + sum(note["up"] > 0 for note in notes)),
        "bytes_masks_up": sum(note["masks"] for note in notes),
        "bound_masks_up": round(sum(note["bound"] for note in notes)),
        "density": int(after.mask.count_nonzero()) / len(after.mask) if len(after.mask) else 1.0,
    }  # fmt: skip


def _check_plain(site: Site) -> None:
    """Raises `InputError` unless a client's path is the sum of its gradients times their rates."""
    optimizer, scaling = site.optimizer, site.sparsifier and site.sparsifier.scaling
    if scaling and scaling.what == "both":
        raise InputError("SCAFFOLD takes one rate for all weights: scale the weights only, scaled('weights')")
    plain = not any(group.get("momentum") for group in optimizer.param_groups)
    if type(optimizer) is not torch.optim.SGD or not plain:
        raise InputError(
            "SCAFFOLD takes gradients from how far a client has walked, so its optimizer has to be SGD without "
            f"momentum, got {type(optimizer).__name__} with {optimizer.defaults}"
        )


def _check_congruity(sparsifier: Sparsifier | None, local: Local) -> None:
    """Raises `InputError` where clients have no direction of their own yet when masks move."""
    if (
        isinstance(sparsifier, Congruent)
        and sparsifier.congruity.prune
        and min(local.adjust_after, local.epochs - 1) < 1
    ):
        raise InputError(
            f"congruity compares the federation's direction with where a client has gone when masks move, after "
            f"adjust_after={local.adjust_after} of epochs={local.epochs}: let it train an epoch before, and one after"
        )


def _check_apart(federation: Federation, server: FedAvg) -> None:
    """Raises `InputError` where the server would need samples that its clients keep to themselves."""
    if federation.partition.apart and (federation.held_out or server.share):
        raise InputError(
            f"clients keep their data to themselves: held_out={federation.held_out:g} and a server's share of "
            f"{server.share:g} have to be 0"
        )


def _check_quorum(federation: Federation, tolerance: Tolerance) -> None:
    """Raises `InputError` where no round could have enough clients."""
    if tolerance.quorum > federation.per_round:
        raise InputError(
            f"a quorum={tolerance.quorum} of per_round={federation.per_round} clients can never answer, and nothing "
            "would be trained: take a smaller one"
        )


def check(sparsifier: Sparsifier) -> None:
    """Raises `InputError` for a method that keeps more than weights and masks, which a federation does not send."""
    if not isinstance(sparsifier, Sparsifier):
        raise InputError(f"a method is a callback, such as FedSGC(0.8), got {sparsifier!r}")
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
