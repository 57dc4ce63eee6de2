from typing import Any

import pytest
import torch
from torch import nn

from callbacks import StaticMask
from sparsity.targets import Targets


class Conv1D(nn.Module):
    """As in GPT-2: a Linear whose weight is [in, out]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class MyConv(nn.Conv2d):
    pass


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.token = nn.Embedding(10, 8)
        self.patch = nn.Conv2d(3, 8, 2)
        self.norm = nn.LayerNorm([6, 8])
        self.attention = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
        self.head = nn.Linear(8, 10)


MATRICES = ["patch.weight", "attention.in_proj_weight", "attention.out_proj.weight",
            "mlp.0.weight", "mlp.2.weight", "head.weight"]  # fmt: skip


def names(model: nn.Module, **settings: Any) -> list[str]:
    return list(Targets(**settings).select(model))


def test_by_default_matrices_and_filters_are_targets_in_the_order_of_the_model() -> None:
    model = Transformer()
    assert names(model) == MATRICES
    assert all(weight is model.get_parameter(name) for name, weight in Targets().select(model).items())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 4), ["weight"]),
        (nn.Bilinear(3, 4, 2), ["weight"]),
        (nn.Conv1d(3, 4, 2), ["weight"]),
        (nn.Conv2d(4, 4, 2, groups=4), ["weight"]),
        (nn.Conv3d(3, 4, 2), ["weight"]),
        (nn.ConvTranspose1d(3, 4, 2), ["weight"]),
        (nn.ConvTranspose2d(3, 4, 2), ["weight"]),
        (nn.ConvTranspose3d(3, 4, 2), ["weight"]),
        (MyConv(3, 4, 2), ["weight"]),
        (Conv1D(3, 4), ["weight"]),
        (nn.LSTM(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (
            nn.GRU(3, 4, bidirectional=True),
            ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
        ),
        (nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(8, 2), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(8, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_weights_of_each_kind_of_module_are_targets_and_biases_are_not(module: nn.Module, expected: list[str]) -> None:
    assert names(module) == expected
    assert names(nn.ModuleDict({"inner": module})) == [f"inner.{name}" for name in expected]


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm([3, 4]),
        nn.BatchNorm2d(3),
        nn.GroupNorm(1, 3),
        nn.Embedding(3, 4),
        nn.EmbeddingBag(3, 4),
        nn.PReLU(3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_norms_and_embeddings_are_left_alone(module: nn.Module) -> None:
    assert names(nn.Sequential(module, nn.Linear(3, 4))) == ["1.weight"]
    with pytest.raises(
        ValueError, match=r"^no parameter to prune: include=\['\*'\], exclude=\[\] and types=\['Linear'"
    ):
        names(module)


@pytest.mark.parametrize("name", ["position", "token.weight", "norm.weight", "norm.bias", "mlp.0.bias", "mlp.1.weight"])
def test_a_name_that_is_spelled_out_is_taken_whatever_it_is(name: str) -> None:
    assert names(Transformer(), include=[name]) == [name]
    assert set(names(Transformer(), include=["*", name])) == {*MATRICES, name}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"include": ["mlp*"]}, ["mlp.0.weight", "mlp.2.weight"]),
        ({"include": ["mlp.?.weight", "head.*"]}, ["mlp.0.weight", "mlp.2.weight", "head.weight"]),
        ({"include": ["*norm*", "head*"]}, ["head.weight"]),
        ({"exclude": ["attention*", "mlp*"]}, ["patch.weight", "head.weight"]),
        ({"include": ["mlp.0.weight", "head*"], "exclude": ["mlp*"]}, ["head.weight"]),
        ({"types": ["Linear"]}, ["attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight", "head.weight"]),
        ({"types": ["Conv2d", "Embedding"]}, ["token.weight", "patch.weight"]),
        ({"types": ["LayerNorm"]}, ["norm.weight"]),
    ],
    ids=str,
)
def test_include_exclude_and_types(settings: dict[str, list[str]], expected: list[str]) -> None:
    assert names(Transformer(), **settings) == expected


def test_globs_tell_capitals_apart() -> None:
    with pytest.raises(ValueError, match=r"'HEAD\.weight' matches no parameter"):
        names(Transformer(), include=["HEAD.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"include": ["haed.weight"]},
            r"^'haed\.weight' matches no parameter of .*; the nearest names are \['head\.weight'",
        ),
        ({"include": ["*", "mlp.1.wieght"]}, r"^'mlp\.1\.wieght' matches no parameter .*'mlp\.1\.weight'"),
        ({"exclude": ["heads.*"]}, r"^'heads\.\*' matches no parameter of the model; .*'head\.weight'"),
        (
            {"types": ["linear"]},
            r"types=\['linear'\] leave none of 18 parameters; name one in `include`, .*'position'$",
        ),
        ({"include": ["head*"], "exclude": ["*weight"]}, r"include=\['head\*'\], exclude=\['\*weight'\] and types="),
    ],
    ids=["include", "second include", "exclude", "types", "nothing left"],
)
def test_settings_that_select_nothing_are_refused(settings: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(Transformer(), **settings)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'\*' matches no parameter of the model"):
        names(nn.ReLU())


def test_frozen_parameters_count() -> None:
    model = Transformer().requires_grad_(False)
    model.head.requires_grad_(True)
    assert names(model) == MATRICES


def two_linears(tie: str) -> nn.ModuleDict:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    if tie == "parameter":
        second.weight = first.weight
    elif tie == "storage":
        second.weight = nn.Parameter(first.weight.detach())
    return nn.ModuleDict({"a": first, "b": first if tie == "module" else second, "c": nn.Linear(4, 4)})


@pytest.mark.parametrize("tie", ["parameter", "storage", "module"])
def test_tied_weights_are_one_target_under_their_first_name(tie: str) -> None:
    model = two_linears(tie)
    assert names(two_linears("no")) == ["a.weight", "b.weight", "c.weight"]
    assert names(model) == ["a.weight", "c.weight"]
    assert names(model, include=["b.*"]) == ["a.weight"]
    assert names(model, include=["b.weight"]) == ["a.weight"]
    assert names(model, exclude=["b.*"]) == ["c.weight"]


def test_two_parameters_in_one_piece_of_memory_are_not_trained_both() -> None:
    model = two_linears("storage")
    b_weight = model["b"].get_parameter("weight")
    message = r"^'a\.weight' and 'b\.weight' are two parameters in one piece of memory"
    with pytest.raises(ValueError, match=message):
        StaticMask(0.5).sparsifier.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    others = [each for each in model.parameters() if each is not b_weight]
    StaticMask(0.5).sparsifier.attach(model, torch.optim.SGD(others, lr=0.1))
    StaticMask(0.5).sparsifier.attach(model)
    b_weight.requires_grad_(False)
    StaticMask(0.5).sparsifier.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tied = two_linears("parameter")
    StaticMask(0.5).sparsifier.attach(tied, torch.optim.SGD(tied.parameters(), lr=0.1))


def test_a_head_tied_to_an_embedding_is_left_alone_unless_it_is_named() -> None:
    model = nn.ModuleDict({"token": nn.Embedding(10, 8), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 10, bias=False)})
    assert names(model) == ["fc.weight", "head.weight"]
    model["head"].weight = model["token"].weight
    assert names(model) == ["fc.weight"]
    assert names(model, include=["fc*", "head*"]) == ["fc.weight"]
    assert names(model, include=["head.weight"]) == ["token.weight"]
    assert names(model, types=["Linear", "Embedding"]) == ["token.weight", "fc.weight"]
    assert names(model, include=["*", "token.weight"], exclude=["head*"]) == ["fc.weight"]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tensors_without_memory_are_not_tied(device: str) -> None:
    size = 3 if device == "meta" else 0
    model = nn.ModuleDict({name: Conv1D(size, size) for name in "ab"}).to(device)
    assert names(model) == ["a.weight", "b.weight"]


def test_a_lazy_module_is_refused_by_name_until_it_has_a_shape() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(5), nn.LazyBatchNorm1d())
    with pytest.raises(
        ValueError, match=r"^'1\.weight' has no shape yet: run one forward pass through the lazy module"
    ):
        names(model)
    model(torch.ones(2, 4))
    assert names(model) == ["0.weight", "1.weight"]


def test_names_are_those_before_compiling() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    inner, whole = torch.compile(model[1], backend="eager"), torch.compile(nn.Linear(3, 4), backend="eager")
    assert isinstance(inner, nn.Module)
    assert isinstance(whole, nn.Module)
    model[1] = inner
    assert names(model) == ["0.weight", "1.0.weight"]
    assert names(model, include=["1.0.weight"], exclude=["0.*"]) == ["1.0.weight"]
    assert names(whole) == ["weight"]
