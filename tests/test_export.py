"""What is exported comes back as it was; what is no export of this model is refused, and the model left alone."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsity import InputError, export
from sparsity.export import bitmask, nm
from sparsity.export.tensors import KEY, opened
from sparsity.models import ResNet20
from sparsity.patterns import nm_mask
from sparsity.shrink import shrink


class Conv1D(nn.Module):
    """As in GPT-2: a linear layer whose weight is [in, out]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """Everything that goes wrong elsewhere: ties, a transposed layer, names without `weight`, an odd width, types."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(40, 32)
        self.turned = Conv1D(24, 32)
        self.lstm = nn.LSTM(24, 16, batch_first=True)
        self.odd = nn.Linear(16, 31)
        self.norm = nn.BatchNorm1d(31)
        self.narrow = nn.Linear(31, 64, dtype=torch.bfloat16)
        self.conv = nn.Conv2d(4, 8, 3)
        self.out = nn.Linear(1152, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("view", torch.arange(6.0).view(2, 3).t())

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.lstm(self.turned(self.token(tokens)))[0][:, -1]
        hidden = self.narrow(self.norm(self.odd(hidden)).bfloat16()).float()
        image = nn.functional.pad(hidden.view(-1, 4, 4, 4), (5, 5, 5, 5))
        logits: Tensor = self.head(self.out(self.conv(image).flatten(1)))
        return logits


def net(seed: int = 0, sparsity: float = 0.9) -> Net:
    """Weights by the seed, those of two axes or more pruned at random; some pruned to -0.0."""
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(torch.rand(weight.shape) >= sparsity)
    return model


def two_of_four(seed: int = 0) -> Net:
    model = net(seed, 0.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            face = weight.t() if name == "turned.weight" else weight
            if weight.ndim > 1 and face.shape[1] % 4 == 0:
                face.mul_(nm_mask(face, 2, 4))
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all tensors are equal to the bit, but for -0.0 and 0.0."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


MADE = {"dense": net, "compressed": net, "nm": two_of_four}


@pytest.fixture(params=MADE)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_storage_comes_back_exactly(form: str, path: Path) -> None:
    model, other = MADE[form](), net(1)
    result = export.save(model, path, form)
    assert export.load(path, other) is other
    assert same(model, other)
    assert other.head.weight is other.token.weight
    # 17 tensors, one of them once under two names
    dense = sum(v.numel() * v.element_size() for n, v in model.state_dict().items() if n != "head.weight")
    assert result == {
        "format": form, "file": str(path), "bytes": {"dense": dense, "written": len(path.read_bytes())},
    }  # fmt: skip
    if form != "dense":
        assert result["bytes"]["written"] < dense
    assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing else is left there"
    read = export.read(path)
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())


def test_special_values_come_back(path: Path) -> None:
    model, other = nn.Linear(64, 64), nn.Linear(64, 64)
    special = [torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45]
    with torch.no_grad():
        model.weight.zero_()
        model.weight[3, 5:10] = torch.tensor(special)
        model.weight[7] = -0.0
    export.save(model, path)
    export.load(path, other)
    assert torch.equal(other.weight[3, 5:10].view(torch.int32), torch.tensor(special).view(torch.int32))
    assert int(other.weight.count_nonzero()) == 5
    assert not other.weight[7].signbit().any(), "a packed -0.0 is 0.0"


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_types_come_back(kind: torch.dtype, path: Path) -> None:
    weight = (torch.randn(40, 64) * (torch.rand(40, 64) < 0.1)).to(kind)
    model, other = nn.Module(), nn.Module()
    model.register_buffer("weight", weight)
    other.register_buffer("weight", torch.zeros(40, 64).to(kind))
    export.save(model, path)
    assert "weight.bitmask" in opened(path)[0]
    export.load(path, other)
    found = other.get_buffer("weight")
    assert found.dtype == kind
    assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8).where(weight.view(torch.uint8) != 128, 0)) or (
        torch.equal(found.to(torch.complex128), weight.to(torch.complex128))
    )


def slow_bitmask(tensors: dict[str, Tensor], stem: str) -> list[list[float]]:
    """The weight as compressed-tensors describes its format, weight by weight."""
    rows, columns = (int(each) for each in tensors[f"{stem}.shape"])
    values, starts = tensors[f"{stem}.compressed"].tolist(), tensors[f"{stem}.row_offsets"].tolist()
    found = [[0.0] * columns for _ in range(rows)]
    for row in range(rows):
        place = starts[row]
        for column in range(columns):
            if int(tensors[f"{stem}.bitmask"][row, column // 8]) >> (column % 8) & 1:
                found[row][column] = values[place]
                place += 1
    return found


@pytest.mark.parametrize("layer", ["odd", "turned", "token"])
def test_the_bitmask_is_read_weight_by_weight(layer: str, path: Path) -> None:
    model = net()
    export.save(model, path)
    tensors = load_file(path)
    kinds = {"shape": torch.int64, "compressed": torch.float32, "bitmask": torch.uint8, "row_offsets": torch.int64}
    assert {part: tensors[f"{layer}.{part}"].dtype for part in kinds} == kinds
    assert slow_bitmask(tensors, layer) == model.get_parameter(f"{layer}.weight").tolist()


def test_bitmask_bytes_by_hand() -> None:
    weight = torch.tensor([[0, 5, 0, 0, 0, 0, 0, 0, 7, 0], [0.0] * 10, [1, 0, 0, 0, 0, 0, 0, 2, 0, 3]])
    parts = bitmask.pack(weight)
    assert parts["bitmask"].tolist() == [[2, 1], [0, 0], [129, 2]]
    assert parts["compressed"].tolist() == [5, 7, 1, 2, 3]
    assert parts["row_offsets"].tolist() == [0, 2, 2]
    assert parts["shape"].tolist() == [3, 10]


def test_files_of_compressed_tensors_are_read_and_ours_are_by_it(path: Path) -> None:
    module = "compressed_tensors.compressors.sparse_compressors.sparse_bitmask"
    theirs = pytest.importorskip(module, reason="compressed-tensors up to 0.14 is not installed").BitmaskCompressor()
    model, other = net(), net(1)
    plain = {name: value for name, value in model.state_dict().items() if value.ndim == 2 and name.endswith(".weight")}
    plain.pop("head.weight")
    export.save(model, path)
    ours, packed = load_file(path), theirs.compress(plain)
    assert {"odd.bitmask", "turned.compressed", "token.shape", "out.row_offsets"} <= packed.keys()
    assert all(torch.equal(value, ours[name]) and value.dtype == ours[name].dtype for name, value in packed.items())
    found = dict(theirs.decompress(str(path)))
    assert all(torch.equal(value, found[name]) for name, value in plain.items())
    assert found["conv.weight"].shape == (8, 36), "a matrix of a row for each output"

    rest = {name: value.clone() for name, value in model.state_dict().items() if name not in (*plain, "head.weight")}
    save_file({n: v.contiguous() for n, v in (packed | rest).items()}, path, metadata={"format": "pt"})
    export.load(path, other)
    assert same(model, other)


def test_sparse_24_bitmask_files_of_compressed_tensors_are_read(path: Path) -> None:
    module = "compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask"
    theirs = pytest.importorskip(module, reason="compressed-tensors up to 0.14 is not installed")
    weight = torch.randn(16, 32)
    weight.mul_(nm_mask(weight, 2, 4))
    found = theirs.Sparse24BitMaskTensor.from_dense(weight).dict("layer", "cpu")
    save_file({name: value.contiguous() for name, value in found.items()}, path)
    assert torch.equal(export.read(path)["layer.weight"], weight)


def test_a_folder_of_files_is_one_model(path: Path) -> None:
    model, other = net(), net(1)
    export.save(model, path)
    tensors, about = opened(path)
    names = sorted(tensors)
    metadata = {KEY: json.dumps(about)}
    save_file({name: tensors[name].clone() for name in names[::2]}, path.with_name("model-1.safetensors"), metadata)
    save_file({name: tensors[name].clone() for name in names[1::2]}, path.with_name("model-2.safetensors"))
    path.unlink()
    export.load(path.parent, other)
    assert same(model, other)
    save_file({names[0]: tensors[names[0]].clone()}, path)
    with pytest.raises(InputError, match=rf"has two of '{names[0]}', in different files"):
        export.load(path.parent, other)


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 4), ("1:4", 2), ("1:16", 4), ("3:5", 9), ("2:256", 16)])
def test_places_take_as_few_bits_as_the_pattern_needs(pattern: str, bits: int, path: Path) -> None:
    n, m = map(int, pattern.split(":"))
    model, other = nn.Linear(5 * 16 * 256, 3), nn.Linear(5 * 16 * 256, 3)
    with torch.no_grad():
        model.weight.mul_(nm_mask(model.weight, n, m))
    export.save(model, path, "nm", pattern)
    groups = model.weight.numel() // m
    assert load_file(path)["weight.places"].nbytes == ceil(groups * bits / 8)
    assert bits == n * ceil(log2(m))
    export.load(path, other)
    assert torch.equal(model.weight, other.weight)


def test_places_by_hand() -> None:
    weight = torch.tensor([[0, 5, 0, 6, 7, 0, 0, 0.0]])
    parts = nm.pack(weight, 2, 4)
    assert parts["values"].tolist() == [[5, 6], [7, 0]]
    # places 1 and 3, 0 and 1, two bits each, the lowest first: 01 11 00 01 from the right
    assert parts["places"].tolist() == [0b01_00_11_01]


def test_a_pattern_goes_along_the_inputs(path: Path) -> None:
    export.save(two_of_four(), path, "nm")
    packed = opened(path)[1]["packed"]
    assert packed["turned.weight"] == {"shape": [32, 24], "turned": True}
    assert packed["conv.weight"] == {"shape": [8, 4, 3, 3], "turned": False}
    assert "narrow.weight" not in packed, "31 inputs"
    with pytest.raises(InputError, match="no weight keeps at most 1 of each 4"):
        export.save(two_of_four(), path, "nm", "1:4")


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8)
    first, last = nn.Linear(8 * 16, 20), nn.Linear(20, 5, bias=False)
    with torch.no_grad():
        conv.weight[1:4] = 0
        norm.bias.uniform_(0.1, 1)
        first.weight[4:12] = 0
        last.weight[:, 15:] = 0
    found = nn.Sequential(nn.Sequential(conv, norm), nn.ReLU(), nn.Flatten(), first, nn.Dropout(0.1), nn.ReLU(), last)
    return found.eval()


def test_a_shrunk_model_comes_back_as_small_and_the_same(path: Path) -> None:
    model, x = chain(), torch.randn(7, 2, 6, 6)
    result = export.save(model, path, "shrunk")
    small = export.load(path, chain().train()).eval()
    expected = shrink(model)
    assert str(small) == str(expected)
    assert same(small, expected)
    assert torch.equal(small(x), expected(x))
    assert torch.allclose(small(x), model(x), atol=1e-5)
    assert next(tuple(each.shape) for each in small.parameters()) == (5, 2, 3, 3)
    assert result["bytes"]["written"] < result["bytes"]["dense"] / 2


def test_a_network_with_branches_is_shrunk_by_its_inputs(path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="of the extra `structured`")
    model, x = ResNet20().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.get_parameter("stages.0.0.conv1.weight")[:5] = 0
        model.get_parameter("stages.0.0.bn1.bias")[:5] = 0
    with pytest.raises(InputError, match="pass a batch of inputs, too"):
        export.save(model, path, "shrunk")
    export.save(model, path, "shrunk", inputs=(x,))
    small = export.load(path, ResNet20()).eval()
    assert len(small.get_parameter("stages.0.0.conv1.weight")) == 11
    torch.testing.assert_close(small(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_shrunk_model_is_loaded_like_the_one_it_was_made_of(path: Path) -> None:
    export.save(chain(), path, "shrunk")
    for other in (nn.Sequential(nn.Linear(2, 3)), nn.Sequential(*list(chain())[1:]), net()):
        with pytest.raises(InputError, match="manifest"):
            export.load(path, other)


def altered(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """The file with its tensors and what it says changed, as someone else would."""
    tensors, about = opened(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors, about)
    save_file(tensors, path, {KEY: json.dumps(about)})


def put(name: str, value: Any) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def say(value: Any, *keys: str) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        for key in keys[:-1]:
            about = about[key]
        about[keys[-1]] = value

    return change


HUGE = 1 << 40
LIES: dict[str, tuple[str, Callable[..., None], str]] = {
    "huge shape": ("compressed", put("odd.shape", torch.tensor([HUGE, HUGE])), "but its bitmask is"),
    "shape below zero": ("compressed", put("odd.shape", torch.tensor([-31, -16])), "is no shape"),
    "shape of floats": ("compressed", put("odd.shape", torch.tensor([31.0, 16.0])), "is no shape"),
    "another width": (
        "compressed",
        put("odd.shape", torch.tensor([31, 15])),
        "goes on after the last weight of a row of 15|keeps",
    ),
    "shape of nine": ("compressed", put("odd.shape", torch.ones(9, dtype=torch.int64)), "is no shape"),
    "one bit less": ("compressed", put("odd.bitmask", lambda bits: bits & (bits - 1)), "the bitmask of 'odd' keeps"),
    "bits all set": ("compressed", put("turned.bitmask", lambda bits: bits | 255), "the bitmask of 'turned' keeps"),
    "wide bitmask": ("compressed", put("odd.bitmask", lambda bits: bits.int()), "torch.int32"),
    "fewer values": ("compressed", put("odd.compressed", lambda values: values[1:].clone()), "the file has"),
    "moved rows": ("compressed", put("odd.row_offsets", lambda rows: rows + 1), "row offsets of 'odd'"),
    "other type": ("compressed", put("odd.compressed", lambda values: values.double()), "torch.float64"),
    "twice": ("compressed", put("norm.weight.x", torch.ones(2)), "1 that it does not know"),
    "both ways": ("compressed", lambda t, a: t.update({"odd.weight": torch.ones(31, 16)}), "is there twice"),
    "names": ("compressed", say([1], "names"), "names and shapes of the packed weights are damaged"),
    "taken name": ("compressed", say({"odd": "out.weight"}, "names"), "is there twice|of another model"),
    "a shape": ("compressed", say([HUGE, HUGE], "shapes", "conv.weight"), "cannot have the shape"),
    "endless shape": ("compressed", say([1 << 70], "shapes", "conv.weight"), "cannot have the shape"),
    "shapes": ("compressed", say("no", "shapes", "conv.weight"), "cannot have the shape"),
    "ties": ("compressed", say({"head.weight": "nowhere"}, "ties"), "is tied to 'nowhere', which is not there"),
    "more ties": ("dense", say({"norm.bias": "norm.weight"}, "ties"), "'norm.bias' is tied to"),
    "format": ("dense", say("pickled", "format"), "the format 'pickled' is not known"),
    "version": ("dense", say(99, "version"), "written by another version"),
    "pattern": ("nm", say("1:99999999999", "pattern"), "unknown|is packed, with M of at most 256"),
    "number": ("nm", say("9" * 5000, "pattern"), "is packed, with M of at most 256"),
    "other pattern": ("nm", say("1:4", "pattern"), "its values are"),
    "packed": ("nm", say([], "packed"), "the list of the packed weights is damaged"),
    "huge nm": ("nm", say([HUGE, HUGE], "packed", "out.weight", "shape"), "its values are"),
    "no shape": ("nm", say(["a", None], "packed", "out.weight", "shape"), "is no shape"),
    "no entry": ("nm", say(None, "packed", "out.weight"), "something is missing or damaged"),
    "no parts": ("nm", say({"shape": [1, 4], "turned": False}, "packed", "x"), "something is missing or damaged"),
    "places": ("nm", put("out.weight.places", lambda places: places * 0), "are no 2 different ones of 4"),
    "few places": ("nm", put("out.weight.places", lambda places: places[1:].clone()), "bytes of places"),
    "wide places": ("nm", put("out.weight.places", lambda places: places.int()), "bytes of places"),
    "few values": ("nm", put("out.weight.values", lambda values: values[1:].clone()), "its values are"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_contradicts_itself_is_refused(lie: str, path: Path) -> None:
    form, change, message = LIES[lie]
    export.save(MADE[form](), path, form)
    altered(path, change)
    model, before = net(1), net(1)
    with pytest.raises(InputError, match=message):
        export.load(path, model)
    assert same(model, before)


def resized(*shape: int) -> Callable[..., None]:
    """Another first weight, and a manifest that agrees with it."""

    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        tensors["0.0.weight"], about["manifest"]["0.0"]["weight"] = torch.ones(shape), list(shape)

    return change


SMALLER: dict[str, tuple[Callable[..., None], str]] = {
    "huge": (say([HUGE, 2, 3, 3], "manifest", "0.0", "weight"), "the manifest does not have '0.0.weight' as it is"),
    "none": (say(None, "manifest"), "has no manifest"),
    "larger": (resized(9, 2, 3, 3), r"'0.0.weight' has the shape \[9, 2, 3, 3\] in the manifest"),
    "apart": (resized(4, 2, 3, 3), "says it has"),
}


@pytest.mark.parametrize("lie", SMALLER)
def test_a_manifest_that_is_not_the_models_is_refused(lie: str, path: Path) -> None:
    change, message = SMALLER[lie]
    export.save(chain(), path, "shrunk")
    altered(path, change)
    with pytest.raises(InputError, match=message):
        export.load(path, chain())


@pytest.mark.parametrize("part", [0, 4, 8, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(form: str, part: float, path: Path) -> None:
    export.save(MADE[form](), path, form)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    model = net(1)
    with pytest.raises(InputError, match="truncated, damaged or no safetensors file"):
        export.load(path, model)
    assert same(model, net(1))


def raw(path: Path, header: bytes, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def test_a_header_that_lies_is_refused(path: Path) -> None:
    huge = {"weight": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4 * HUGE * HUGE % (1 << 63)]}}
    deep = b'{"__metadata__":{"sparsity":"' + b"[" * 50_000 + b'"}}'
    for header in (json.dumps(huge).encode(), b"{}" * 3, b"{", deep):
        raw(path, header, b"\0" * 16)
        with pytest.raises(InputError, match="truncated, damaged or no safetensors file"):
            export.load(path, nn.Linear(2, 2))
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(InputError, match="truncated, damaged or no safetensors file"):
        export.load(path, nn.Linear(2, 2))


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False, None])
def test_a_pickle_is_refused_and_not_run(zipped: bool | None, path: Path) -> None:
    mark = path.with_name("ran")
    if zipped is None:
        path.write_bytes(pickle.dumps({"weight": Runs(mark)}))
    else:
        torch.save({"weight": Runs(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="is a zip file or a pickle"):
        export.load(path, nn.Linear(2, 2))
    assert not mark.exists()


def test_a_missing_file_is_refused(path: Path) -> None:
    for missing in (path, path.parent):
        with pytest.raises(InputError, match="no exported file at"):
            export.read(missing)


def test_another_model_is_refused(form: str, path: Path) -> None:
    export.save(MADE[form](), path, form)
    with pytest.raises(InputError, match=r"is of another model: it lacks 2 .* and has 2\d that it does not know"):
        export.load(path, nn.Linear(2, 2))
    model = net()
    model.odd = nn.Linear(16, 30)
    with pytest.raises(InputError, match=r"is of another model: its 'odd\.\w+' is \[31"):
        export.load(path, model)
    with pytest.raises(InputError, match=r"of torch.float32, the model's is .* of torch.float16"):
        export.load(path, net().half())


def test_ties_of_the_model_are_filled_in_and_have_to_hold(path: Path) -> None:
    model, untied = net(), net(1)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    export.save(model, path)
    export.load(path, untied)
    assert torch.equal(untied.head.weight, model.token.weight)
    # transformers leaves tied names out of its files
    plain = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    del plain["token.weight"]
    save_file(plain, path)
    other = net(1)
    export.load(path, other)
    assert same(model, other)
    plain["token.weight"] = plain["head.weight"] + 1
    save_file(plain, path)
    with pytest.raises(InputError, match=r"the model ties 'head.weight' to 'token.weight', which differ"):
        export.load(path, net(1))


def test_a_compiled_model_has_its_own_names(path: Path) -> None:
    plain, other = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))
    export.save(torch.compile(plain, backend="eager"), path)  # type: ignore[arg-type]  # it is a module
    export.load(path, other)
    assert same(plain, other)
    export.save(plain, path)
    export.load(path, torch.compile(nn.Sequential(nn.Linear(32, 32)), backend="eager"))  # type: ignore[arg-type]  # too


def test_what_cannot_be_written_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="no format is called 'zip': take one of dense, compressed"):
        export.save(net(), path, "zip")
    with pytest.raises(InputError, match=r"'weight' is no plain tensor"):
        export.save(nn.Linear(2, 2, device="meta"), path)
    with pytest.raises(InputError, match="is traced: give inputs"):
        export.save(net(), path, "torch")
    layer = nn.Linear(64, 64)
    layer.register_buffer("bitmask", torch.ones(2))
    nn.init.zeros_(layer.weight)
    clash = nn.ModuleDict({"a": layer})
    with pytest.raises(InputError, match=r"'a.bitmask' is a tensor of the model and a part of a packed weight"):
        export.save(clash, path)
    for form in ("dense", "torch"):
        with pytest.raises(InputError, match="is a folder"):
            export.save(nn.Linear(2, 2), path.parent, form, inputs=(torch.ones(2, 2),))
    assert not list(path.parent.iterdir())


def test_an_interrupted_export_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export.save(net(), path)
    old = path.read_bytes()

    def interrupted(tensors: object, partial: Path, metadata: object) -> None:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsity.export.tensors.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.save(net(1), path)
    assert path.read_bytes() == old
    assert [each.name for each in path.parent.iterdir()] == [path.name]


class Plain(nn.Module):
    """Without the layers that torch's exporters know by names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.conv(x))).flatten(1))
        return logits


def plain() -> Plain:
    torch.manual_seed(0)
    model = Plain()
    with torch.no_grad():
        model.head.weight.mul_(torch.rand(3, 64) < 0.2)
        model.norm.running_mean.normal_()  # type: ignore[union-attr]  # it has statistics
    return model


def test_a_program_of_torch_gives_the_same_for_batches_of_any_size(tmp_path: Path) -> None:
    model = plain()
    export.save(model, tmp_path / "model.pt2", "torch", inputs=(torch.randn(2, 1, 6, 6),))
    assert model.training, "as it was"
    program = torch.export.load(tmp_path / "model.pt2").module()
    for size in (2, 5):
        x = torch.randn(size, 1, 6, 6)
        assert torch.allclose(program(x), model.eval()(x), atol=1e-6)
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]
    with pytest.raises(InputError, match="is a zip file or a pickle"):
        export.load(tmp_path / "model.pt2", model)


def test_onnx_gives_the_same_for_batches_of_any_size(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: the extra `export`")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: the extra `export`")
    from onnx.reference import ReferenceEvaluator

    model = plain()
    path = tmp_path / "model.onnx"
    result = export.save(model, path, "onnx", inputs=(torch.randn(2, 1, 6, 6),))
    assert result["bytes"]["written"] == path.stat().st_size
    evaluator = ReferenceEvaluator(str(path))
    for size in (2, 5):
        x = torch.randn(size, 1, 6, 6)
        [found] = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
        assert torch.allclose(torch.from_numpy(found), model.eval()(x), atol=1e-5)
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 1, 6, 6)
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), model.eval()(x), atol=1e-5)


def test_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsity.export.program.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx and onnxscript: pip install 'lightning-sparsity\[export\]'"):
        export.save(plain(), tmp_path / "model.onnx", "onnx", inputs=(torch.randn(2, 1, 6, 6),))


def test_what_cannot_be_traced_is_said(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(InputError, match=r"torch\.export cannot trace Branches"):
        export.save(Branches(), tmp_path / "model.pt2", "torch", inputs=(torch.ones(2),))
