"""Payloads come back exactly, say how long they are, and nothing else is taken for one."""

import hashlib
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from callbacks import StaticMask
from sparsity import InputError, masks
from sparsity.federated.client import Task
from sparsity.federated.payload import DIGEST, Payload, bound, decode, encode, parts
from sparsity.federated.server import Update
from sparsity.federated.site import Site
from sparsity.federated.wire import Wire
from tests.federated.small import model

SHAPES = {"one.weight": (40, 30), "two.weight": (8, 4, 3, 3)}


def state(density: float = 0.2, seed: int = 0) -> tuple[Payload, masks.Masks]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}
    weights = {name: torch.randn(shape, generator=generator) * found[name] for name, shape in SHAPES.items()}
    rest = {"one.bias": torch.randn(40, generator=generator), "two.count": torch.tensor(7)}
    moved = {name: weight.sign().to(torch.int8) for name, weight in weights.items()}
    return Payload(weights, rest, moved, {"samples": 12, "loss": 0.25}), found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def changed(found: masks.Masks, count: int) -> masks.Masks:
    other = {name: mask.clone() for name, mask in found.items()}
    flat = other["one.weight"].view(-1)
    flat[:count] = ~flat[:count]
    return other


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("knows", ["nothing", "the same", "others", "nearly the same"])
def test_everything_comes_back(density: float, knows: str) -> None:
    payload, found = state(density)
    known = {"nothing": None, "the same": found, "others": state(0.3, 5)[1], "nearly the same": changed(found, 5)}[
        knows
    ]
    again, theirs = decode(encode(payload, found, known), payload.weights, payload.rest, known)
    assert same(theirs, found)
    assert same(again.weights, payload.weights)
    assert same(again.rest, payload.rest)
    assert same(again.directions, payload.directions)
    assert again.numbers == {"samples": 12, "loss": 0.25}


def test_directions_need_not_be_those_of_the_kept_weights() -> None:
    payload, found = state()
    one_bit_each = parts(encode(payload, found))["directions"]
    payload.directions["one.weight"][found["one.weight"]] *= torch.arange(int(found["one.weight"].sum())).ne(3).char()
    payload.directions["two.weight"] = torch.randint(-1, 2, SHAPES["two.weight"]).to(torch.int8)
    data = encode(payload, found)
    assert parts(data)["directions"] > one_bit_each
    again, _ = decode(data, payload.weights, payload.rest)
    assert same(again.directions, payload.directions)


def test_what_is_known_is_not_sent() -> None:
    payload, found = state()
    whole, nothing = parts(encode(payload, found)), parts(encode(payload, found, found))
    change = parts(encode(payload, found, changed(found, 5)))
    assert nothing["masks"] == 0
    assert 0 < change["masks"] < whole["masks"]
    for part in ("values", "directions", "rest"):
        assert whole[part] == nothing[part] == change[part]


def test_the_length_is_that_of_its_parts() -> None:
    payload, found = state()
    data = encode(payload, found)
    counted = parts(data)
    active = {name: int(mask.sum()) for name, mask in found.items()}
    assert sum(counted.values()) == len(data)
    assert counted["values"] == 4 * sum(active.values())
    assert counted["directions"] == sum(-(-count // 8) for count in active.values())
    assert counted["rest"] == 4 * 40 + 8
    assert parts(encode(payload, found, precision="float16"))["values"] == counted["values"] / 2
    assert parts(encode(payload, found, precision="int8"))["values"] == counted["values"] / 4
    assert bound(found) < counted["masks"] <= (1200 + 288) / 8 + 2 * 20, "two bitmaps, each with a frame"
    assert bound(found, found) == 0


@pytest.mark.parametrize(("precision", "error"), [("float32", 0.0), ("float16", 5e-4), ("int8", 0.005)])
def test_rounding(precision: str, error: float) -> None:
    payload, found = state()
    payload.weights["one.weight"] = payload.weights["one.weight"] * 0.01
    again, _ = decode(encode(payload, found, None, precision), payload.weights, payload.rest)
    for name, weight in payload.weights.items():
        assert float((again.weights[name] - weight).abs().max()) <= error * float(weight.abs().max())
        assert not again.weights[name][~found[name]].any()
    payload.weights["one.weight"][found["one.weight"]] = 1e6
    with pytest.raises(InputError, match=r"weights go up to 1e\+06, beyond float16's 65504"):
        encode(payload, found, None, "float16")
    payload.weights["one.weight"][found["one.weight"]] = float("inf")
    for rounding in ("float32", "float16", "int8"):
        with pytest.raises(InputError, match=r"infinite|not finite"):
            decode(encode(payload, found, None, rounding), payload.weights, payload.rest)


def sealed(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:DIGEST] + body


def forged(**changes: Any) -> bytes:
    """A payload with a valid hash whose tensors or metadata are not as they should be."""
    payload, found = state()
    body = encode(payload, found)[DIGEST:]
    size = int.from_bytes(body[:8], "little")
    about = json.loads(body[8 : 8 + size])["__metadata__"]
    from safetensors.torch import load

    tensors = load(body)
    for name, value in changes.items():
        if isinstance(value, Tensor):
            tensors[name.replace("__", "/").replace("_weight", ".weight").replace("_bias", ".bias")] = value
        else:
            about[name] = value
    return sealed(save(tensors, about))


def test_every_altered_byte_is_refused() -> None:
    payload, found = state()
    data = encode(payload, found)
    for place in range(0, len(data), 7):
        wrong = bytearray(data)
        wrong[place] ^= 1
        with pytest.raises(InputError, match="damaged or cut off"):
            decode(bytes(wrong), payload.weights, payload.rest)
    for wrong_ in (b"", data[:10], data[:-1], data + b"\0", data[DIGEST:]):
        with pytest.raises(InputError, match="damaged or cut off"):
            decode(wrong_, payload.weights, payload.rest)


@pytest.mark.parametrize(("changes", "message"), [
    ({"values__float32": torch.zeros(3)}, r"to have 'values/float32' of shape \(\d+,\) .* got \(3,\)"),
    ({"rest__float32": torch.zeros(41)}, r"'rest/float32' of shape \(40,\)"),
    ({"rest__float32": torch.full((40,), math.nan)}, "'one.bias' has 40 values that are NaN or infinite"),
    ({"rest__more": torch.zeros(3)}, r"has \['rest/more'\], which the model has not"),
    ({"whole__one_weight": torch.zeros(9, dtype=torch.uint8)}, "damaged|expected"),
    ({"whole__one_weight": torch.zeros(5)}, "damaged|expected"),
    ({"directions__one_weight": torch.zeros(1, dtype=torch.uint8)}, "'directions/one.weight' of shape"),
    ({"numbers": '{"samples": NaN}'}, "numbers are not finite"),
    ({"numbers": "[1]"}, "numbers cannot be read"),
    ({"numbers": '{"a":' * 5000 + "1" + "}" * 5000}, "numbers cannot be read"),
    ({"numbers": '{"samples": 1' + "0" * 400 + "}"}, "numbers cannot be read"),
    ({"whole__one_weight": torch.zeros((), dtype=torch.uint8)}, "bytes of a mask were expected"),
    ({"scales": '{"one.weight": 1e400}'}, "numbers are not finite"),
    ({"masks": "0" * 64}, "masks are not those that it was made with"),
    ({"known": "0" * 64}, "changes other masks than those that are known"),
    ({"format": "another"}, "a payload of format 'sparsity-payload-1' was expected, got 'another'"),
    ({"precision": "float8"}, "a payload of format"),
])  # fmt: skip
def test_a_payload_with_the_right_hash_may_still_lie(changes: dict[str, Any], message: str) -> None:
    payload, _ = state()
    with pytest.raises(InputError, match=message):
        decode(forged(**changes), payload.weights, payload.rest)


def test_a_payload_of_another_model_or_state_is_refused() -> None:
    payload, found = state()
    data = encode(payload, found)
    with pytest.raises(InputError):
        decode(data, {**payload.weights, "one.weight": torch.zeros(30, 40)}, payload.rest)
    with pytest.raises(InputError, match=r"'rest/float32' of shape"):
        decode(data, payload.weights, {**payload.rest, "three.bias": torch.zeros(2)})
    with pytest.raises(InputError, match="other masks than those"):
        decode(encode(payload, found, changed(found, 5)), payload.weights, payload.rest, found)
    with pytest.raises(InputError, match="other masks than those that are known"):
        decode(encode(payload, found, found), payload.weights, payload.rest)
    with pytest.raises(InputError, match="no safetensors file"):
        decode(sealed(b"12345678 and more"), payload.weights, payload.rest)
    nothing = b'{"__metadata__":null}   '
    with pytest.raises(InputError, match="no safetensors file"):
        decode(sealed(len(nothing).to_bytes(8, "little") + nothing), {}, {})
    with pytest.raises(InputError, match="precision must be one of"):
        encode(payload, found, precision="bfloat16")


@pytest.mark.parametrize("pruned", [False, True])
def test_the_length_of_a_plain_answer_does_not_depend_on_its_values(pruned: bool) -> None:
    site = Site(model(norm=False), StaticMask(0.5).sparsifier if pruned else None, 4, 1)
    wire = Wire(site.layout)
    task = Task(site.layout.read(), site.mask, 1)
    kept = torch.cat([site.mask, torch.ones(site.layout.size - site.layout.masked, dtype=torch.bool)])
    for samples in (7, 12, 1234):
        for scale in (0.0, 1e-30, 1.0, 1e30):
            values = torch.randn(site.layout.size) * scale * kept
            update = Update(values, site.mask, samples)
            assert wire.plain(update, task)
            assert wire.length(update, task) == sum(map(len, wire.answer(update, task)))
    other = site.mask.clone()
    other[0] = ~other[0]
    assert not wire.plain(Update(values, other, 7), task)
    assert not Wire(site.layout, "int8").plain(update, task)
    site.close()
