"""Congruity: which weights move first, by hand and against a slow reading of the rule."""

import pytest
import torch
from torch import Tensor, nn

from sparsity import Horizon, InputError, masks
from sparsity.congruent import Congruent, Congruity, GradientCongruity
from sparsity.distributions import Uniform
from sparsity.schedules import ConstantDrop


def attached(congruity: Congruity, shape: tuple[int, int] = (8, 10), seed: int = 0) -> tuple[nn.Linear, Congruent]:
    """A layer at half its weights with a gradient everywhere, as it came, and changed since."""
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    method = Congruent(0.5, congruity, ConstantDrop(0.3, 2, 1.0), Uniform())
    method.attach(layer, optimizer, horizon=Horizon(10), seed=seed)
    return layer, method


def moved(layer: nn.Linear, method: Congruent, directions: Tensor | None, change: Tensor, gradient: Tensor) -> Tensor:
    """The mask after the update at step 2, where the weights came, changed, and have this gradient."""
    [name] = method.masks
    method.receive(method.masks, 1, None if directions is None else {name: directions})
    with torch.no_grad():
        layer.weight += change * method.masks[name]
    layer.weight.grad = gradient.clone()
    method.update(2)
    method.apply()
    return method.masks[name]


def expected(
    before: Tensor, weight: Tensor, begun: Tensor, directions: Tensor, gradient: Tensor, part: float, by_gradient: bool
) -> Tensor:
    """The rule of the reconstruction, weight by weight, in lists."""
    kept = [place for place in range(before.numel()) if before[place]]
    free = [place for place in range(before.numel()) if not before[place]]
    count = int(0.3 * len(kept))
    lowest = sorted(kept, key=lambda place: abs(float(weight[place])))
    opposed = [p for p in lowest if float(directions[p]) * float((weight[p] - begun[p]).sign()) < 0]
    cut = opposed[: int(part * count)]
    cut += [place for place in lowest if place not in cut][: count - len(cut)]
    steepest = sorted(free, key=lambda place: -abs(float(gradient[place])))
    if by_gradient:
        agreed = [p for p in steepest if float(directions[p]) * -float(gradient[p].sign()) > 0]
    else:
        agreed = [p for p in steepest if float(directions[p]) == 0]
    new = agreed[: int(part * count)]
    new += [place for place in steepest if place not in new][: count - len(new)]
    result = before.clone()
    result[cut], result[new] = False, True
    return result


@pytest.mark.parametrize("by_gradient", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_moves_are_those_of_the_rule(part: float, by_gradient: bool, seed: int) -> None:
    layer, method = attached((GradientCongruity if by_gradient else Congruity)(part), seed=seed)
    before, begun = method.masks["weight"].clone(), layer.weight.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randint(-1, 2, (8, 10), generator=generator).to(torch.int8)
    change, gradient = (0.1 * torch.randn(8, 10, generator=generator) for _ in range(2))
    weight = begun + change * before
    found = moved(layer, method, directions, change, gradient)
    mask, now, came, way, slope = (each.flatten() for each in (before, weight, begun, directions, gradient))
    assert torch.equal(found.flatten(), expected(mask, now, came, way, slope, part, by_gradient))
    assert int(found.sum()) == int(before.sum())
    assert not layer.weight[found & ~before].any()


def test_congruity_changes_what_moves() -> None:
    outcomes = set()
    for congruity in (Congruity(0.0), Congruity(1.0), Congruity(1.0, 0.0), GradientCongruity(0.0, 1.0)):
        layer, method = attached(congruity)
        generator = torch.Generator().manual_seed(0)
        directions = torch.randint(-1, 2, (8, 10), generator=generator).to(torch.int8)
        change, gradient = (0.1 * torch.randn(8, 10, generator=generator) for _ in range(2))
        outcomes.add(masks.fingerprint({"weight": moved(layer, method, directions, change, gradient)}))
    assert len(outcomes) == 4


def test_without_directions_and_without_a_share_it_is_the_same() -> None:
    found = []
    for congruity, directed in ((Congruity(0.0), True), (Congruity(1.0), False)):
        layer, method = attached(congruity)
        change, gradient = 0.1 * torch.ones(8, 10), torch.linspace(-1, 1, 80).view(8, 10)
        directions = -torch.ones(8, 10, dtype=torch.int8) if directed else None
        found.append(moved(layer, method, directions, change, gradient))
    assert torch.equal(*found)


def test_what_is_dropped_does_not_grow_at_once_even_where_hardly_anything_is_free() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 8, bias=False)
    method = Congruent(0.05, None, ConstantDrop(0.3, 2, 1.0), Uniform())
    method.attach(layer, torch.optim.SGD(layer.parameters(), 0.1), horizon=Horizon(10))
    before = method.masks["weight"].clone()
    layer.weight.grad = torch.randn(8, 10)
    method.update(2)
    after = method.masks["weight"]
    assert int((~before).sum()) == 4
    assert int((before & ~after).sum()) == 4, "of 76, 22 were to move, and 4 slots are free"
    assert torch.equal(after & ~before, ~before)


def test_a_saved_state_has_directions_and_where_the_weights_came_from() -> None:
    _, method = attached(Congruity(0.5))
    method.receive(method.masks, 1, {"weight": torch.ones(8, 10, dtype=torch.int8)})
    _, again = attached(Congruity(0.5), seed=1)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.directions["weight"], method.directions["weight"])
    assert torch.equal(again.state_dict()["begun"]["weight"], method.state_dict()["begun"]["weight"])


@pytest.mark.parametrize("settings", [{"prune": 1.5}, {"grow": -0.1}])
def test_parts_lie_between_none_and_all(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="a part of the weights that move"):
        Congruity(**settings)
