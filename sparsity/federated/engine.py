"""The engine: the clients of a federation one after the other, in this process or a few."""

import time

from sparsity.federated.client import client_update
from sparsity.federated.coordinator import Coordinator, Row, blank
from sparsity.federated.crew import Crew
from sparsity.federated.federation import share
from sparsity.federated.scouting import fixed, scouted
from sparsity.federated.server import Update
from sparsity.sensitivity import Sensitivity


class Engine:
    """The rounds of a federation, in one of the processes that share its clients.

    All processes hold the server's state and take its steps, each on the same sums; so nothing is broadcast. What goes
    between server and clients is encoded, and read again, where that can make a difference (`Wire.plain`).
    """

    def __init__(self, server: Coordinator, crew: Crew | None = None) -> None:
        self.server, self.crew = server, crew or Crew()
        self.first = self.crew.rank == 0

    def scout(self) -> None:
        """Lets scouts find the densities of the layers, unless they have, and goes on with fixed masks of these."""
        server, begun = self.server, self.server.state.scouting
        assert isinstance(server.method, Sensitivity)
        about = begun or scouted(server.site, server.source, server.trained, server.seed, self.crew)
        server.site.attach(fixed(server.method, about["densities"]))
        if not begun:
            server.state.values, server.state.mask = server.site.layout.read(), server.site.mask
            server.state.scouting = about

    def round(self) -> Row:
        """One round: the state becomes the next one, and what happened is returned."""
        start, server = time.perf_counter(), self.server
        server.site.reach(server.number)
        sums, notes, updates = server.sums(), list[Row](), list[tuple[int, Update]]()
        for client in share(server.chosen(), server.trained, self.crew.count)[self.crew.rank]:
            note, update = self._client(client)
            notes.append(note)
            if update is not None:
                sums.add(update)
                kept = server.kept(update)
                if kept is not None:
                    updates.append((client, kept))
        self.crew.add(sums.tensors())
        notes = sorted(self.crew.gather(notes), key=lambda note: note["client"])
        row = server.close(sums, dict(sorted(self.crew.gather(updates), key=lambda each: each[0])), notes)
        row["seconds"] = round(time.perf_counter() - start, 3)
        return row

    def _client(self, client: int) -> tuple[Row, Update | None]:
        """Sends the task to a client, lets it train, and looks at what comes back."""
        server, tolerance = self.server, self.server.protocol.tolerance
        messages, task = server.outgoing(client)
        note = blank(client, messages)
        seed = server.seed_of(client)
        try:
            if tolerance.drops(seed):
                raise Dropped("did not answer")
            update = client_update(
                server.site, task, server.source, server.trained[client], seed, server.protocol.local, tolerance.timeout
            )
            if server.wire.plain(update, task):
                note["up"] = server.wire.length(update, task)
                return note, server.accepted(client, update)
            answer = server.wire.answer(update, task)
            note |= server.wire.weighed(answer, update.mask, task.mask)
            return note, server.incoming(client, answer, task)
        except Exception as error:  # whatever it is, the round goes on without this client, and says why
            note["failure"] = f"{type(error).__name__}: {error}"
            return note, None


class Dropped(Exception):
    """A client did not answer."""
