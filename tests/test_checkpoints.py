import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparsity import masks
from sparsity.checkpoints import load_weights, read, without_masks
from sparsity.errors import InputError

DAMAGED = r"^the checkpoint '{}' is truncated or corrupt: take an earlier one or save it again$"
FOREIGN = r"^'{}' holds pickled objects, which could run code when loaded: save tensors and primitives only$"


class Runs:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class WithExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


@pytest.fixture
def sound(path: Path) -> bytes:
    torch.save({"state_dict": nn.Linear(3, 4).state_dict(), "epoch": 3}, path)
    return path.read_bytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_is_read(path: Path, zipped: bool) -> None:
    contents = {"state_dict": {"weight": torch.arange(6.0).view(2, 3)}, "epoch": 3, "callbacks": {"A": [1, "b", None]}}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    found = read(path)
    assert torch.equal(found.pop("state_dict")["weight"], torch.arange(6.0).view(2, 3))
    assert found == {"epoch": 3, "callbacks": {"A": [1, "b", None]}}
    assert read(str(path))["epoch"] == 3


def test_a_missing_checkpoint_is_refused(path: Path) -> None:
    for missing in (path, path.parent):
        with pytest.raises(InputError, match=rf"^no checkpoint at '{missing}'$"):
            read(missing)


@pytest.mark.parametrize("part", [0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(sound: bytes, path: Path, part: float) -> None:
    path.write_bytes(sound[: int(part * len(sound))])
    with pytest.raises(InputError, match=DAMAGED.format(path)):
        read(path)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_first_bytes_of_a_checkpoint_are_refused(sound: bytes, path: Path, size: int) -> None:
    path.write_bytes(sound[:size])
    with pytest.raises(InputError, match=DAMAGED.format(path)):
        read(path)


@pytest.mark.parametrize("part", [0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_a_truncated_checkpoint_of_the_old_format_is_refused(path: Path, part: float) -> None:
    torch.save({"state_dict": nn.Linear(3, 4).state_dict()}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(InputError, match=DAMAGED.format(path)):
        read(path)


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_ends_within_the_name_of_a_class_is_damaged(path: Path, whole: bool) -> None:
    torch.save({"state_dict": {}, "more": Path("a")}, path, _use_new_zipfile_serialization=False)
    found = path.read_bytes()
    if not whole:
        path.write_bytes(found[: found.index(b"pathlib") + 3])
    with pytest.raises(InputError, match="holds pickled objects" if whole else DAMAGED.format(path)):
        read(path)


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_are_refused(path: Path, seed: int) -> None:
    path.write_bytes(random.Random(seed).randbytes(500))
    with pytest.raises(InputError, match=DAMAGED.format(path)):
        read(path)


@pytest.mark.parametrize(
    "text",
    ["hello: world\n", "name,value\na,1\n", '{"a": 1}', "<html></html>", "import torch\n", "\x89PNG\r\n\x1a\n", "\n"],
)
def test_files_of_another_kind_are_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InputError, match=DAMAGED.format(path)):
        read(path)


# torch's own remark about pickles that it did not write.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("saved_by", ["torch", "old torch", "pickle", "pickle 2"])
def test_a_pickled_object_is_refused_and_not_run(path: Path, saved_by: str) -> None:
    mark = path.parent / "ran"
    contents = {"state_dict": {}, "hyper_parameters": Runs(mark)}
    if saved_by.startswith("pickle"):
        path.write_bytes(pickle.dumps(contents, protocol=2 if saved_by == "pickle 2" else None))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=saved_by == "torch")
    # Protocols that torch.save never writes are not told apart from damage.
    message = DAMAGED if saved_by == "pickle" else FOREIGN
    with pytest.raises(InputError, match=message.format(path)):
        read(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(contents))
    assert mark.exists()


def test_a_whole_pickled_module_is_refused(path: Path) -> None:
    torch.save(nn.Linear(2, 3), path)
    with pytest.raises(InputError, match=FOREIGN.format(path)):
        read(path)


@pytest.mark.parametrize(("contents", "kind"), [(torch.ones(3), "Tensor"), ([1, 2], "list"), (None, "NoneType")])
def test_what_is_no_dictionary_is_refused(path: Path, contents: object, kind: str) -> None:
    torch.save(contents, path)
    with pytest.raises(InputError, match=rf"^'{path}' is no checkpoint: it holds a {kind}, not a dictionary$"):
        read(path)


def test_weights_are_loaded(path: Path) -> None:
    saved, model = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    saved(torch.randn(8, 4))
    nn.init.uniform_(saved.weight)
    torch.save({"state_dict": saved.state_dict(), "epoch": 1}, path)
    load_weights(model, path)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    assert int(model.num_batches_tracked or 0) == 1


def test_a_model_with_extra_state_loads_its_own_checkpoint(path: Path) -> None:
    saved, model = WithExtraState(), WithExtraState()
    saved.calls = 7
    torch.save({"state_dict": saved.state_dict()}, path)
    load_weights(model, path)
    assert model.calls == 7
    assert torch.equal(model.weight, saved.weight)


@pytest.mark.parametrize(
    "contents", [{}, {"weight": torch.ones(2)}, {"state_dict": [1]}], ids=["empty", "bare", "list"]
)
def test_a_checkpoint_without_weights_is_refused(path: Path, contents: dict[str, Any]) -> None:
    torch.save(contents, path)
    with pytest.raises(InputError, match=rf"^'{path}' has no 'state_dict': give a checkpoint that a Lightning trainer"):
        load_weights(nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("saved", "count", "example"),
    [
        (nn.Linear(3, 5), 2, "bias"),
        (nn.Linear(4, 4), 1, "weight"),
        (nn.Linear(3, 4, bias=False), 1, "bias"),
        (nn.Bilinear(3, 1, 4), 1, "weight"),
        (nn.Sequential(nn.Linear(3, 4)), 4, "0.bias"),
        (nn.Identity(), 2, "bias"),
    ],
    ids=["outputs", "inputs", "missing", "axes", "names", "empty"],
)
def test_weights_of_another_model_are_refused(path: Path, saved: nn.Module, count: int, example: str) -> None:
    torch.save({"state_dict": saved.state_dict()}, path)
    model = nn.Linear(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = rf"^'{path}' is for another model: {count} of its tensors .*, for example '{example}'$"
    with pytest.raises(InputError, match=message):
        load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def pruned_by_torch() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5), nn.LSTM(5, 3))
    prune.random_unstructured(model[0], "weight", 0.5)  # type: ignore[no-untyped-call]  # torch's
    for parts in ([(model[2], "weight"), (model[2], "bias")], [(model[3], "weight_hh_l0")]):
        prune.global_unstructured(parts, prune.L1Unstructured, amount=0.5)
    return model


def test_masks_of_torch_prune_become_ours(path: Path) -> None:
    model = pruned_by_torch()
    state, found = without_masks(model.state_dict())
    assert set(found) == {"0.weight", "2.weight", "2.bias", "3.weight_hh_l0"}
    for name, mask in found.items():
        owner, _, leaf = name.rpartition(".")
        computed = getattr(model.get_submodule(owner), leaf)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, model.get_buffer(f"{name}_mask").bool())
        assert torch.equal(state[name], computed)
        assert not state[name][~mask].signbit().any()
    plain = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5), nn.LSTM(5, 3))
    plain.load_state_dict(state)
    masks.save(found, path)
    assert masks.fingerprint(masks.load(path)) == masks.fingerprint(found)


def test_a_checkpoint_of_torch_prune_is_loaded(path: Path) -> None:
    model = pruned_by_torch()
    torch.save({"state_dict": model.state_dict()}, path)
    plain = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5), nn.LSTM(5, 3))
    load_weights(plain, path)
    image = torch.randn(4, 2, 3, 3)
    assert torch.equal(plain(image)[0], model(image)[0])


def test_a_state_without_masks_is_left_as_it_is() -> None:
    state = {"a.weight": torch.ones(2), "attn_mask": torch.ones(2), "b_orig": torch.ones(1)}
    assert without_masks(state) == (state, {})


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.tensor([0.5, 1.0]), torch.tensor([torch.nan, 1.0]), 1, None])
def test_what_is_no_mask_is_refused(mask: Any) -> None:
    with pytest.raises(InputError, match="'a_mask' is no mask of 'a_orig'"):
        without_masks({"a_orig": torch.ones(2), "a_mask": mask})
