"""State: what a federation has come to after a round, all of it, so that it can go on from there."""

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import InputError
from sparsity.files import written

FORMAT = "sparsity-federated-1"
VERSIONS = 8  # masks that are remembered for clients that have them


class State:
    """The server's side of a federation between two rounds.

    values: the model's state as a vector (`Layout`), of [size], exactly as the model's dtypes hold it. mask:
    bool of [masked]. directions: int8 of [masked], of the last global step. moments: the server optimizer's, by name.
    controls: SCAFFOLD's, the server's under -1 and each client's under its number. version: the round that the mask
    came with. renewed: the step of the last renewal that the server has made. known: the version that each client has;
    versions: the masks of those. scouting: what came before the first round, if anything did. rows: what happened in
    each round.
    """

    def __init__(self, values: Tensor, mask: Tensor) -> None:
        self.round = 0
        self.values, self.mask = values, mask
        self.directions = torch.zeros(len(mask), dtype=torch.int8)
        self.moments: dict[str, Tensor] = {}
        self.controls: dict[int, Tensor] = {}
        self.version = 0
        self.renewed = 0
        self.known: dict[int, int] = {}
        self.versions: dict[int, Tensor] = {}
        self.scouting: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def _thinned(self, masks: dict[int, Tensor]) -> dict[int, Tensor]:
        """The masks that some client has, and of these the last few: others are sent a whole one again."""
        return {version: masks[version] for version in sorted(set(self.known.values()))[-VERSIONS:]}

    def know(self, clients: Iterable[int], before: "State") -> None:
        """Notes that these clients have been sent the mask of the state before, and whether there is a new one."""
        self.known = before.known | dict.fromkeys(clients, before.version)
        if not torch.equal(self.mask, before.mask):
            self.version = self.round
        self.versions = self._thinned({**before.versions, before.version: before.mask})
        self.known = {client: version for client, version in self.known.items() if version in self.versions}

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Writes it with what it belongs to, in one piece or not at all: tensors and primitives."""
        with written(path) as partial, partial.open("wb") as file:
            torch.save({"format": FORMAT, "about": dict(about), **vars(self)}, file)
            file.flush()
            os.fsync(file.fileno())


def load(path: Path, about: Mapping[str, Any]) -> State:
    """The state in a file; raises `InputError` where it is damaged or belongs to another federation than `about`."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"'{path}' cannot be read: {error}. Start anew, or restore the file") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise InputError(f"'{path}' is no state of a federation: give the folder of one")
    state = State(torch.zeros(0), torch.zeros(0))
    if not {"about", *vars(state)} <= saved.keys():
        raise InputError(f"'{path}' is of another version of this library: start anew")
    keys = dict.fromkeys((*about, *(saved["about"] if about else ())))
    different = [key for key in keys if saved["about"].get(key) != about.get(key)]
    if different:
        was, now = ({key: each.get(key) for key in different} for each in (saved["about"], about))
        raise InputError(f"'{path}' is of a federation with {was}, this one has {now}: resume with the same, or anew")
    for name in vars(state):
        setattr(state, name, saved[name])
    return state
