"""Identity: what the parts of a federation were made of, by which a saved state is told from another's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsity.dynamic import Dynamic
from sparsity.sparsifier import Sparsifier


def rule(sparsifier: Sparsifier | None) -> dict[str, Any]:
    """What a method was made of, none of which a round changes."""
    if sparsifier is None:
        return {"class": None}
    names = ("score", "distribution", "pattern", "schedule", "congruity")
    parts = {name: getattr(sparsifier, name, None) for name in names}
    if isinstance(sparsifier, Dynamic):
        parts |= {"first": sparsifier.first, **vars(sparsifier.regrowth)}
    more = {name: getattr(sparsifier, name, None) for name in ("sparsity", "times", "scouts", "epochs")}
    return {
        "class": type(sparsifier).__name__, **{name: settings(part) for name, part in parts.items()}, **plain(more),
        "scaled": sparsifier.scaling.what if sparsifier.scaling else None,
    }  # fmt: skip


def settings(thing: object | None) -> dict[str, Any] | None:
    """What a small object was made with: its class, and its numbers and texts."""
    return None if thing is None else {"class": type(thing).__name__, **plain(vars(thing))}


def flat(about: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Dictionaries in a dictionary as keys with dots."""
    found: dict[str, Any] = {}
    for name, value in about.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found


def plain(of: Mapping[Any, Any]) -> dict[Any, Any]:
    """What is a number, a text or None, or a list or a dictionary of these, as Python's own."""
    return {name: _own(value) for name, value in of.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | np.generic | list | tuple | dict)


def _own(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_own(each) for each in value if _is_plain(each)]
    if isinstance(value, dict):
        return plain(value)
    return value.item() if isinstance(value, np.generic) else value
