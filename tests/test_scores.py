import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from sparsity.scores import SMALL, Lamp, Magnitude, Random, Score, Scores, lamp, magnitude

Floats = npt.NDArray[np.float64]
HALVES = [torch.float16, torch.bfloat16]


def lamp_by_pairs(weight: Tensor) -> Floats:
    """Equation 4 of the paper, one weight at a time: w_u^2 over the sum of the w_v^2 that u does not outrank."""
    w: list[float] = weight.detach().double().abs().flatten().tolist()
    scores = np.zeros(len(w))
    for u in range(len(w)):
        at_least = [w[v] ** 2 for v in range(len(w)) if w[v] > w[u] or (w[v] == w[u] and v <= u)]
        if w[u] > 0:
            scores[u] = w[u] ** 2 / math.fsum(at_least)
    return scores.reshape(tuple(weight.shape))


def lamp_by_ranks(weight: Tensor) -> Floats:
    """The same for many weights: sort all, and sum the squares down to each rank in float64."""
    magnitudes = np.abs(weight.detach().double().numpy().ravel())
    order = np.argsort(-magnitudes, kind="stable")
    squares = magnitudes[order] ** 2
    scores = np.empty(len(squares))
    scores[order] = squares / np.cumsum(squares)
    return scores.reshape(tuple(weight.shape))


def score_alone(score: Score, weight: Tensor, seed: str = "0", keep: Tensor | None = None) -> Tensor:
    kept = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep
    return Scores(score, {"layer.weight": weight}, {"layer.weight": kept}, seed)["layer.weight"]


@pytest.mark.parametrize("shape", [(1,), (5,), (4, 5), (2, 9, 1), (6, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-7), (torch.float64, 1e-14)], ids=str)
def test_lamp_is_equation_4(shape: tuple[int, ...], dtype: torch.dtype, rtol: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = lamp(weight)
    assert scores.dtype == dtype
    assert scores.shape == shape
    np.testing.assert_allclose(scores.numpy(), lamp_by_pairs(weight), rtol=rtol)


def test_lamp_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    expected = torch.tensor([[1 / (1 + 4 + 9), 1.0], [4 / (4 + 9), 0.0]])
    torch.testing.assert_close(lamp(weight), expected, rtol=1e-7, atol=0)


def test_among_equal_magnitudes_the_first_counts_as_the_largest() -> None:
    ones = torch.tensor([1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(lamp(ones), torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4]), rtol=1e-7, atol=0)
    tied = torch.randint(-3, 4, (7, 9), generator=torch.Generator().manual_seed(1)).float()
    np.testing.assert_allclose(lamp(tied).numpy(), lamp_by_pairs(tied), rtol=1e-7)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-10, -1.0, 2.0**60])
def test_lamp_does_not_see_the_scale_of_a_layer(scale: float) -> None:
    weight = torch.randn(40, 25, generator=torch.Generator().manual_seed(2))
    assert torch.equal(lamp(weight * scale), lamp(weight))


def test_lamp_follows_a_permutation_of_distinct_weights() -> None:
    weight = torch.randperm(500, generator=torch.Generator().manual_seed(3)).float() + 1
    order = torch.randperm(500, generator=torch.Generator().manual_seed(4))
    assert torch.equal(lamp(weight[order]), lamp(weight)[order])


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0, 4)], ids=str)
def test_lamp_of_zeros_is_zero(shape: tuple[int, ...]) -> None:
    assert torch.equal(lamp(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("exponent", [-149, -126, -60, 0, 60, 127])
def test_the_largest_weight_scores_exactly_1_at_any_float32(exponent: int) -> None:
    assert float(lamp(torch.tensor([0.0, 2.0**exponent, 0.0])).max()) == 1.0


@pytest.mark.parametrize("size", [SMALL - 1, SMALL, SMALL + 1, 3 * SMALL + 7])
@pytest.mark.parametrize("levels", [0, 5], ids=["distinct", "tied"])
def test_lamp_of_tensors_larger_than_a_slab(size: int, levels: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(5))
    weight = (weight * levels).round() if levels else weight
    np.testing.assert_allclose(lamp(weight).numpy(), lamp_by_ranks(weight), rtol=1e-7)


def test_lamp_of_ten_million_normal_weights() -> None:
    weight = torch.randn(10_000_000, generator=torch.Generator().manual_seed(6))
    scores = lamp(weight)
    assert float(scores.max()) == 1.0
    assert float(scores[weight.abs().argmax()]) == 1.0
    np.testing.assert_allclose(scores.numpy(), lamp_by_ranks(weight), rtol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("function", [lamp, magnitude])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype, function: object) -> None:
    assert callable(function)
    # The largest float16 squared is out of its range, the smallest underflows.
    weight = torch.tensor([60_000.0, -300.0, 1.0, 1e-5]).to(dtype)
    scores = function(weight)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, function(weight.float()))
    assert scores.isfinite().all()
    assert (scores > 0).all()


def test_magnitude() -> None:
    weight = nn.Parameter(torch.tensor([[1.5, -2.5], [-0.0, 0.0]]))
    assert torch.equal(magnitude(weight), torch.tensor([[1.5, 2.5], [0.0, 0.0]]))
    assert torch.equal(score_alone(Magnitude(), weight), magnitude(weight))


def test_scores_are_new_tensors() -> None:
    weight = torch.tensor([3.0, 2.0, 1.0])
    for score in (Magnitude(), Lamp(), Random()):
        score_alone(score, weight, keep=torch.tensor([True, False, True]))
    assert weight.tolist() == [3.0, 2.0, 1.0]


def test_random_depends_on_the_seed_and_the_name_and_not_on_the_weights() -> None:
    def draw(seed: str, name: str = "a") -> Tensor:
        weight = torch.randn(50, 3)
        return Scores(Random(), {name: weight}, {name: torch.ones(50, 3, dtype=torch.bool)}, seed)[name]

    assert torch.equal(draw("0/10"), draw("0/10"))
    assert draw("0/10").min() >= 0
    assert draw("0/10").max() < 1
    others = [draw("0/11"), draw("1/10"), draw("0/10", "b")]
    assert not any(torch.equal(draw("0/10"), other) for other in others)


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    score_alone(Random(), torch.zeros(4, 5))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("score", [Magnitude(), Lamp(), Random()], ids=lambda score: type(score).__name__)
def test_pruned_weights_come_last(score: Score) -> None:
    weight = torch.tensor([0.0, 5.0, 1.0, 0.0])
    scores = score_alone(score, weight, keep=torch.tensor([True, False, True, False]))
    assert scores.isneginf().tolist() == [False, True, False, True]
    assert (scores[[0, 2]] >= 0).all()


@pytest.mark.parametrize("score", [Magnitude(), Lamp()], ids=lambda score: type(score).__name__)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_refuse_what_is_not_finite(score: Score, value: float) -> None:
    weight = torch.randn(3, 4)
    weight[1, 2] = weight[2, 0] = value
    message = r"'layer\.weight' cannot be ranked: 2 of its 12 weights are NaN or infinite\. .* last good checkpoint"
    with pytest.raises(ValueError, match=message):
        score_alone(score, weight)


def test_scores_are_a_mapping_of_one_dtype() -> None:
    weights = {"a": torch.tensor([1.0], dtype=torch.float16), "b": torch.tensor([2.0, 3.0], dtype=torch.float64)}
    masks = {"a": torch.tensor([True]), "b": torch.tensor([True, True])}
    both = Scores(Magnitude(), weights, masks, "0")
    assert list(both) == ["a", "b"]
    assert len(both) == 2
    assert {name: (score.dtype, score.tolist()) for name, score in both.items()} == {
        "a": (torch.float64, [1.0]),
        "b": (torch.float64, [2.0, 3.0]),
    }
    alone = Scores(Magnitude(), {"a": weights["a"]}, {"a": masks["a"]}, "0")
    assert alone["a"].dtype == torch.float32


def test_scores_hand_over_the_gradient() -> None:
    class Gradient(Score):
        needs_gradient = True

        def __call__(self, weight: Tensor, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
            assert gradient is not None
            return gradient.clone()

    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    weight.grad = torch.tensor([2.0, 4.0])
    assert score_alone(Gradient(), weight).tolist() == [2.0, 4.0]


def test_a_score_without_a_formula_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Score defines no score"):
        score_alone(Score(), torch.ones(2))


# Memory. The peak is read as VmHWM, because ru_maxrss of a child starts at the peak of the process that started it.
PROBE = """
import torch
from sparsity import distributions, masks, ops, patterns, scores

torch.set_num_threads(1)

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

def layers(count, millions):
    size = int(millions * 2**20)
    weights = {str(i): torch.randn(size // 512, 512) for i in range(count)}
    return weights, masks.full(weights)

def select(score, weights, kept):
    all_scores = scores.Scores(score, weights, kept, "0")
    return patterns.Unstructured().masks(all_scores, distributions.Global()(all_scores, 0.1))
"""

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")


def rise_of_peak(lines: str) -> float:
    """The MiB by which the peak memory of a fresh process rises while it runs the last of the lines."""
    *before, last = lines.strip().splitlines()
    code = "\n".join([PROBE, *before, "start = peak()", last, "print(peak() - start)"])
    root = Path(__file__).parent.parent
    # Freed tensors go back to the system at once, so that the peak is of memory in use and not of free lists.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@linux
def test_the_probe_sees_memory() -> None:
    assert 64 <= rise_of_peak("tensor = torch.ones(64, 2**18)") < 72


@linux
def test_memory_of_a_global_selection_by_magnitude() -> None:
    rise = rise_of_peak("""
select(scores.Magnitude(), *layers(2, 0.01))
weights, kept = layers(12, 4)
chosen = select(scores.Magnitude(), weights, kept)
""")
    masks, layer = 12 * 4, 16
    assert rise - masks < 4 * layer  # all scores together take 12 layers


@linux
def test_memory_of_a_global_selection_by_lamp() -> None:
    # A chunk as small against a layer as it is against the layers of a large model.
    rise = rise_of_peak("""
ops.select.CHUNK = 2**14
select(scores.Lamp(), *layers(2, 0.01))
weights, kept = layers(8, 1)
chosen = select(scores.Lamp(), weights, kept)
""")
    masks, layer, histograms = 8 * 1, 4, 4
    assert rise - masks < 4 * layer + histograms  # all scores together take 8 layers


@linux
def test_memory_of_lamp_is_less_than_four_tensors() -> None:
    rise = rise_of_peak("""
scores.lamp(torch.randn(5000))
weight = torch.randn(10 * 2**20)
result = scores.lamp(weight)
""")
    tensor = 40
    assert rise < 4 * tensor  # a full sort takes values, indices and sums: six tensors and more
