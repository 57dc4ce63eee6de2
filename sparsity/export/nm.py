"""N of M: of each M weights along the input axis the N that are kept, and their places in so many bits.

The places of a group of M take N * ceil(log2 M) bits, 4 for 2:4 and for 1:16. No processor reads this layout as it
stands: it is for storage.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.errors import InputError
from sparsity.patterns import NM, from_groups, parse, to_groups

from .tensors import State, bits

WIDEST = 256  # groups; a file cannot ask for more than so many times its own size


def encode(
    tensors: Mapping[str, Tensor], pattern: str, turned: Collection[str] = frozenset()
) -> tuple[State, dict[str, Any]]:
    """The tensors with those packed that have the pattern, and what else is to be known of these.

    Those of `turned` have inputs on their first axis. Raises `InputError` where none has the pattern.
    """
    shape = _parsed(pattern)
    found: State = {}
    packed: dict[str, Any] = {}
    for name, value in tensors.items():
        parts = pack(_face(value, name in turned), shape.n, shape.m) if value.ndim > 1 and value.numel() else {}
        if not parts or sum(each.nbytes for each in parts.values()) >= value.nbytes:
            found[name] = value
            continue
        packed[name] = {"shape": list(value.shape), "turned": name in turned}
        found |= {f"{name}.{part}": each for part, each in parts.items()}
    if not packed:
        raise InputError(
            f"no weight keeps at most {shape.n} of each {shape.m} along its inputs: prune to the pattern {pattern} "
            "first, or export compressed, which takes any zeros"
        )
    if clash := sorted({f"{name}.{part}" for name in packed for part in ("values", "places")} & tensors.keys()):
        raise InputError(f"'{clash[0]}' is a tensor of the model and a part of a packed weight: export dense")
    return found, {"pattern": pattern, "packed": packed}


def decode(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> State:
    """The tensors with their packed ones unpacked; raises `InputError` where a part contradicts another."""
    found = dict(tensors)
    packed = about.get("packed")
    if not isinstance(packed, dict) or not isinstance(about.get("pattern"), str):
        raise InputError("the list of the packed weights is damaged: export again")
    pattern = _parsed(about["pattern"])
    for name, said in packed.items():
        try:
            shape, turned = tuple(said["shape"]), bool(said["turned"])
            values, places = found.pop(f"{name}.values"), found.pop(f"{name}.places")
        except (KeyError, TypeError) as error:
            raise InputError(f"of '{name}' something is missing or damaged ({error}): export again") from error
        if not 2 <= len(shape) <= 8 or not all(type(each) is int and each >= 0 for each in shape):
            raise InputError(f"the shape of '{name}' is no shape: {shape!r:.80}")
        if name in found:
            raise InputError(f"'{name}' is there twice: packed, and as it is")
        face = (shape[1], shape[0], *shape[2:]) if turned else shape
        found[name] = _face(unpack(values, places, face, pattern, name), turned).contiguous()
    return found


def pack(weight: Tensor, n: int, m: int) -> State:
    """`values` [groups, n] and uint8 `places` of a weight [out, in, ...], nothing where it has not the pattern.

    Groups go along the input axis and in the order of `patterns.to_groups`. A group that keeps fewer than n has zeros
    beside them, the first of its own. -0.0 is a zero.
    """
    if weight.shape[1] % m:
        return {}
    groups = to_groups(weight.detach().cpu(), m)
    kept = groups != 0
    if int(kept.sum(1).max()) > n:
        return {}
    places = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :n].sort(dim=1).values
    return {"values": bits(groups).gather(1, places).view(weight.dtype), "places": _to_bits(places, m)}


def unpack(values: Tensor, places: Tensor, shape: tuple[int, ...], pattern: NM, name: str) -> Tensor:
    """The weight that `pack` made values and places of; raises `InputError`, naming it, where they contradict."""
    n, m = pattern.n, pattern.m
    groups = math.prod(shape) // m
    if shape[1] % m or values.shape != (groups, n):
        raise InputError(f"'{name}' says it is {n}:{m} of shape {list(shape)}, its values are {list(values.shape)}")
    width = (m - 1).bit_length()
    if places.dtype != torch.uint8 or places.shape != (-(-groups * n * width // 8),):
        raise InputError(f"'{name}' has {list(places.shape)} bytes of places for {groups} groups of {n}:{m}")
    where = _from_bits(places, groups * n, width).view(groups, n)
    if bool((where >= m).any()) or bool((where.diff(dim=1) <= 0).any()):
        raise InputError(f"the places of '{name}' are no {n} different ones of {m} in their order")
    words = bits(values)
    return from_groups(words.new_zeros(groups, m).scatter_(1, where, words), shape).contiguous().view(values.dtype)


def _parsed(pattern: str) -> NM:
    shape = parse(pattern) if len(pattern) < 20 else None  # nor numbers that take long to read
    if not isinstance(shape, NM) or not 1 <= shape.n < shape.m <= WIDEST:
        raise InputError(f'"N:M" is packed, with M of at most {WIDEST}, got "{pattern:.40}"')
    return shape


def _face(weight: Tensor, turned: bool) -> Tensor:
    return weight.transpose(0, 1) if turned else weight


def _to_bits(places: Tensor, m: int) -> Tensor:
    """Each place in as few bits as m needs, the lowest first, without gaps."""
    width = (m - 1).bit_length()
    each = (places.byte().numpy()[..., None] >> np.arange(width, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(each, bitorder="little"))


def _from_bits(packed: Tensor, count: int, width: int) -> Tensor:
    each = np.unpackbits(packed.numpy(), count=count * width, bitorder="little").reshape(count, width)
    return torch.from_numpy(np.packbits(each, axis=1, bitorder="little")[:, 0].astype(np.int64))
