"""DTensors, in one process; two processes are in the guarantees (FSDP2)."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from callbacks import RigL
from sparsity import Horizon, InputError, Sparsifier, masks, shards
from sparsity.schedules import ConstantDrop


@pytest.fixture
def mesh() -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


def train(model: nn.Module, sparsifier: Sparsifier, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    model(torch.randn(5, 12)).square().mean().backward()
    sparsifier.update(step)
    optimizer.step()
    sparsifier.apply()
    optimizer.zero_grad()


def test_a_sharded_model_gets_the_masks_of_the_whole_one(mesh: Any) -> None:
    torch.manual_seed(0)
    plain, sharded = (
        nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
        for _ in range(2)
    )
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=mesh)
    found = []
    for model in (plain, sharded):
        sparsifier = Sparsifier(0.75)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        sparsifier.attach(model, optimizer)
        for step in range(3):
            train(model, sparsifier, optimizer, step)
            for name, weight in sparsifier.weights().items():
                assert not shards.whole(weight.detach())[~sparsifier.masks[name]].any()
        assert not any(shards.is_spread(mask) for mask in sparsifier.masks.values())
        assert list(sparsifier.masks) == ["0.weight", "2.weight", "4.weight", "5.weight"], "also two of the same shape"
        found.append(masks.fingerprint(sparsifier.masks))
    assert shards.is_spread(sharded[0].weight)  # type: ignore[arg-type]  # a Linear's
    assert found[0] == found[1]


def test_a_sharded_model_has_the_rates_of_the_whole_one(mesh: Any) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fully_shard(models[1], mesh=mesh)
    found = []
    for model in models:
        sparsifier = RigL(0.75, ConstantDrop(0.5, 2, 1.0)).scaled().sparsifier
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier.attach(model, optimizer, horizon=Horizon(6, 3))
        for step in range(6):
            train(model, sparsifier, optimizer, step)
        assert sparsifier.scaling is not None
        assert any(sparsifier.scaling.kept[name] > float(mask.double().mean()) + 0.05
                   for name, mask in sparsifier.masks.items())  # fmt: skip
        found.append({name: shards.whole(value) for name, value in model.state_dict().items()})
    torch.testing.assert_close(found[1], found[0])


def test_plain_tensors_are_whole_and_local() -> None:
    tensor, mask = torch.ones(3), torch.tensor([True, False, True])
    assert shards.whole(tensor) is shards.local(tensor) is tensor
    assert shards.local_part(mask, tensor) is mask
    assert shards.all_agree(True, [nn.Parameter(tensor)])
    assert not shards.all_agree(False, [nn.Parameter(tensor)])


@pytest.mark.parametrize("mark", ["_fsdp_flattened", "ds_id"])
def test_flattened_weights_are_refused(mark: str) -> None:
    model = nn.Linear(4, 4)
    setattr(model.weight, mark, True)
    with pytest.raises(InputError, match=r"'weight' is sharded in a flat form .* use FSDP2"):
        Sparsifier(0.5).attach(model)
