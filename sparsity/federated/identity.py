"""Identity: what the parts of a federation were made of, by which a saved state is told from another's."""

from collections.abc import Mapping
from typing import Any

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
    plain = {name: getattr(sparsifier, name, None) for name in ("sparsity", "times", "scouts", "epochs")}
    return {
        "class": type(sparsifier).__name__, **{name: settings(part) for name, part in parts.items()}, **_plain(plain),
        "scaled": sparsifier.scaling.what if sparsifier.scaling else None,
    }  # fmt: skip


def settings(thing: object | None) -> dict[str, Any] | None:
    """What a small object was made with: its class, and its numbers and texts."""
    return None if thing is None else {"class": type(thing).__name__, **_plain(vars(thing))}


def flat(about: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Dictionaries in a dictionary as keys with dots."""
    found: dict[str, Any] = {}
    for name, value in about.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return found


def _plain(of: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in of.items()}
    found = {name: _plain(value) if isinstance(value, dict) else value for name, value in found.items()}
    kinds = (bool, int, float, str, list, dict, type(None))
    return {name: value for name, value in found.items() if isinstance(value, kinds)}
