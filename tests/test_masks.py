import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsity import masks
from sparsity.errors import InputError
from sparsity.masks import Masks

SHAPES = [(), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 3, 3), (0,), (4, 0), (1, 257)]


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


@pytest.fixture
def some() -> Masks:
    return {"conv.weight": drawn((4, 3, 3, 3)), "fc.weight": drawn((7, 11)), "bias": drawn((5,))}


def same(found: Masks, expected: Masks) -> bool:
    return list(found) == list(expected) and all(
        found[name].dtype == torch.bool and torch.equal(found[name], mask) for name, mask in expected.items()
    )


def test_full_keeps_everything() -> None:
    full = masks.full({"a": torch.zeros(2, 3), "b": nn.Parameter(torch.ones(4))})
    assert same(full, {"a": torch.tensor([[True] * 3] * 2), "b": torch.tensor([True] * 4)})
    assert not full["b"].requires_grad


def test_from_zeros_keeps_what_is_not_exactly_zero() -> None:
    tiny = 2.0**-149
    weights = {"a": nn.Parameter(torch.tensor([[1.0, 0.0, -0.0], [-2.0, tiny, 0.0]]))}
    assert same(masks.from_zeros(weights), {"a": torch.tensor([[True, False, False], [True, True, False]])})


def test_counts_and_density() -> None:
    both = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor([False] * 6)}
    assert masks.counts(both) == {"a": 3, "b": 0}
    assert masks.density(both) == 0.3
    assert masks.density({}) == 1.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_takes_a_bit_per_weight_and_unpack_gives_it_back(shape: tuple[int, ...]) -> None:
    mask = drawn(shape)
    bits = masks.pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-mask.numel() // 8),)
    assert same({"": masks.unpack(bits, shape)}, {"": mask})


def test_pack_by_hand() -> None:
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, False], [True, False, False]])
    assert masks.pack(mask).tolist() == [0b10000011, 0b01000000]


@pytest.mark.parametrize("layout", [lambda mask: mask.t(), lambda mask: mask[::2, 1:]], ids=["transposed", "sliced"])
def test_pack_goes_row_by_row_whatever_the_layout(layout: Callable[[Tensor], Tensor]) -> None:
    mask = layout(drawn((6, 7)))
    assert torch.equal(masks.pack(mask), masks.pack(mask.clone(memory_format=torch.contiguous_format)))
    assert torch.equal(masks.unpack(masks.pack(mask), tuple(mask.shape)), mask)


def test_unpacked_masks_can_be_changed_without_changing_the_bits() -> None:
    bits = masks.pack(torch.ones(8, dtype=torch.bool))
    masks.unpack(bits, (8,))[:] = False
    assert bits.tolist() == [255]


@pytest.mark.parametrize(("shape", "expected", "got"), [((9,), 2, 1), ((0,), 0, 1), ((3, 3, 3), 4, 1)])
def test_unpack_refuses_bits_of_another_size(shape: tuple[int, ...], expected: int, got: int) -> None:
    with pytest.raises(ValueError, match=rf"a mask of shape .* takes {expected} bytes, got {got}$"):
        masks.unpack(torch.zeros(got, dtype=torch.uint8), shape)


def test_state_goes_through_a_checkpoint_that_holds_tensors_and_primitives(some: Masks, tmp_path: Path) -> None:
    torch.save(masks.to_state(some), tmp_path / "state.ckpt")
    state = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert same(masks.from_state(state), some)
    assert sum(entry["bits"].numel() for entry in state.values()) == 14 + 10 + 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_files_give_back_what_was_saved(shape: tuple[int, ...], tmp_path: Path) -> None:
    saved = {"b": drawn(shape), "a.weight": drawn((3, 5))}
    masks.save(saved, tmp_path / "masks")
    assert same(masks.load(tmp_path / "masks"), saved)
    assert same(masks.load(str(tmp_path / "masks")), saved)


def test_a_file_of_no_masks(tmp_path: Path) -> None:
    masks.save({}, tmp_path / "masks")
    assert masks.load(tmp_path / "masks") == {}


def test_a_file_takes_a_bit_per_weight(tmp_path: Path) -> None:
    masks.save({"a": drawn((1000, 1003)), "b": drawn((999,))}, tmp_path / "masks")
    bits = 1000 * 1003 + 999
    assert bits / 8 <= (tmp_path / "masks").stat().st_size <= bits / 8 + 500


def test_loading_refuses_what_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=rf"no mask file at '{path}': give the path of .* sparsity\.masks\.save"):
            masks.load(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1])
def test_loading_refuses_a_truncated_file(size: int, some: Masks, tmp_path: Path) -> None:
    path = tmp_path / "masks"
    masks.save(some, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=rf"'{path}' is damaged or not a safetensors file \(.*\): restore it"):
        masks.load(path)


@pytest.mark.parametrize("seed", range(5))
def test_loading_refuses_random_bytes(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "masks"
    path.write_bytes(hashlib.sha512(bytes([seed])).digest())
    with pytest.raises(InputError, match=rf"'{path}' is damaged or not a safetensors file"):
        masks.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shapes"', b'"shopes"'),
        (b"[7, 11]", b"(7, 11]"),
        (b"[7, 11]", b"[7, 99]"),
        (b'fc.weight\\"', b'gc.weight\\"'),
    ],
    ids=["no shapes", "no json", "another size", "another name"],
)
def test_loading_refuses_a_damaged_header(old: bytes, new: bytes, some: Masks, tmp_path: Path) -> None:
    path = tmp_path / "masks"
    masks.save(some, path)
    sound = path.read_bytes()
    assert sound.count(old) == 1
    path.write_bytes(sound.replace(old, new))
    with pytest.raises(InputError, match=r"damaged|takes 87 bytes, got 10"):
        masks.load(path)


def test_no_flipped_bit_of_a_header_ends_in_another_error(some: Masks, tmp_path: Path) -> None:
    path = tmp_path / "masks"
    masks.save(some, path)
    sound = path.read_bytes()
    for place in range(8, len(sound) - 25):
        flipped = bytearray(sound)
        flipped[place] ^= 1 << place % 7
        path.write_bytes(flipped)
        with contextlib.suppress(InputError):
            masks.load(path)


@pytest.mark.parametrize(
    ("about", "got"), [(None, "None"), ({"format": "pt"}, "'pt'"), ({"format": "sparsity-masks-0"}, "")]
)
def test_loading_refuses_a_safetensors_file_of_something_else(about: dict[str, str], got: str, tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(3)}, tmp_path / "weights", metadata=about)
    with pytest.raises(InputError, match=rf"weights' holds no masks: its format is {got}.* not 'sparsity-masks-1'"):
        masks.load(tmp_path / "weights")


def test_fingerprint_is_equal_where_masks_are(some: Masks) -> None:
    copies = {name: some[name].clone() for name in reversed(some)}
    strided = some | {"fc.weight": some["fc.weight"].t().contiguous().t()}
    assert masks.fingerprint(copies) == masks.fingerprint(some) == masks.fingerprint(strided)


@pytest.mark.parametrize(
    "change",
    [
        lambda some: some | {"bias": ~some["bias"]},
        lambda some: some | {"bias": some["bias"] ^ torch.tensor([False] * 4 + [True])},
        lambda some: some | {"more": torch.ones(1, dtype=torch.bool)},
        lambda some: {name: mask for name, mask in some.items() if name != "bias"},
        lambda some: {name.replace("fc", "gc"): mask for name, mask in some.items()},
        lambda some: some | {"fc.weight": some["fc.weight"].view(11, 7)},
        lambda some: some | {"bias": torch.cat([some["bias"], torch.tensor([False])])},
    ],
    ids=["all bits", "one bit", "one more", "one less", "a name", "a shape", "padding"],
)
def test_fingerprint_differs_where_masks_do(change: Callable[[Masks], Masks], some: Masks) -> None:
    assert masks.fingerprint(change(some)) != masks.fingerprint(some)


def test_check_accepts_masks_in_any_order(some: Masks) -> None:
    masks.check({name: some[name] for name in reversed(some)}, some, "the file")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": (2,)}, r"^the file is for another model or other targets: it lacks 'b' and has nothing, which is no t"),
        ({"a": (2,), "b": (3,), "c": (1,)}, r"^the file is for another model .*: it lacks nothing and has 'c', which"),
        ({"x": (2,), "y": (3,)}, r"it lacks 'a', 'b' and has 'x', 'y', which is no target here$"),
        ({f"x{i}": (1,) for i in range(5)}, r"has 'x0', 'x1', 'x2' and 2 more, which is no target here$"),
        (
            {"a": (2,), "b": (1, 3)},
            r"^the file is for another model: its 'b' has shape \(1, 3\), the model's has \(3,\)$",
        ),
    ],
    ids=["missing", "unknown", "both", "many", "shape"],
)
def test_check_refuses_masks_of_another_model(found: dict[str, tuple[int, ...]], message: str) -> None:
    weights = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(InputError, match=message):
        masks.check({name: drawn(shape) for name, shape in found.items()}, weights, "the file")
