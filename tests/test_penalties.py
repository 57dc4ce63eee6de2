"""Gradients of penalties, against autograd on the published losses in float64."""

import math

import pytest
import torch
from torch import Tensor

from sparsity import InputError
from sparsity.penalties import (
    HyperSparsity,
    Lasso,
    Penalty,
    Ridge,
    hypersparse_factor,
    hypersparse_gradient,
    hypersparse_scale,
)


def weights(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((7, 5), (3, 4, 3, 3), (11, 2))]


def published_loss(values: list[Tensor], sparsity: float) -> Tensor:
    """As its authors write it: one vector, a full sort, s and A held constant."""
    magnitudes = torch.cat([value.flatten() for value in values]).abs()
    ordered = magnitudes.detach().sort().values
    scale = 0.65847894846 / ordered[math.floor(sparsity * len(ordered))]
    bounded = torch.tanh(scale * magnitudes).sum()
    return magnitudes.sum() * bounded / bounded.detach() - magnitudes.sum()


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.9, 0.995])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_closed_form_is_the_gradient_of_the_published_loss(sparsity: float, seed: int) -> None:
    leaves = [value.requires_grad_() for value in weights(seed)]
    loss = published_loss(leaves, sparsity)
    assert abs(loss.item()) < 1e-12, "its value is zero at all times"
    expected = torch.autograd.grad(loss, leaves)
    found = hypersparse_gradient([leaf.detach() for leaf in leaves], sparsity)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_the_pull_at_the_quantile_is_two_thirds_of_that_at_zero() -> None:
    values = weights()
    ordered = torch.cat([value.flatten() for value in values]).abs().sort().values
    at = ordered[math.floor(0.9 * len(ordered))]
    values.append(torch.tensor([1e-12], dtype=torch.float64))
    found = torch.cat([each.flatten() for each in hypersparse_gradient(values, 0.9)]).abs()
    magnitudes = torch.cat([value.flatten() for value in values]).abs()
    near = (magnitudes - at).abs().argmin()
    assert float(found[near] / found[-1]) == pytest.approx(2 / 3, abs=0.02)
    order = magnitudes.argsort()
    assert (found[order].diff() <= 1e-12).all(), "the larger a weight, the less it is drawn"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_shapes_stay(dtype: torch.dtype) -> None:
    values = weights(dtype=dtype)
    exact = hypersparse_gradient([value.double() for value in values], 0.9)
    for value, found, wanted in zip(values, hypersparse_gradient(values, 0.9), exact, strict=True):
        assert (found.shape, found.dtype) == (value.shape, dtype)
        torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0.03)


def test_a_given_scale_is_used() -> None:
    values = weights()
    scale = hypersparse_scale(values, 0.9)
    for one, other in zip(hypersparse_gradient(values, 0.9), hypersparse_gradient(values, 0.1, scale), strict=True):
        assert torch.equal(one, other)


def test_dead_weights_are_not_moved() -> None:
    values = weights()
    values[0].zero_()
    assert not hypersparse_gradient(values, 0.5)[0].any()


def test_what_has_no_gradient_is_named() -> None:
    values = [torch.zeros(9), torch.ones(1)]
    with pytest.raises(InputError, match=r"at the quantile of sparsity=0.5 is zero: 0.9000 of the weights already are"):
        hypersparse_gradient(values, 0.5)
    assert torch.isfinite(hypersparse_gradient(values, 0.9)[1]).all()
    for sparsity in (0.0, 1.0):
        with pytest.raises(InputError, match="must lie in"):
            hypersparse_gradient(values, sparsity)


@pytest.mark.parametrize(("penalty", "power"), [(Lasso(0.5, 1.2), 1), (Ridge(0.5, 1.2), 2)])
def test_lasso_and_ridge(penalty: Penalty, power: int) -> None:
    leaves = [value.requires_grad_() for value in weights()]
    total = 0.5 * 1.2**3 * torch.stack([leaf.abs().pow(power).sum() for leaf in leaves]).sum()
    for leaf, expected in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
        found = torch.ones_like(leaf)
        penalty.add(found, leaf.detach(), penalty.at(3))
        torch.testing.assert_close(found, 1 + expected)


def test_the_numbers_of_all_weights_are_new_every_so_many_steps_and_every_epoch() -> None:
    penalty, values = HyperSparsity(every=3), {str(n): value for n, value in enumerate(weights())}
    pulls = []
    for step in range(5):
        if step == 4:
            penalty.begin()
        penalty.prepare(values, 0.9)
        found = torch.zeros_like(values["0"])
        penalty.add(found, values["0"], 2.0)
        pulls.append(found)
        for value in values.values():
            value.mul_(1.5)
    values = {name: value / 1.5**5 for name, value in values.items()}
    for step, since in enumerate((0, 0, 0, 3, 4)):
        then = [value * 1.5**since for value in values.values()]
        now = [value * 1.5**step for value in values.values()]
        scale = hypersparse_scale(then, 0.9)
        factor = 2.0 * hypersparse_factor(then, scale)
        torch.testing.assert_close(pulls[step], factor * now[0].sign() / torch.cosh(scale * now[0]).square())


def test_penalties_that_cannot_be_are_refused() -> None:
    for make in (lambda: Lasso(0.0), lambda: Ridge(growth=0.9)):
        with pytest.raises(InputError, match="strength"):
            make()
    with pytest.raises(InputError, match="every counts steps"):
        HyperSparsity(every=0)
    with pytest.raises(NotImplementedError, match="Penalty defines no gradient"):
        Penalty().add(torch.zeros(1), torch.zeros(1), 1.0)
