"""How near a result has to be to that in float64."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Asserts that the relative error of a result in this dtype is below its tolerance."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach()
    error = (found - expected).norm() / expected.norm().clamp_min(1e-30)
    assert float(error) < TOLERANCE[dtype], float(error)  # NaN fails
