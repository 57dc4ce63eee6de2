"""The Triton of `gumbel_nm_mask`: on a GPU, or in the interpreter; beside its definition in float64."""

import pytest
import torch

from sparsity.ops import gumbel_nm_mask
from tests.ops.test_gumbel import logits


@pytest.mark.parametrize(("n", "m", "groups"), [(2, 4, 1), (2, 4, 700), (1, 3, 300), (2, 8, 33), (1, 16, 5)])
def test_masks_and_gradients(n: int, m: int, groups: int, device: torch.device) -> None:
    given, slopes = logits(n, m, groups), torch.randn(groups, m)
    exact, ours = given.double().requires_grad_(), given.to(device).requires_grad_()
    expected = gumbel_nm_mask(exact, n, m, 3.0, 0.7, -5)
    found = gumbel_nm_mask(ours, n, m, 3.0, 0.7, -5)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=2e-5)
    torch.autograd.backward(expected, slopes.double())
    torch.autograd.backward(found, slopes.to(device))
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.cpu().double(), exact.grad, rtol=0, atol=2e-4)


def test_slopes_that_are_expanded(device: torch.device) -> None:
    given = logits(2, 4, 50).to(device).requires_grad_()
    torch.autograd.backward(gumbel_nm_mask(given, 2, 4, 1.0, 1.0, 3).sum())
    assert given.grad is not None
    assert float(given.grad.abs().max()) < 1e-5, "each mask has 2 in sum, whatever the logits"
