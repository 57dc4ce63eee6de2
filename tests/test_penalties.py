"""Gradients of penalties, against autograd on the published losses in float64."""

import math

import pytest
import torch
from torch import Tensor

from sparsity import InputError
from sparsity.penalties import hypersparse_gradient, hypersparse_scale, lasso_gradient, ridge_gradient


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


def test_lasso_and_ridge() -> None:
    leaves = [value.requires_grad_() for value in weights()]
    total = torch.stack([leaf.abs().sum() for leaf in leaves]).sum()
    for one, other in zip(lasso_gradient(leaves), torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(one, other)
    total = torch.stack([leaf.square().sum() for leaf in leaves]).sum()
    for one, other in zip(ridge_gradient(leaves), torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(one, other)
