import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsity.distributions import (
    ER,
    ERK,
    Distribution,
    Global,
    LayerAdaptive,
    PerLayer,
    ScaledERK,
    Uniform,
    UniformPlus,
    budget,
    er,
    erk,
    scaled_erk,
    uniform,
    uniform_plus,
)
from sparsity.errors import InputError
from sparsity.schedules import Linear
from sparsity.scores import Magnitude, Scores, lamp
from sparsity.sparsifier import Sparsifier

Shapes = dict[str, tuple[int, ...]]
Counts = dict[str, int]

MLP: Shapes = {"1": (300, 784), "2": (100, 300), "3": (10, 100)}
CNN: Shapes = {"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "conv3": (64, 32, 1, 1), "fc": (10, 64)}
ODD: Shapes = {"a": (7, 13), "b": (101, 3), "c": (1, 50), "d": (5, 5, 5), "e": (11, 2, 3, 1)}
NETS = pytest.mark.parametrize("shapes", [MLP, CNN, ODD], ids=["mlp", "cnn", "odd"])
DENSITIES = pytest.mark.parametrize("density", [1.0, 0.999, 0.5, 1 / 3, 0.2, 0.12])
DISTRIBUTIONS = [Uniform(), UniformPlus(), ER(), ERK(), ScaledERK(), Global(), Global(0.003), PerLayer({"*": 0.9})]
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda each: type(each).__name__)


def sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def total(shapes: Shapes) -> int:
    return sum(sizes(shapes).values())


def normal(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def equal(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def tied(shapes: Shapes) -> dict[str, Tensor]:
    return {name: score.round() for name, score in normal(shapes).items()}


def one_zero_layer(shapes: Shapes) -> dict[str, Tensor]:
    scores = {name: score.abs() for name, score in normal(shapes).items()}
    first = next(iter(shapes))
    return scores | {first: torch.zeros(shapes[first])}


def some_pruned(shapes: Shapes) -> dict[str, Tensor]:
    return {name: score.masked_fill(score < 0, -torch.inf) for name, score in normal(shapes).items()}


def by_sort(scores: dict[str, Tensor], kept: int) -> Counts:
    """The layers of the first `kept` scores in a stable descending sort of all of them."""
    owners = np.repeat(np.arange(len(scores)), [score.numel() for score in scores.values()])
    values = torch.cat([score.flatten() for score in scores.values()]).double().numpy()
    first = owners[np.argsort(-values, kind="stable")[:kept]]
    return {name: int((first == place).sum()) for place, name in enumerate(scores)}


def by_bisection(densities: dict[str, float], shapes: Shapes, kept: int) -> dict[str, float]:
    """Real-valued counts of layers whose densities go as given, at most 1, with the given sum."""

    def at(scale: float) -> dict[str, float]:
        return {name: size * min(1.0, scale * densities[name]) for name, size in sizes(shapes).items()}

    low, high = 0.0, 1.0 / min(densities.values())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) < kept else (low, middle)
    return at(high)


@NETS
@DENSITIES
@each_distribution
@pytest.mark.parametrize("draw", [normal, equal, tied, one_zero_layer, some_pruned])
def test_the_budget_is_met_exactly(distribution: Distribution, shapes: Shapes, density: float, draw) -> None:
    counts = distribution(draw(shapes), density)
    assert list(counts) == list(shapes)
    assert abs(sum(counts.values()) - density * total(shapes)) <= 0.5
    assert all(0 <= counts[name] <= size for name, size in sizes(shapes).items())


@each_distribution
def test_every_budget_is_met_exactly(distribution: Distribution) -> None:
    shapes: Shapes = {"a": (2, 3, 1, 1), "b": (5, 7), "c": (4, 11), "d": (3, 3)}
    scores, size = normal(shapes), total(shapes)
    for kept in range(size // 3, size + 1):
        assert sum(distribution(scores, kept / size).values()) == kept


@each_distribution
def test_density_1_keeps_everything(distribution: Distribution) -> None:
    assert distribution(normal(CNN), 1.0) == sizes(CNN)


@pytest.mark.parametrize(("density", "kept"), [(1.0, 94), (0.5, 47), (0.1, 9), (0.026, 2), (0.011, 1), (0.006, 1)])
def test_budget_is_the_nearest_integer(density: float, kept: int) -> None:
    assert budget({"a": (7, 12), "b": (10,)}, density) == kept


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan")])
def test_density_outside_of_zero_to_one_is_refused(density: float) -> None:
    for distribution in DISTRIBUTIONS:
        with pytest.raises(ValueError, match=rf"density must lie in \(0, 1\], got {density}$"):
            distribution(normal(ODD), density)


@NETS
@DENSITIES
def test_uniform_is_within_one_weight_of_the_density(shapes: Shapes, density: float) -> None:
    counts = uniform(shapes, density)
    for name, size in sizes(shapes).items():
        assert abs(counts[name] - density * size) < 1, name


def test_uniform_keeps_one_weight_where_the_density_keeps_none() -> None:
    assert uniform({"a": (2, 2), "b": (100, 10), "c": (3,)}, 0.02) == {"a": 1, "b": 18, "c": 1}


@pytest.mark.parametrize(
    ("shapes", "density", "counts"),
    [
        # 665 to keep: the convolution whole, and 449 of the others' 2000, which leaves the last layer above a fifth.
        ({"conv": (8, 3, 3, 3), "fc": (100, 10), "head": (10, 100)}, 0.3, {"conv": 216, "fc": 225, "head": 224}),
        # 443 to keep: 227 of the others' 2000 would be 11 %, so the last layer has its fifth and the middle the rest.
        ({"conv": (8, 3, 3, 3), "fc": (100, 10), "head": (10, 100)}, 0.2, {"conv": 216, "fc": 27, "head": 200}),
        # A first matrix is not held dense.
        ({"fc": (100, 10), "head": (10, 50)}, 0.1, {"fc": 50, "head": 100}),
        # A fifth of 3 weights is 1.
        ({"fc": (100, 10), "head": (3, 1)}, 0.1, {"fc": 99, "head": 1}),
    ],
    ids=["uniform", "last held", "no convolution", "rounded up"],
)
def test_uniform_plus_by_hand(shapes: Shapes, density: float, counts: Counts) -> None:
    assert uniform_plus(shapes, density) == counts


@pytest.mark.parametrize(
    ("shapes", "density"),
    [
        ({"conv": (4, 3, 3, 3), "a": (2, 2), "b": (2, 2), "c": (2, 2), "d": (999, 9), "head": (10, 10)}, 0.05),
        ({"conv": (4, 3, 3, 3), "a": (1, 30), "head": (2, 3)}, 0.8095559),
        ({"conv": (4, 3, 3, 3), "a": (16, 12), "b": (28, 23), "head": (8, 2)}, 0.30581470),
        ({"conv": (16, 3, 3, 3), "a": (20, 40), "head": (10, 20)}, 0.4),
    ],
    ids=["layers of less than one weight", "last of 6", "last of 16", "plain"],
)
def test_uniform_plus_holds_the_first_and_the_last_layer(shapes: Shapes, density: float) -> None:
    counts = uniform_plus(shapes, density)
    assert counts["conv"] == math.prod(shapes["conv"])
    assert counts["head"] >= math.prod(shapes["head"]) / 5


@NETS
@DENSITIES
def test_erk_is_the_formula(shapes: Shapes, density: float) -> None:
    densities = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    expected = by_bisection(densities, shapes, round(density * total(shapes)))
    counts = erk(shapes, density)
    assert all(abs(counts[name] - expected[name]) < 1 for name in shapes)


@NETS
@DENSITIES
def test_er_is_the_formula_on_the_channels(shapes: Shapes, density: float) -> None:
    densities = {name: 1 / shape[0] + 1 / shape[1] for name, shape in shapes.items()}
    expected = by_bisection(densities, shapes, round(density * total(shapes)))
    counts = er(shapes, density)
    assert all(abs(counts[name] - expected[name]) < 1 for name in shapes)


@pytest.mark.parametrize(
    ("density", "counts"),
    [
        (0.25, {"a": 14, "b": 54}),  # 68 in the proportion of 4 + 4 to 16 + 16: 13.6 and 54.4
        (0.5, {"a": 16, "b": 120}),  # a fifth of 136 would be more than there are in the first
    ],
)
def test_erk_by_hand(density: float, counts: Counts) -> None:
    shapes: Shapes = {"a": (4, 4), "b": (16, 16)}
    assert erk(shapes, density) == counts
    assert er(shapes, density) == counts


def test_scaled_erk_by_hand() -> None:
    # Of 8 and 100 weights 2 and 80 are beyond the sums of axes; 54 of 108 are pruned, so 0.6585 of these in each.
    assert scaled_erk({"a": (2, 4), "b": (10, 10)}, 0.5) == {"a": 7, "b": 47}


def test_scaled_erk_refuses_what_would_empty_a_layer() -> None:
    shapes = {"hidden": (300, 64), "head": (1, 300)}  # the head stays dense, so that 301 weights are the fewest
    assert scaled_erk(shapes, 301 / 19500) == {"hidden": 1, "head": 300}
    with pytest.raises(InputError, match=r"scaled ERK empties a layer; the highest that can is 0.984564"):
        scaled_erk(shapes, 300 / 19500)


@NETS
def test_scaled_erk_scales_sparsities_by_one_factor(shapes: Shapes) -> None:
    counts = scaled_erk(shapes, 0.5)
    factors = []
    for name, shape in shapes.items():
        size, axes = math.prod(shape), sum(shape)
        if axes >= size:
            assert counts[name] == size
        else:
            least, most = ((size - counts[name] - 1) / (size - axes), (size - counts[name] + 1) / (size - axes))
            factors.append((least, most))
    assert max(least for least, _ in factors) <= min(most for _, most in factors)


def test_er_and_erk_differ_by_the_kernel() -> None:
    shapes: Shapes = {"conv": (10, 10, 3, 3), "fc": (30, 30)}
    # ERK: 10 + 10 + 3 + 3 to 30 + 30. ER: densities 1/10 + 1/10 to 1/30 + 1/30, which is 3 to 1 for equal sizes.
    assert erk(shapes, 0.1) == {"conv": 54, "fc": 126}
    assert er(shapes, 0.1) == {"conv": 135, "fc": 45}


@pytest.mark.parametrize("distribution", [Uniform(), ER(), ERK(), Global()], ids=lambda each: type(each).__name__)
def test_no_pruned_weight_returns_while_the_density_falls(distribution: Distribution) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(*axes, bias=False) for axes in [(8, 12), (22, 5), (8, 1), (10, 6), (3, 12)]]
    sparsifier = Sparsifier(0.97, distribution=distribution, schedule=Linear(start=0, end=43, every=1))
    sparsifier.attach(nn.Sequential(*layers))
    kept = sparsifier.masks
    for step in range(44):
        sparsifier.update(step)
        for name, mask in sparsifier.masks.items():
            assert not (mask & ~kept[name]).any(), (step, name)
        kept = sparsifier.masks


@NETS
@DENSITIES
@pytest.mark.parametrize("draw", [normal, equal, tied, one_zero_layer, some_pruned])
def test_global_is_that_of_a_sort_of_everything(shapes: Shapes, density: float, draw) -> None:
    scores = draw(shapes)
    assert Global()(scores, density) == by_sort(scores, round(density * total(shapes)))


def test_global_gives_equal_scores_to_the_first_layer() -> None:
    scores = {"b": torch.tensor([2.0, 1.0, 1.0]), "a": torch.tensor([1.0, 1.0, 3.0, 0.0])}
    expected = [(0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (3, 4)]
    assert [tuple(Global()(scores, kept / 7).values()) for kept in range(1, 8)] == expected


def test_global_may_empty_a_layer() -> None:
    assert Global()({"a": torch.ones(3), "b": torch.arange(2.0, 9.0)}, 0.4) == {"a": 0, "b": 4}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("minimum", [0.05, 0.15, 0.2])
def test_global_with_a_minimum_keeps_the_best_that_is_allowed(seed: int, minimum: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Distinct powers of two: no two choices of weights have the same sum of scores.
    values = 2.0 ** torch.randperm(14, generator=generator).double()
    scores = dict(zip("abcd", torch.split(values, [5, 2, 4, 3]), strict=True))
    least = {name: min(len(score), math.ceil(minimum * 14)) for name, score in scores.items()}
    best = {name: score.sort(descending=True).values.tolist() for name, score in scores.items()}
    for kept in range(sum(least.values()), 15):
        allowed = product(*(range(least[name], len(score) + 1) for name, score in scores.items()))
        choices = [dict(zip(scores, counts, strict=True)) for counts in allowed if sum(counts) == kept]
        expected = max(choices, key=lambda counts: sum(sum(best[name][: counts[name]]) for name in counts))
        assert Global(minimum)(scores, kept / 14) == expected


@NETS
@pytest.mark.parametrize("density", [0.5, 0.2, 0.12])
@pytest.mark.parametrize("draw", [normal, equal, tied, one_zero_layer])
def test_global_with_a_minimum_keeps_at_least_that(shapes: Shapes, density: float, draw) -> None:
    counts = Global(0.02)(draw(shapes), density)
    assert abs(sum(counts.values()) - density * total(shapes)) <= 0.5
    for name, size in sizes(shapes).items():
        assert counts[name] >= min(size, 0.02 * total(shapes)), name


def test_global_holds_again_where_holding_one_layer_starves_another() -> None:
    # The 4 highest are all in a. Holding c at 1 leaves 3, none for b; holding b too leaves 2.
    scores = {"a": torch.tensor([9.0, 8, 7, 6, 5, 4]), "b": torch.tensor([3.0, 2]), "c": torch.tensor([1.0, 0])}
    assert Global(0.1)(scores, 0.4) == {"a": 2, "b": 1, "c": 1}


def test_a_minimum_that_is_just_the_density_is_met() -> None:
    assert Global(0.07)({"a": torch.randn(10, 10)}, 0.07) == {"a": 7}


@pytest.mark.parametrize("minimum", [-0.1, 1.0, 2.0])
def test_a_minimum_outside_of_zero_to_one_is_refused(minimum: float) -> None:
    with pytest.raises(ValueError, match=rf"minimum must lie in \[0, 1\), .* got {minimum}$"):
        Global(minimum)


PER_LAYER = PerLayer({"a1": 0.9, "a*": 0.5, "b": 0.2})
FOUR: Shapes = {"a1": (10, 10), "a2": (10, 20), "b": (10, 10), "c": (5, 10)}


@pytest.mark.parametrize(
    ("zeros", "counts"),
    [
        (210, {"a1": 10, "a2": 100, "b": 80, "c": 50}),
        (105, {"a1": 55, "a2": 150, "b": 90, "c": 50}),
        (21, {"a1": 91, "a2": 190, "b": 98, "c": 50}),
        (0, {"a1": 100, "a2": 200, "b": 100, "c": 50}),
    ],
    ids=["arrived", "half way", "a tenth of the way", "dense"],
)
def test_per_layer_by_hand(zeros: int, counts: Counts) -> None:
    assert PER_LAYER(normal(FOUR), 1 - zeros / 450) == counts


def test_per_layer_takes_the_first_glob_that_matches() -> None:
    swapped = PerLayer({"a*": 0.5, "a1": 0.9, "b": 0.2})
    assert swapped(normal(FOUR), 1 - 170 / 450) == {"a1": 50, "a2": 100, "b": 80, "c": 50}


def test_per_layer_leaves_what_it_does_not_name_dense() -> None:
    # 1 % of 5 weights is less than the one that is kept; another sparse layer makes up for it.
    counts = PerLayer({"a": 0.99, "b": 0.5})(normal({"a": (5,), "b": (100,), "c": (50,)}), 1 - 54.95 / 155)
    assert counts == {"a": 1, "b": 49, "c": 50}


def test_per_layer_refuses_a_glob_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"'fc\*' in the per-layer map matches no target; .* \['a1', 'a2', 'b', 'c'\]"):
        PerLayer({"*": 0.5, "fc*": 0.9})(normal(FOUR), 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 90])
def test_per_layer_refuses_sparsities_outside_of_zero_to_one(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"the sparsity of 'fc' must lie in \[0, 1\), got {sparsity}$"):
        PerLayer({"conv": 0.5, "fc": sparsity})


THREE: Shapes = {"a": (5, 5), "b": (5, 10), "c": (5, 5)}
WITH_CONV: Shapes = {"conv": (4, 3, 3, 3), "b": (20, 30), "c": (10, 20)}
INFEASIBLE = [
    (Uniform(), THREE, 0.02, "sparsity 0.98 cannot be met over 100 target weights: it empties layers"),
    (ER(), THREE, 0.02, "sparsity 0.98 cannot be met over 100 target weights: it empties layers"),
    (ERK(), THREE, 0.02, "sparsity 0.98 cannot be met over 100 target weights: it empties layers"),
    (UniformPlus(), WITH_CONV, 0.1, "0.9 cannot be met over 908 .*: uniform\\+ keeps more in the first and last layer"),
    (Global(), THREE, 0.001, "sparsity 0.999 cannot be met over 100 target weights: it keeps none"),
    (Global(0.1), THREE, 0.2, "sparsity 0.8 cannot be met over 100 target weights: minimum=0.1 keeps more"),
    (PerLayer({"*": 0.9}), THREE, 0.05, "sparsity 0.95 cannot be met over 100 target weights: the map keeps more"),
    (PerLayer({"b": 0.3}), THREE, 0.5, "sparsity 0.5 cannot be met over 100 target weights: the map keeps more"),
]
TOO_LOW_FOR_ONE_WEIGHT = [
    (distribution, shapes, 0.0001, "sparsity 0.9999 cannot be met over")
    for distribution, shapes, _, _ in INFEASIBLE
    if not (isinstance(distribution, Global) and distribution.minimum == 0)
]


@pytest.mark.parametrize(
    ("distribution", "shapes", "density", "message"),
    INFEASIBLE + TOO_LOW_FOR_ONE_WEIGHT,
    ids=[f"{type(each).__name__}-{density}" for each, _, density, _ in INFEASIBLE + TOO_LOW_FOR_ONE_WEIGHT],
)
def test_an_infeasible_budget_is_refused_with_the_highest_that_is_not(
    distribution: Distribution, shapes: Shapes, density: float, message: str
) -> None:
    scores, size = normal(shapes), total(shapes)
    with pytest.raises(ValueError, match=message) as refusal:
        distribution(scores, density)
    stated = re.search(r"the highest that can is ([\d.]+)$", str(refusal.value))
    assert stated
    highest = float(stated[1])
    assert sum(distribution(scores, 1 - highest).values()) == round((1 - highest) * size)
    with pytest.raises(ValueError, match="cannot be met"):
        distribution(scores, 1 - highest - 1 / size)


def test_a_distribution_without_a_rule_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Distribution defines no distribution"):
        Distribution()(normal(ODD), 0.5)


@pytest.mark.parametrize("density", [0.9, 0.5, 0.1, 0.02])
def test_layer_adaptive_counts_are_those_of_global_lamp_scores(density: float) -> None:
    """Two ways to LAMP: its scores ranked over the whole model, and its counts with magnitudes in each layer."""
    torch.manual_seed(0)
    weights = {"conv": torch.randn(16, 3, 3, 3), "wide": 0.01 * torch.randn(64, 48), "head": 5 * torch.randn(10, 64)}
    by_scores = Global()({name: lamp(weight.double()) for name, weight in weights.items()}, density)
    assert LayerAdaptive()({name: weight.abs() for name, weight in weights.items()}, density) == by_scores
    assert sum(by_scores.values()) == round(density * sum(weight.numel() for weight in weights.values()))


def test_layer_adaptive_empties_no_layer() -> None:
    scores = {"small": torch.full((4, 4), 1e-20), "large": torch.rand(100, 100)}
    assert LayerAdaptive()(scores, 2 / 10_016) == {"small": 1, "large": 1}
    with pytest.raises(InputError, match="it keeps none"):
        LayerAdaptive()(scores, 1e-6)


def test_shapes_are_asked_for_without_computing_scores() -> None:
    class Counting(Magnitude):
        calls = 0

        def __call__(self, weight: Tensor, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
            self.calls += 1
            return super().__call__(weight, gradient, generator)

    score = Counting()
    weights = {"a": torch.randn(20, 30), "b": torch.randn(5, 20)}
    full = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    ERK()(Scores(score, weights, full, seed="0"), 0.5)
    assert score.calls == 0
