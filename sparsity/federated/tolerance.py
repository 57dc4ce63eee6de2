"""Tolerance: what a federation does about clients that fail."""

import math

import torch
from torch import Tensor

from sparsity.errors import InputError
from sparsity.federated.exact import LARGEST
from sparsity.federated.layout import Layout
from sparsity.federated.server import Update
from sparsity.ops.sums import look


class Tolerance:
    """Which failures are expected, and what becomes of a round then.

    A client that fails is counted with its reason, and the round goes on without it. Values that are NaN or infinite
    are always refused.

    Args:
        dropout: the chance that a client gets the model and never answers, in [0, 1).
        timeout: seconds that a client may train; the time of day then decides about results. No limit if not given.
        quorum: how many clients have to answer; with fewer the model stays as it is.
        clip: the largest norm of a client's change, to which longer ones are shortened; none if not given.
    """

    def __init__(
        self, dropout: float = 0.0, timeout: float | None = None, quorum: int = 1, clip: float | None = None
    ) -> None:
        if not 0 <= dropout < 1 or quorum < 1:
            raise InputError(f"expected {dropout=} in [0, 1) and {quorum=} of at least 1")
        if (timeout is not None and timeout <= 0) or (clip is not None and clip <= 0):
            raise InputError(f"expected {timeout=} and {clip=} above 0")
        self.dropout, self.timeout, self.quorum, self.clip = dropout, timeout, quorum, clip

    def drops(self, seed: int) -> bool:
        """Whether a client with this seed does not answer."""
        return self.dropout > 0 and float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < self.dropout

    def clipped(self, update: Update, before: Tensor, layout: Layout) -> Update:
        """The update, the change of its parameters from `before` no longer than `clip`."""
        if self.clip is None:
            return update
        change = update.values - before
        kept = layout.learned.clone()  # buffers are no change to go along
        kept[: layout.masked] &= update.mask
        norm = float(torch.linalg.vector_norm(change[kept]))
        if norm > self.clip:
            update.values = torch.where(kept, before + change * (self.clip / norm), update.values)
        return update


def refuse(update: Update, layout: Layout, more: dict[str, int], samples: int) -> None:
    """Raises `InputError` where an update cannot be added: of another shape, not finite, too large.

    Also where it does not speak for its client's `samples`, by which it is weighted, or keeps no weight at all.
    """
    expected = {"values": layout.size, **more}
    vectors = {"values": update.values, **update.more}
    if update.samples != samples:
        raise InputError(f"the update is of {update.samples} samples, its client has {samples}")
    if update.mask.dtype != torch.bool or len(update.mask) != layout.masked:
        got = f"{len(update.mask)} {update.mask.dtype}"
        raise InputError(f"the update's mask is of {got}, expected {layout.masked} bools")
    if {name: len(each) for name, each in vectors.items()} != expected:
        raise InputError(f"the update has { ({n: len(v) for n, v in vectors.items()}) }, expected {expected}")
    for name, vector in vectors.items():
        largest, kept, strays = look(vector, update.mask if name == "values" else update.mask[:0])
        if not math.isfinite(largest):
            bad = ~torch.isfinite(vector)
            first = layout.name_at(int(bad.int().argmax()))
            raise InputError(f"{int(bad.sum())} of {len(vector)} {name} are NaN or infinite, the first in '{first}'")
        if largest * update.samples >= LARGEST:
            where = layout.name_at(int(vector.abs().argmax()))
            raise InputError(f"{name} go up to {largest:g}, which is beyond any model's, in '{where}'")
        if name == "values" and layout.masked and not kept:
            raise InputError(f"the update keeps 0 of {layout.masked} weights")
        if strays:
            raise InputError(f"the update has {strays} values where its mask prunes")
