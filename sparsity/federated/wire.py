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
        wide = any(each.dtype.itemsize > 4 and each.is_floating_point() for each in layout.tensors.values())
        self._rounds = precision != "float32" or wide
        self._lengths: tuple[Tensor | None, dict[int, int]] = None, {}

    def send(self, task: Task, known: Tensor | None) -> Messages:
        """A task for a client that knows this mask, or none."""
        masks, theirs = self._masks(task.mask, known)
        directions = None if task.directions is None else self.layout.masks(task.directions)
        found = [payload.encode(Payload(*self.layout.both(task.values), directions), masks, theirs, self.precision)]
        if task.controls is not None:
            found.append(self._whole(task.controls[0], masks))
        return found

    def receive(self, messages: Messages, like: Task, known: Tensor | None) -> Task:
        """The task that these messages are, of which `like` says what it is about.

        Raises `InputError` for anything else than `send` made for this model and this mask.
        """
        layout = self.layout
        [first, *others] = messages
        found, masks = payload.decode(first, *layout.like, None if known is None else layout.masks(known))
        directions = layout.join(found.directions).to(torch.int8) if found.directions else None
        controls = None
        if like.controls is not None:
            controls = (self._vector(payload.decode(others[0], *layout.like, masks)[0]), like.controls[1])
        return Task(self._vector(found), layout.mask(masks), like.number, like.moves, directions, controls)

    def answer(self, update: Update, task: Task) -> Messages:
        """An update of a client that has been sent this task's mask."""
        masks, theirs = self._masks(update.mask, task.mask)
        first = Payload(*self.layout.both(update.values), None, {"samples": update.samples})
        found = [payload.encode(first, masks, theirs, self.precision)]
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
        found, masks = payload.decode(first, *layout.like, layout.masks(task.mask))
        vectors = {}
        for name, message in zip(more, others, strict=True):
            if name == "controls":
                vectors[name] = self._vector(payload.decode(message, *layout.like, masks)[0])
            else:
                squares = payload.decode(message, {}, self._squares(torch.zeros(layout.masked)))[0].rest
                vectors[name] = torch.cat([each.flatten() for each in squares.values()]).double()
        return Update(self._vector(found), layout.mask(masks), int(found.numbers.get("samples", 0)), vectors)

    def plain(self, update: Update, task: Task) -> bool:
        """Whether an answer says nothing but values, which come back as they are: its length is known before."""
        return not self._rounds and not update.more and _same(update.mask, task.mask)

    def length(self, update: Update, task: Task) -> int:
        """How long a plain answer is: encoded once for each task and number of samples, whatever its values."""
        if self._lengths[0] is not task.mask:
            self._lengths = task.mask, {}
        lengths = self._lengths[1]
        if update.samples not in lengths:
            lengths[update.samples] = sum(map(len, self.answer(update, task)))
        return lengths[update.samples]

    def weighed(self, messages: Messages, mask: Tensor, known: Tensor) -> dict[str, float]:
        """How long an answer is, how much of it says the mask, and the fewest bytes that this takes on average."""
        masks, theirs = self._masks(mask, known)
        same = masks is theirs
        return {
            "up": sum(map(len, messages)), "masks": 0 if same else payload.parts(messages[0])["masks"],
            "bound": 0.0 if same else payload.bound(masks, theirs),
        }  # fmt: skip

    def _masks(self, mask: Tensor, known: Tensor | None) -> tuple[Masks, Masks | None]:
        """Both by name; the same object where they are the same masks."""
        masks = self.layout.masks(mask)
        if known is None:
            return masks, None
        return masks, masks if _same(mask, known) else self.layout.masks(known)

    def _whole(self, vector: Tensor, masks: Masks) -> bytes:
        return payload.encode(Payload(*self.layout.both(vector)), masks, masks)

    def _vector(self, found: Payload) -> Tensor:
        return self.layout.join(found.weights | found.rest)

    def _squares(self, vector: Tensor) -> dict[str, Tensor]:
        return {f"squares/{name}": each.float() for name, each in self.layout.masks(vector).items()}


def _same(mask: Tensor, other: Tensor) -> bool:
    return mask is other or torch.equal(mask, other)
