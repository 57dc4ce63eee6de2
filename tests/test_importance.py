"""PruneFL's masks: by squared gradients over the whole model, against a slow reading."""

import pytest
import torch
from torch import nn

from sparsity import Horizon, InputError
from sparsity.distributions import Uniform
from sparsity.importance import Importance
from sparsity.schedules import ConstantDrop


def attached(times: dict[str, float] | None = None) -> tuple[nn.Sequential, Importance]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False))
    method = Importance(0.5, ConstantDrop(0.4, 3, 1.0), Uniform(), times=times)
    method.attach(net, torch.optim.SGD(net.parameters(), 0.1), horizon=Horizon(10), seed=0)
    return net, method


@pytest.mark.parametrize("times", [None, {"0.weight": 100.0}])
def test_what_is_kept_is_large_or_matters(times: dict[str, float] | None) -> None:
    _, method = attached(times)
    before = {name: mask.clone() for name, mask in method.masks.items()}
    weights = {name: weight.detach().clone() for name, weight in method.weights().items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, 4):
        for name, weight in method.weights().items():
            weight.grad = torch.randn_like(weight)
            squares[name] += weight.grad**2
        method.update(step)
    stays, others = {}, []
    for name, mask in before.items():
        kept = sorted(mask.flatten().nonzero()[:, 0].tolist(), key=lambda p: -abs(float(weights[name].flatten()[p])))
        stays[name] = set(kept[: len(kept) - int(0.4 * len(kept))])
        others += [(float(squares[name].flatten()[place]) / (times or {}).get(name, 1.0), name, place)
                   for place in range(mask.numel()) if place not in stays[name]]  # fmt: skip
    freed = sum(int(mask.sum()) for mask in before.values()) - sum(map(len, stays.values()))
    for _, name, place in sorted(others, reverse=True)[:freed]:
        stays[name].add(place)
    assert {name: set(mask.flatten().nonzero()[:, 0].tolist()) for name, mask in method.masks.items()} == stays
    assert method.density() == 0.5
    assert method.squares == {}
    if times:
        assert method.masks["0.weight"].sum() < before["0.weight"].sum(), "its weights are said to take longer"


def test_gradients_that_are_not_finite_are_left_out() -> None:
    net, method = attached()
    for weight in net.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    method.update(1)
    assert method.steps == 0


def test_times_are_positive() -> None:
    with pytest.raises(InputError, match=r"times are above 0, those of \['a'\] are not"):
        Importance(0.5, times={"a": 0.0})
