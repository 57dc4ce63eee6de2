"""One-shot pruning by data: against naive float64 solutions, hand-worked cases, and the layers' own outputs."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from callbacks import OneShot
from sparsity import InputError, Targets, masks
from sparsity.calibration import Calibration, Inputs, collect, columns, recompute_norms, stages
from sparsity.distributions import OWL, LayerAdaptive, Uniform
from sparsity.oneshot import OneShotSparsifier, SparseGPT, Wanda, _as_weight, _matrix, inverse_factor
from sparsity.patterns import NM, Row, Unstructured
from sparsity.permutation import best_order, permute_mlps
from sparsity.scores import Magnitude
from tests.nets import Batches, task, trainer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.proj(F.gelu(self.fc(x)))
        return result


class Net(nn.Module):
    """Three blocks and a head; the head is defined first and called last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def data(count: int = 4, size: int = 24) -> Callable[[], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(16, 16, generator=generator)  # inputs that belong together
    batches = [torch.randn(size, 16, generator=generator) @ mixing for _ in range(count)]
    return lambda: batches


def pruned(model: nn.Module, sparsity: float = 0.5, **settings: Any) -> OneShotSparsifier:
    sparsifier = OneShotSparsifier(sparsity, **settings)
    sparsifier.batches = data()
    sparsifier.attach(model)
    return sparsifier


def inputs(x: Tensor, products: bool) -> Inputs:
    found = Inputs(products)
    found.add(x[None])
    return found


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[3.0, -2.0, 1.0, 0.5], [1.0, 1.0, 1.0, -1.0]])
    x = torch.tensor([[1.0, 2.0, 0.0, 8.0], [1.0, -2.0, 0.0, -8.0]])
    assert inputs(x, products=False).norms().tolist() == [[1.0, 2.0, 0.0, 8.0]]
    for seen in (inputs(x, products=False), inputs(x, products=True)):
        mask, values = Wanda().prune(weight, seen, Row(), 4)
        assert mask.tolist() == [[False, True, False, True], [False, True, False, True]]  # 3 4 0 4 and 1 2 0 8
        assert torch.equal(values, weight)


def test_moments_are_sums_over_batches() -> None:
    x = torch.randn(10, 3, dtype=torch.float64)
    found = Inputs(products=True)
    found.add(x[None, :4])
    found.add(x[None, 4:])
    assert found.sums is not None
    torch.testing.assert_close(found.sums[0].double(), x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.norms()[0].double(), x.square().mean(0).sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, (3, 2), dilation=2, padding="same", bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Conv1d(4, 6, 3, padding=1, stride=2, bias=False),
        nn.Conv1d(4, 6, 3, groups=2, bias=False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_columns_times_the_matrix_are_the_layers_outputs(layer: nn.Module) -> None:
    x = torch.randn({nn.Linear: (3, 7, 6), nn.Conv2d: (3, 4, 9, 8), nn.Conv1d: (3, 4, 9)}[type(layer)])
    weight: Tensor = layer.weight  # type: ignore[assignment]  # a Tensor
    found = columns(layer, x)
    matrix = _matrix(weight).chunk(len(found))
    outputs = torch.cat([part @ rows.T for part, rows in zip(found, matrix, strict=True)], 1)
    expected = layer(x)
    channels = -1 if isinstance(layer, nn.Linear) else 1
    torch.testing.assert_close(outputs, expected.movedim(channels, -1).flatten(0, -2), rtol=1e-4, atol=1e-5)
    assert torch.equal(_as_weight(_matrix(weight), weight), weight)


def naive_sparsegpt(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Optimal brain surgeon by columns, from the definition: each pruned weight is made up for by those to its right,
    with the inverse of what is left of the Hessian, inverted anew each time."""
    weight = weight.clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(weight.shape[0]):
            if not mask[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight


@pytest.mark.parametrize("block", [3, 8, 128])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 4)], ids=lambda pattern: pattern.name)
def test_sparsegpt_is_the_naive_solution_for_its_mask(pattern: Any, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    weight = torch.randn(5, 16, generator=generator)
    count = 40 if pattern.name != "1:4" else 20
    seen = inputs(x, products=True)
    mask, values = SparseGPT(block=block).prune(weight, seen, pattern, count)
    assert int(mask.count_nonzero()) == count
    hessian = (x.T @ x).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(16)
    expected = naive_sparsegpt(weight.double(), hessian, mask)
    torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=1e-3)
    lost = ((x @ values.T - x @ weight.T).square().sum()) / ((x @ (weight * mask).T - x @ weight.T).square().sum())
    assert lost < 1, "it is to be better than the mask alone"


def test_sparsegpt_chooses_by_the_increase_of_the_loss() -> None:
    """In the first column block nothing has been updated: the score is w^2 over the inverse's pivots, by definition."""
    x, weight = torch.randn(100, 8), torch.randn(4, 8)
    mask, values = SparseGPT(update=False).prune(weight, inputs(x, products=True), Unstructured(), 16)
    hessian = (x.T @ x).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(8)
    pivots = torch.stack([torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(8)])
    score = (weight.double().square() / pivots).flatten()
    expected = torch.zeros(32, dtype=torch.bool)
    expected[score.topk(16).indices] = True
    assert torch.equal(mask.flatten(), expected)
    assert torch.equal(values, weight * mask)


def test_a_singular_hessian_is_damped_until_it_can_be_factored() -> None:
    one = torch.randn(1, 12)
    for x in (one.expand(40, 12), torch.zeros(40, 12), one.expand(40, 12) * 1e-20, one.expand(40, 12) * 1e12):
        x = x.clone()
        x[:, 5] = 0  # a dead input
        factor = inverse_factor(x.T @ x, 1e-18)
        assert torch.isfinite(factor).all()
        mask, values = SparseGPT(damping=1e-18).prune(torch.randn(3, 12), inputs(x, products=True), Unstructured(), 18)
        assert torch.isfinite(values).all()
        assert int(mask.count_nonzero()) == 18
        assert not values[:, 5].any()


def test_the_factor_is_that_of_the_inverse() -> None:
    x = torch.randn(50, 9, dtype=torch.float64)
    factor = inverse_factor(x.T @ x, 0.01)
    hessian = x.T @ x / (x.T @ x).diagonal().mean() + 0.01 * torch.eye(9)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian))
    assert torch.equal(factor, factor.triu())


def test_sparsegpt_knows_two_patterns() -> None:
    with pytest.raises(InputError, match='SparseGPT prunes "unstructured" or "N:M", got "channel"'):
        pruned(net(), score=SparseGPT(), pattern="channel")


SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": Magnitude(), "calibration": Calibration(4)},
    "Wanda": {"score": Wanda()},
    "Wanda 2:4": {"score": Wanda(), "pattern": "2:4"},
    "Wanda unstructured, OWL": {"score": Wanda(), "pattern": "unstructured", "distribution": OWL(2.0)},
    "Wanda, LAMP": {"score": Wanda(), "distribution": LayerAdaptive()},
    "SparseGPT": {"score": SparseGPT()},
    "SparseGPT 2:4": {"score": SparseGPT(), "pattern": "2:4"},
    "SparseGPT, OWL": {"score": SparseGPT(), "distribution": OWL(2.0)},
    "magnitude, OWL": {"score": Magnitude(), "distribution": OWL(2.0)},
    "magnitude 2:4, permuted": {"pattern": "2:4", "distribution": Uniform(), "calibration": Calibration(permute=True)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_count_is_exact_and_the_zeros_are_there(name: str) -> None:
    sparsity = 0.5 if "2:4" in name else 0.63
    model = net()
    sparsifier = pruned(model, sparsity, **SETTINGS[name])
    total = sum(mask.numel() for mask in sparsifier.masks.values())
    assert sum(masks.counts(sparsifier.masks).values()) == round((1 - sparsity) * total)
    for key, weight in sparsifier.weights().items():
        assert not weight[~sparsifier.masks[key]].any()
        assert weight.requires_grad
    assert model.training
    assert list(sparsifier.masks) == list(Targets().select(model))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("Wanda") or name == "magnitude"])
def test_methods_without_an_update_keep_the_values(name: str) -> None:
    model, before = net(), net()
    sparsifier = pruned(model, 0.5, **SETTINGS[name])
    for key, weight in sparsifier.weights().items():
        assert torch.equal(weight, before.get_parameter(key) * sparsifier.masks[key])


def test_rows_are_compared_inside_themselves() -> None:
    model = net()
    sparsifier = pruned(model, 0.5, score=Wanda())
    for mask in sparsifier.masks.values():
        assert (mask.sum(1) == mask.shape[1] // 2).all()


def test_later_blocks_see_pruned_ones() -> None:
    """Wanda, block by block, from the inputs that the pruned network gives."""
    model, by_hand = net(), net()
    pruned(model, 0.5, score=Wanda())
    batches = torch.cat(data()())
    with torch.no_grad():
        x = batches
        for block in by_hand.blocks:
            assert isinstance(block, Block)
            fc, proj = block.fc.weight, block.proj.weight
            kept = [Row()(fc.abs() * x.norm(dim=0), fc.numel() // 2),
                    Row()(proj.abs() * F.gelu(block.fc(x)).norm(dim=0), proj.numel() // 2)]  # fmt: skip
            fc *= kept[0]
            proj *= kept[1]
            x = block(x)
    for name in ("blocks.0.fc", "blocks.1.proj", "blocks.2.fc", "blocks.2.proj"):
        expected = by_hand.get_parameter(f"{name}.weight")
        torch.testing.assert_close(model.get_parameter(f"{name}.weight"), expected)


def test_sparsegpt_loses_less_than_wanda_and_magnitude() -> None:
    reference = net()
    x = torch.cat(data()())
    lost = {}
    for name, score in (("magnitude", Magnitude()), ("Wanda", Wanda()), ("SparseGPT", SparseGPT())):
        model = net()
        pruned(model, 0.5, score=score, distribution=Uniform(), calibration=Calibration(8))
        lost[name] = (model(x) - reference(x)).square().mean().item()
    assert lost["SparseGPT"] < min(lost["Wanda"], lost["magnitude"])


def test_stages_are_blocks_in_the_order_of_the_forward_pass() -> None:
    model = net()
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in Targets().select(model)}
    found = stages(model, layers, data()()[0])
    assert [names[0] for names in found] == [
        "blocks.0.fc.weight", "blocks.1.fc.weight", "blocks.2.fc.weight", "head.weight"]  # fmt: skip
    assert found[0] == ["blocks.0.fc.weight", "blocks.0.proj.weight"]


def test_passes_end_where_enough_was_seen() -> None:
    model, calls = net(), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    layers: dict[str, nn.Module] = {"blocks.0.fc.weight": model.blocks[0].fc}  # type: ignore[dict-item]  # a Linear
    found = collect(model, layers, data(5)(), products=False)
    assert len(calls) == 1, "the first pass counts the calls, the others end early"
    assert found["blocks.0.fc.weight"].tokens == 5 * 24


def test_a_layer_called_twice_is_seen_twice() -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    found = collect(model, {"0.weight": layer}, data(3)(), products=False)
    assert found["0.weight"].tokens == 3 * 24 * 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.one(x)
        return result


def refusing(batches: Callable[[], Iterable[Any]] | None, model: nn.Module, **settings: Any) -> str:
    sparsifier = OneShotSparsifier(0.5, **settings)
    sparsifier.batches = batches
    with pytest.raises(InputError) as caught:
        sparsifier.attach(model)
    return str(caught.value)


def test_bad_data_is_named() -> None:
    assert "the calibration data is empty" in refusing(lambda: [], net(), score=Wanda())
    assert "the inputs of 'blocks.0.fc.weight' on the calibration data are NaN" in refusing(
        lambda: [torch.full((3, 16), math.nan)], net(), score=Wanda()
    )
    assert "Wanda needs calibration data" in refusing(None, net(), score=Wanda())
    message = refusing(data(), Twice(), score=Wanda())
    assert "never calls the layers of ['two.weight']" in message
    assert "targets.exclude" in message
    recurrent = nn.GRU(16, 4)
    assert "GRU has no calibrated score" in refusing(data(), nn.Sequential(recurrent), score=Wanda())
    with pytest.raises(InputError, match="batches must be at least 1"):
        Calibration(batches=0)
    with pytest.raises(InputError, match="damping"):
        SparseGPT(damping=0)
    with pytest.raises(InputError, match="at='1ep': pruning by data is done before training"):
        OneShot(0.5, at="1ep", score=Wanda())


def test_scores_by_inputs_say_so_without_data() -> None:
    from sparsity import Sparsifier

    for score in (Wanda(), SparseGPT()):
        with pytest.raises(InputError, match="prune with data"):
            Sparsifier(0.5, score).attach(net())


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.9])
def test_owl_meets_the_budget_and_gives_blocks_with_outliers_more(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        f"blocks.{i}.{j}.weight": torch.rand(20 * (i + 1), 30, generator=generator) for i in range(3) for j in "ab"
    }
    scores["blocks.1.a.weight"][:, :3] *= 100
    counts = OWL(threshold=5, spread=0.08)(scores, density)
    total = sum(score.numel() for score in scores.values())
    assert sum(counts.values()) == round(density * total)
    kept = {name: count / scores[name].numel() for name, count in counts.items()}
    assert kept["blocks.1.a.weight"] == pytest.approx(kept["blocks.1.b.weight"], abs=2e-3)
    assert kept["blocks.0.a.weight"] == pytest.approx(kept["blocks.2.a.weight"], abs=2e-3)
    if density < 0.85:
        assert kept["blocks.1.a.weight"] - kept["blocks.0.a.weight"] == pytest.approx(0.16, abs=5e-3)


def test_owl_without_outliers_is_uniform() -> None:
    scores = {"blocks.0.weight": torch.rand(10, 10), "blocks.1.weight": torch.rand(30, 10)}
    assert OWL(threshold=50)(scores, 0.25) == {"blocks.0.weight": 25, "blocks.1.weight": 75}


def test_permutation_keeps_the_function_and_more_of_the_scores() -> None:
    model, before = net(), net()
    x = torch.cat(data()())
    found = permute_mlps(model, dict(Targets().select(model)), NM(2, 4))
    assert found == ["blocks.0", "blocks.1", "blocks.2"]
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)
    for index in range(3):
        one, other = (each.get_parameter(f"blocks.{index}.proj.weight").detach().abs() for each in (model, before))
        assert float((one * NM(2, 4).best(one)).sum()) > 1.01 * float((other * NM(2, 4).best(other)).sum())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8)])
def test_best_order_is_a_permutation_and_never_worse(n: int, m: int) -> None:
    pattern = NM(n, m)
    for seed in range(3):
        score = torch.rand(20, 32, generator=torch.Generator().manual_seed(seed))
        order = best_order(score, pattern)
        assert order.sort().values.tolist() == list(range(32))
        before, after = ((s * pattern.best(s)).sum() for s in (score, score[:, order]))
        assert after > before
    planted = torch.zeros(4, 16)
    planted[:, ::2] = 1.0  # already best: two of each four
    assert best_order(planted, NM(2, 4)).tolist() == list(range(16))


class Wrong(nn.Module):
    """Two layers whose hidden units are not free: they are told apart on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(torch.softmax(self.one(x), -1) * torch.arange(32))
        return result


def test_a_module_whose_units_are_not_free_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Wrong()
    before = copy.deepcopy(model.state_dict())
    assert permute_mlps(model, dict(Targets().select(model)), NM(2, 4)) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_norms_are_recomputed_as_means_over_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model.eval()
    sparsifier = OneShotSparsifier(0.5, Magnitude(), Uniform(), calibration=Calibration(norms=True))
    sparsifier.batches = data()
    sparsifier.attach(model)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    hidden = [model[0](x).detach() for x in data()()]
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    assert norm.momentum == 0.1
    assert not norm.training
    assert recompute_norms(nn.Linear(3, 3), data()()) == 0


def test_the_callback_prunes_by_the_training_data_and_trains_on() -> None:
    for score in (Wanda(), SparseGPT()):
        model = task()
        method = OneShot(0.5, score=score, calibration=Calibration(3), targets=Targets(exclude=["*unused*"]))
        trainer(method).fit(model, Batches())
        assert method.sparsifier.density() == pytest.approx(0.5, abs=1e-3)
        for name, weight in method.sparsifier.weights().items():
            assert not weight[~method.sparsifier.masks[name]].any()


def test_looking_at_data_does_not_change_what_training_draws() -> None:
    """Wanda and magnitude at the same seed: the batches of training, in the order that a shuffling loader gives."""
    from torch.utils.data import DataLoader

    seen: dict[str, list[float]] = {}

    class Noting(type(task())):  # type: ignore[misc]  # the class of the small task
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen[key].append(float(batch[0].sum()))
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]  # a loss

    examples = [(torch.randn(4, 6, 6), index % 3) for index in range(40)]
    for key, score in (("Wanda", Wanda()), ("magnitude", Magnitude())):
        seen[key] = []
        task()
        loader: Any = DataLoader(examples, batch_size=8, shuffle=True)  # type: ignore[arg-type]  # a list is a dataset
        model = Noting()
        method = OneShot(0.5, score=score, targets=Targets(exclude=["*unused*"]))
        trainer(method).fit(model, loader)
    assert seen["Wanda"] == seen["magnitude"]


class Conv1D(nn.Module):
    """As in `transformers`: the weight is [in, out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.clone())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("score", [Wanda(), SparseGPT()], ids=["Wanda", "SparseGPT"])
def test_transposed_layers_are_pruned_as_straight_ones(score: Any, pattern: str | None) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(16, 12), nn.Linear(12, 8)
    turned = nn.Sequential(*map(Conv1D, layers))
    straight = nn.Sequential(*layers)
    one = pruned(straight, 0.5, score=score, pattern=pattern)
    other = pruned(turned, 0.5, score=score, pattern=pattern)
    for name, mask in one.masks.items():
        assert torch.equal(mask.T, other.masks[name])
        torch.testing.assert_close(straight.get_parameter(name).T, turned.get_parameter(name))


def test_statistics_are_of_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsity import oneshot

    seen = []

    def watched(model: nn.Module, layers: dict[str, nn.Module], *more: Any) -> dict[str, Inputs]:
        seen.append(list(layers))
        return collect(model, layers, *more)

    monkeypatch.setattr(oneshot, "collect", watched)
    pruned(net(), 0.5, score=SparseGPT())
    assert [len(names) for names in seen] == [2, 2, 2, 1]


def test_every_block_is_shown_the_same_batches_of_a_shuffling_loader() -> None:
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(torch.randn(64, 16), batch_size=8, shuffle=True)  # type: ignore[arg-type]  # a tensor is a dataset
    sparsifier = OneShotSparsifier(0.5, Wanda(), calibration=Calibration(3))
    sparsifier.batches = lambda: loader
    state = torch.get_rng_state()
    first, again = list(sparsifier._data()), list(sparsifier._data())
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_owl_takes_inputs_where_there_is_data_also_for_magnitudes() -> None:
    found = [masks.counts(pruned(net(), 0.5, score=score, distribution=OWL(2.0, 0.2), pattern="unstructured").masks)
             for score in (Magnitude(), Wanda())]  # fmt: skip
    assert found[0] == found[1]
    weights = {name: each.detach().abs() for name, each in Targets().select(net()).items()}
    assert found[0] != OWL(2.0, 0.2)(weights, 0.5)


def test_sparsegpt_says_that_n_m_is_exact() -> None:
    with pytest.raises(InputError, match=r"SparseGPT prunes to 2:4 exactly, which is sparsity=0.5, got 0.2988"):
        pruned(net(), 0.3, score=SparseGPT(), pattern="2:4")


def test_the_gpus_random_state_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("seeds the GPUs")

    sparsifier = OneShotSparsifier(0.5, Wanda())
    sparsifier.batches = data()
    monkeypatch.setattr(torch, "manual_seed", refuse)
    assert len(list(sparsifier._data())) == 4


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_calibration_in_fit_is_in_the_trainers_precision(precision: str) -> None:
    model = task()
    method = OneShot(0.5, score=Wanda(), targets=Targets(exclude=["*unused*"]))
    trainer(method, precision=precision).fit(model, Batches())
    assert method.sparsifier.density() == pytest.approx(0.5, abs=1e-3)


def test_several_training_loaders_are_refused() -> None:
    method = OneShot(0.5, score=Wanda(), targets=Targets(exclude=["*unused*"]))
    with pytest.raises(InputError, match="from one dataloader; got a"):
        trainer(method).fit(task(), [Batches(), Batches()])


def test_a_compiled_network_is_calibrated() -> None:
    model = net()
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model(torch.randn(3, 16))  # compiled before there are hooks
    sparsifier = pruned(model, 0.5, score=Wanda())
    assert masks.fingerprint(sparsifier.masks) == masks.fingerprint(pruned(net(), 0.5, score=Wanda()).masks)


def test_products_have_all_of_their_digits() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = pruned(net(), 0.5, score=SparseGPT()).masks
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert masks.fingerprint(found) == masks.fingerprint(pruned(net(), 0.5, score=SparseGPT()).masks)
