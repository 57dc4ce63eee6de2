"""Scores at initialisation, against slow formulas written differently."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks import OneShot
from sparsity import InputError, Targets, masks
from sparsity.calibration import Calibration
from sparsity.initial import SNIP, GraSP, NetworkScore, SynFlow
from sparsity.moments import tensors
from sparsity.oneshot import OneShotSparsifier
from tests.nets import Batches, task, trainer


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(self.first(x)))
        return outputs


def mlp(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP().double()


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 5, generator=generator, dtype=torch.float64), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.ndim == 2}


def flat_loss(model: MLP, vector: Tensor) -> Tensor:
    """The mean loss over the batches as a function of the two weight matrices in one vector."""
    first, last = vector[:35].view(7, 5), vector[35:].view(3, 7)
    total = vector.new_zeros(())
    for images, labels in batches():
        hidden = torch.tanh(images @ first.T + model.first.bias.detach())
        total = total + nn.functional.cross_entropy(hidden @ last.T + model.last.bias.detach(), labels)
    return total / 3


def test_snip_is_how_the_loss_changes_with_a_factor_on_each_weight() -> None:
    model = mlp()
    found = SNIP().of(model, weights(model), batches(), loss)
    vector = torch.cat([each.detach().flatten() for each in weights(model).values()])
    step = 1e-6
    for place, score in enumerate(torch.cat([each.flatten() for each in found.values()])):
        factors = torch.ones_like(vector)
        factors[place] += step
        more = flat_loss(model, vector * factors)
        factors[place] -= 2 * step
        less = flat_loss(model, vector * factors)
        assert float(score) == pytest.approx(abs(float(more - less)) / (2 * step), rel=1e-5, abs=1e-9)


def test_grasp_is_the_product_with_the_hessian() -> None:
    model = mlp()
    found = GraSP().of(model, weights(model), batches(), loss)
    vector = torch.cat([each.detach().flatten() for each in weights(model).values()])
    gradient = torch.func.grad(lambda v: flat_loss(model, v))(vector)
    columns = []
    for place in range(len(vector)):  # by differences, column by column
        step = torch.zeros_like(vector)
        step[place] = 1e-5
        ahead, behind = (torch.func.grad(lambda v: flat_loss(model, v))(vector + sign * step) for sign in (1, -1))
        columns.append((ahead - behind) / 2e-5)
    hessian = torch.stack(columns, 1)
    expected = vector * (hessian @ gradient)
    torch.testing.assert_close(torch.cat([each.flatten() for each in found.values()]), expected, rtol=1e-5, atol=1e-8)


def test_synflow_counts_all_paths_through_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False), nn.Linear(2, 2, False))
    found = SynFlow().of(model, weights(model), [torch.zeros(1, 4)], loss)
    one, two, three = (each.detach().abs().double() for each in weights(model).values())
    for i in range(3):
        for j in range(4):
            paths = sum(one[i, j] * two[k, i] * three[m, k] for k in range(2) for m in range(2))
            assert float(found["0.weight"][i, j]) == pytest.approx(float(paths))
    totals = [float(each.sum()) for each in found.values()]
    assert totals == pytest.approx([totals[0]] * 3), "what flows through each layer is the same"


def test_synflow_empties_no_layer_where_magnitudes_do() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(30, 30, bias=False) for _ in range(4)]
    nn.init.normal_(layers[1].weight, std=1e-4)
    model = nn.Sequential(*layers)
    plain = OneShotSparsifier(0.99)
    plain.attach(model)
    assert masks.counts(plain.masks)["1.weight"] == 0
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30, 30, bias=False) for _ in range(4)))
    nn.init.normal_(list(model.parameters())[1], std=1e-4)
    sparsifier = OneShotSparsifier(0.99, SynFlow())
    sparsifier.batches = lambda: [torch.ones(2, 30)]
    sparsifier.attach(model)
    assert min(masks.counts(sparsifier.masks).values()) >= 3
    assert sum(masks.counts(sparsifier.masks).values()) == 36
    assert bool(model(torch.randn(5, 30)).any()), "a path is left"


@pytest.mark.parametrize("score", [SNIP(), SNIP(rounds=3), GraSP(), SynFlow(rounds=5)])
def test_a_module_in_training_is_pruned_and_otherwise_as_it_was(score: NetworkScore) -> None:
    plain, model = task(), task()
    used = Targets(exclude=["*unused*"])
    method = OneShot(0.8, score=score, calibration=Calibration(2), targets=used)
    trainer(method, epochs=1).fit(model, Batches())
    total = sum(mask.numel() for mask in method.sparsifier.masks.values())
    assert method.sparsifier.density() == round(0.2 * total) / total
    assert method.sparsifier.renewed == 0

    alone = OneShot(0.8, score=score, calibration=Calibration(2), targets=used)
    alone.prune(plain, Batches)
    assert masks.fingerprint(alone.sparsifier.masks) == masks.fingerprint(method.sparsifier.masks)
    for (name, value), other in zip(tensors(plain), dict(tensors(task())).values(), strict=True):
        kept = alone.sparsifier.masks.get(name, torch.ones_like(other, dtype=torch.bool))
        assert torch.equal(value, other * kept), f"{name} has moved"
    assert not plain.net.frozen.weight.requires_grad


def test_a_plain_model_and_its_loss() -> None:
    model = mlp()
    sparsifier = OneShotSparsifier(0.5, SNIP())
    sparsifier.batches = batches
    sparsifier.attach(model)
    fresh = mlp()
    scores = SNIP().of(fresh, weights(fresh), batches(), loss)
    ordered = torch.cat([each.flatten() for each in scores.values()]).sort(descending=True).values
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask, scores[name] >= ordered[27])


def test_what_cannot_be_is_said() -> None:
    model = mlp()
    with pytest.raises(InputError, match="there is no batch to score the network by"):
        SNIP().of(model, weights(model), [], loss)
    with pytest.raises(InputError, match="cannot prune a network of tokens"):
        SynFlow().of(model, weights(model), [torch.zeros(1, 4, dtype=torch.int64)], loss)
    with pytest.raises(InputError, match="rounds must be at least 1"):
        SNIP(0)
    with pytest.raises(InputError, match="SNIP needs calibration data"):
        OneShotSparsifier(0.5, SNIP()).attach(model)
    with pytest.raises(InputError, match=r"at=0.5: pruning by data is done before training"):
        OneShot(0.5, at=0.5, score=GraSP())
    with pytest.raises(InputError, match="SNIP scores a whole network by its data"):
        SNIP()(torch.ones(1), None, torch.Generator())
    broken = OneShotSparsifier(0.5, SNIP())
    broken.batches = lambda: [(torch.full((2, 5), float("nan"), dtype=torch.float64), torch.tensor([0, 1]))]
    with pytest.raises(InputError, match=r"'first.weight' cannot be ranked: SNIP scores it NaN"):
        broken.attach(model)
