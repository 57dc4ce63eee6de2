"""Payloads: what is sent between a server and its clients, as bytes that are counted and never trusted."""

import hashlib
import json
import math
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsity.errors import InputError
from sparsity.federated import bits
from sparsity.masks import Masks, fingerprint, unpack
from sparsity.masks import pack as packed

FORMAT = "sparsity-payload-1"
DIGEST = 16  # bytes of the hash that a payload begins with
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
Tensors = Mapping[str, Tensor]


class Payload:
    """What one side tells the other.

    weights: those that have masks, whole tensors that are zero where they are pruned. rest: all others. directions: of
    weights by name, int8 in their shapes, 1 where a weight has grown, -1 where it has shrunk, and 0. numbers: anything
    else that is a number.
    """

    def __init__(
        self, weights: Tensors, rest: Tensors, directions: Tensors | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.weights, self.rest = dict(weights), dict(rest)
        self.directions = dict(directions or {})
        self.numbers = dict(numbers or {})


def encode(payload: Payload, masks: Masks, known: Masks | None = None, precision: str = "float32") -> bytes:
    """The payload as bytes: the values of kept weights, and the masks as far as the receiver does not know them.

    Where `known`, the receiver's masks, are these masks, none are sent; otherwise each goes as a whole or as what has
    changed, whichever is shorter. Values go in the weights' own dtype, as float32 where that is wider. Directions take
    one bit for each weight that has one, and where those are not just the kept weights, what is different. "float16"
    and "int8" round the values of weights, the latter to 255 steps up to the largest magnitude of each tensor; the rest
    stays as it is. A safetensors file after a hash of it.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    tensors: dict[str, Tensor] = {}
    values, scales = list[Tensor](), dict[str, float]()
    for name, weight in payload.weights.items():
        mask, whole = masks[name].cpu(), weight.detach().cpu()
        kept, scales[name] = _rounded(whole.reshape(-1) if bool(mask.all()) else whole[mask], precision)
        values.append(kept)
        if known is not masks and (known is None or not torch.equal(mask, known[name].cpu())):
            tensors |= _masked(name, mask, None if known is None else known[name].cpu())
        if name in payload.directions:
            tensors |= _directed(name, payload.directions[name].cpu(), mask)
    tensors |= _joined("values", values) | _joined("rest", [each.detach().cpu() for each in payload.rest.values()])
    mine = fingerprint(masks)
    theirs = "" if known is None else mine if known is masks else fingerprint(known)
    about = {
        "format": FORMAT, "precision": precision, "scales": json.dumps(scales), "numbers": json.dumps(payload.numbers),
        "known": theirs, "masks": mine,
    }  # fmt: skip
    body = save(tensors, about)
    return hashlib.sha256(body).digest()[:DIGEST] + body


def decode(data: bytes, weights: Tensors, rest: Tensors, known: Masks | None = None) -> tuple[Payload, Masks]:
    """The payload and the masks that these bytes are, for a model that has these weights and this rest.

    Raises `InputError` for bytes that are not what `encode` made for such a model and such known masks: cut off,
    longer, altered, of other shapes, or with a number that is not finite. Nothing is executed, and nothing larger than
    the model is made.
    """
    tensors, about = _read(data)
    expected = "" if known is None else fingerprint(known)
    if about["known"] not in ("", expected):
        raise InputError("the payload changes other masks than those that are known: ask for one with whole masks")
    scales, numbers = _numbers(about["scales"]), _numbers(about["numbers"])
    masks = {name: _mask(tensors, name, weight, known) for name, weight in weights.items()}
    sent = {name: _sent_as(weight.dtype, about["precision"]) for name, weight in weights.items()}
    counts = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    values = _parted(tensors, "values", {name: (sent[name], (counts[name],)) for name in weights})
    found, directions = {}, {}
    for name, weight in weights.items():
        kept = values[name].to(weight.dtype) * scales.get(name, 1.0)
        found[name] = torch.zeros(weight.shape, dtype=weight.dtype)
        found[name][masks[name]] = _finite(name, kept)
        if f"directions/{name}" in tensors:
            directions[name] = _directions(tensors, name, masks[name])
    others = _parted(tensors, "rest", {name: (each.dtype, tuple(each.shape)) for name, each in rest.items()})
    for name, each in others.items():
        _finite(name, each)
    if tensors:
        raise InputError(f"the payload has {sorted(tensors)[:3]}, which the model has not: it is another model's")
    if fingerprint(masks) != about["masks"]:
        raise InputError("the payload's masks are not those that it was made with: it is damaged, or for another state")
    return Payload(found, others, directions, numbers), masks


def bound(masks: Masks, known: Masks | None = None) -> float:
    """The fewest bytes that masks, or their changes, take on average for a code that knows their densities."""
    if known is None:
        return sum(bits.entropy_bound(mask) for mask in masks.values())
    return sum(bits.entropy_bound(mask ^ known[name].to(mask.device)) for name, mask in masks.items())


def parts(data: bytes) -> dict[str, int]:
    """How many of a payload's bytes are values, masks, directions and the rest; the remainder is `container`."""
    tensors, _ = _read(data)
    kinds = {"values": "values", "whole": "masks", "change": "masks", "rest": "rest"}
    kinds |= dict.fromkeys(("directions", "moved"), "directions")
    found = dict.fromkeys((*dict.fromkeys(kinds.values()), "container"), 0)
    for name, each in tensors.items():
        found[kinds[name.partition("/")[0]]] += each.numel() * each.element_size()
    found["container"] = len(data) - sum(found.values())
    return found


def _joined(kind: str, parts: list[Tensor]) -> dict[str, Tensor]:
    """Tensors one after the other, those of each dtype in one: their shapes are the model's."""
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        found.setdefault(_key(kind, part.dtype), []).append(part.reshape(-1))
    return {key: torch.cat(flat) for key, flat in found.items()}


def _parted(
    tensors: dict[str, Tensor], kind: str, like: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """The tensors of these dtypes and shapes that were joined."""
    found: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(dtype for dtype, _ in like.values()):
        shapes = {name: shape for name, (each, shape) in like.items() if each == dtype}
        sizes = [math.prod(shape) for shape in shapes.values()]
        whole = _taken(tensors, _key(kind, dtype), (sum(sizes),), dtype)
        found |= {name: part.view(shapes[name]) for name, part in zip(shapes, torch.split(whole, sizes), strict=True)}
    return {name: found[name] for name in like}


def _key(kind: str, dtype: torch.dtype) -> str:
    return f"{kind}/{str(dtype).removeprefix('torch.')}"


def _masked(name: str, mask: Tensor, known: Tensor | None) -> dict[str, Tensor]:
    """A mask as a whole, or what has changed of it where that is shorter."""
    whole, change = bits.encode(mask), None if known is None else bits.encode(mask ^ known)
    kind, data = ("whole", whole) if change is None or len(whole) <= len(change) else ("change", change)
    return {f"{kind}/{name}": _bytes(data)}


def _directed(name: str, direction: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """One bit for each weight that has a direction, and which ones those are unless they are the kept ones."""
    moved = direction != 0
    found = {f"directions/{name}": packed(direction[moved] > 0)}
    if not torch.equal(moved, mask):
        found[f"moved/{name}"] = _bytes(bits.encode(moved ^ mask))
    return found


def _directions(tensors: dict[str, Tensor], name: str, mask: Tensor) -> Tensor:
    moved = mask
    if f"moved/{name}" in tensors:
        moved = mask ^ bits.decode(_raw(tensors.pop(f"moved/{name}")), tuple(mask.shape))
    count = int(moved.count_nonzero())
    ups = unpack(_taken(tensors, f"directions/{name}", (math.ceil(count / 8),), torch.uint8), (count,))
    found = torch.zeros(mask.shape, dtype=torch.int8)
    found[moved] = ups.to(torch.int8) * 2 - 1
    return found


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _raw(tensor: Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise InputError(f"bytes of a mask were expected, got {tuple(tensor.shape)} of {tensor.dtype}")
    found: bytes = tensor.contiguous().numpy().tobytes()
    return found


def _sent_as(dtype: torch.dtype, precision: str) -> torch.dtype:
    narrow = precision == "float32" and dtype.itemsize < 4
    return dtype if narrow else PRECISIONS[precision]


def _rounded(values: Tensor, precision: str) -> tuple[Tensor, float]:
    if precision == "float32":
        return values.to(_sent_as(values.dtype, precision)), 1.0
    largest = float(values.abs().max()) if len(values) else 0.0
    if precision == "float16":
        if torch.finfo(torch.float16).max < largest < math.inf:
            raise InputError(f"weights go up to {largest:g}, beyond float16's 65504: take precision='float32'")
        return values.half(), 1.0
    scale = largest / 127 or 1.0
    return (values.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def _read(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    body = data[DIGEST:]
    if hashlib.sha256(body).digest()[:DIGEST] != data[:DIGEST]:
        raise InputError(f"a payload of {len(data)} bytes is damaged or cut off: its hash is another")
    try:
        tensors = load(body)
        size = int.from_bytes(body[:8], "little")
        about: dict[str, str] = dict(json.loads(body[8 : 8 + size])["__metadata__"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"a payload is no safetensors file: {error}") from error
    missing = {"precision", "scales", "numbers", "known", "masks"} - about.keys()
    if about.get("format") != FORMAT or missing or about["precision"] not in PRECISIONS:
        raise InputError(f"a payload of format '{FORMAT}' was expected, got {about.get('format')!r}")
    return tensors, about


def _numbers(text: str) -> dict[str, float]:
    try:
        found = json.loads(text)
        numbers = {str(name): float(value) for name, value in found.items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"a payload's numbers cannot be read: {error}") from error
    if not all(map(math.isfinite, numbers.values())):
        raise InputError(f"a payload's numbers are not finite: {numbers}")
    return numbers


def _mask(tensors: dict[str, Tensor], name: str, weight: Tensor, known: Masks | None) -> Tensor:
    for kind in ("whole", "change"):
        if f"{kind}/{name}" in tensors:
            mask = bits.decode(_raw(tensors.pop(f"{kind}/{name}")), tuple(weight.shape))
            if kind == "whole":
                return mask
            if known is None:
                raise InputError(f"the payload has changes of the mask of '{name}', and no mask is known")
            return mask ^ known[name].cpu()
    if known is None:
        raise InputError(f"the payload has no mask for '{name}', and none is known")
    return known[name].cpu()


def _taken(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    found = tensors.pop(name, None)
    if found is None or found.shape != torch.Size(shape) or found.dtype != dtype:
        got = "nothing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
        raise InputError(f"the payload was to have '{name}' of shape {tuple(shape)} and {dtype}, got {got}")
    return found


def _finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"'{name}' has {bad} values that are NaN or infinite: the payload is refused")
    return tensor
