"""The wire: tasks and updates as bytes, in both directions, and what they would take at best."""

import torch
from torch import Tensor

from sparsity.errors import InputError
from sparsity.federated import payload
from sparsity.federated.client import Task
from sparsity.federated.layout import Layout
from sparsity.federated.payload import Payload
from sparsity.federated.server import Update
from sparsity.masks import Masks

Messages = list[bytes]


class Wire:
    """Turns tasks and updates into payloads and back, for a model.

    Values go as the precision says in both directions, everything beside them at full precision: what a client sends is
    what the server adds up.
    """

    def __init__(self, layout: Layout, precision: str = "float32") -> None:
        self.layout, self.precision = layout, precision

    def send(self, task: Task, known: Tensor | None) -> Messages:
        """A task for a client that knows this mask, or none."""
        layout = self.layout
        masks, theirs = layout.masks(task.mask), None if known is None else layout.masks(known)
        directions = None if task.directions is None else layout.masks(task.directions)
        first = Payload(layout.weights(task.values), layout.rest(task.values), directions)
        found = [payload.encode(first, masks, theirs, self.precision)]
        if task.controls is not None:
            found.append(self._whole(task.controls[0], masks))
        return found

    def receive(self, messages: Messages, like: Task, known: Tensor | None) -> Task:
        """The task that these messages are, of which `like` says what it is about.

        Raises `InputError` for anything else than `send` made for this model and this mask.
        """
        layout = self.layout
        [first, *others] = messages
        found, masks = payload.decode(
            first, layout.weights(like.values), layout.rest(like.values), None if known is None else layout.masks(known)
        )
        directions = layout.join(found.directions).to(torch.int8) if found.directions else None
        controls = None
        if like.controls is not None:
            controls = (self._vector(self._open(others[0], masks)), like.controls[1])
        return Task(self._vector(found), layout.mask(masks), like.number, like.moves, directions, controls)

    def answer(self, update: Update, task: Task) -> Messages:
        """An update of a client that has been sent this task's mask."""
        layout = self.layout
        masks = layout.masks(update.mask)
        first = Payload(layout.weights(update.values), layout.rest(update.values), None, {"samples": update.samples})
        found = [payload.encode(first, masks, layout.masks(task.mask), self.precision)]
        if "controls" in update.more:
            found.append(self._whole(update.more["controls"], masks))
        if "squares" in update.more:
            found.append(payload.encode(Payload({}, self._squares(update.more["squares"])), {}))
        return found

    def read(self, messages: Messages, task: Task, more: dict[str, int]) -> Update:
        """The update that these messages are; raises `InputError` for what `answer` did not make for the task."""
        layout = self.layout
        if len(messages) != 1 + len(more):
            raise InputError(f"an answer of {1 + len(more)} messages was expected, got {len(messages)}")
        [first, *others] = messages
        weights, rest = layout.weights(task.values), layout.rest(task.values)
        found, masks = payload.decode(first, weights, rest, layout.masks(task.mask))
        vectors = {}
        for name, message in zip(more, others, strict=True):
            if name == "controls":
                vectors[name] = self._vector(self._open(message, masks))
            else:
                squares = payload.decode(message, {}, self._squares(torch.zeros(layout.masked)))[0].rest
                vectors[name] = torch.cat([each.flatten() for each in squares.values()]).double()
        return Update(self._vector(found), layout.mask(masks), int(found.numbers.get("samples", 0)), vectors)

    def bound(self, mask: Tensor, known: Tensor | None) -> float:
        """The fewest bytes that the message of a mask takes on average."""
        layout = self.layout
        return payload.bound(layout.masks(mask), None if known is None else layout.masks(known))

    def _whole(self, vector: Tensor, masks: Masks) -> bytes:
        return payload.encode(Payload(self.layout.weights(vector), self.layout.rest(vector)), masks, masks)

    def _open(self, message: bytes, masks: Masks) -> Payload:
        like = torch.zeros(self.layout.size, dtype=torch.float64)
        return payload.decode(message, self.layout.weights(like), self.layout.rest(like), masks)[0]

    def _vector(self, found: Payload) -> Tensor:
        return self.layout.join(found.weights | found.rest)

    def _squares(self, vector: Tensor) -> dict[str, Tensor]:
        return {f"squares/{name}": each.float() for name, each in self.layout.masks(vector).items()}
