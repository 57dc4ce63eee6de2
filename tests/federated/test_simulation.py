"""Whole federations: identities between methods, exact counts, and results that nothing but the seed decides."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from callbacks import (
    FLASH,
    GMP,
    LAMP,
    SET,
    ConstantMask,
    FedDST,
    FedSGC,
    GraNet,
    GumbelNM,
    HyperSparse,
    OneShot,
    PruneFL,
    RigL,
    SparseMomentum,
    StaticMask,
)
from sparsity import Horizon, InputError, Sparsifier, Targets, masks
from sparsity.congruent import Congruent, Congruity, GradientCongruity
from sparsity.federated import (
    IID,
    SCAFFOLD,
    Dirichlet,
    FedAdam,
    FedAvg,
    FedAvgM,
    Federation,
    FedLAW,
    FedMedian,
    FedTrimmedMean,
    Local,
    Outcome,
    Pathological,
    Protocol,
    QuantitySkew,
    Running,
    Tolerance,
    simulate,
)
from sparsity.federated.coordinator import Coordinator
from sparsity.federated.engine import Engine
from sparsity.federated.federation import seed_of
from sparsity.federated.site import Site
from sparsity.federated.source import Source
from sparsity.importance import Importance
from sparsity.schedules import Cubic
from tests.federated.small import Model, Points, drops, model
from tests.nets import trainer

ROOT = Path(__file__).parents[2]
METHODS: dict[str, Any] = {
    "dense": lambda: None,
    "StaticMask": lambda: StaticMask(0.6),
    "FedDST": lambda: FedDST(0.6, drops()),
    "FedSGC": lambda: FedSGC(0.6, Congruity(0.5), drops()),
    "FedSGC every round": lambda: FedSGC(0.6, Congruity(0.5), drops(1)),
    "FedSGC by gradient": lambda: FedSGC(0.6, GradientCongruity(0.5), drops()),
    "PruneFL": lambda: PruneFL(0.6, drops()),
    "FLASH": lambda: FLASH(0.6, 0.4, 3),
    "RigL": lambda: RigL(0.6, drops()),
    "SET": lambda: SET(0.6, drops()),
    "GMP": lambda: GMP(0.6, Cubic(0.1, 0.8, 1)),
    "LAMP": lambda: LAMP(0.6, Cubic(0.1, 0.8, 1)),
}
SERVERS: dict[str, Any] = {
    "FedAvg": FedAvg, "residual": lambda: FedAvg(residual=True), "FedAvgM": FedAvgM, "FedAdam": lambda: FedAdam(0.05),
    "SCAFFOLD": SCAFFOLD, "median": FedMedian, "trimmed mean": lambda: FedTrimmedMean(0.2),
    "FedLAW": lambda: FedLAW(0.1, 3),
}  # fmt: skip


def federation(rounds: int = 6, clients: int = 8, per_round: int = 4, partition: Any = None) -> Federation:
    return Federation(clients, per_round, rounds, partition or Dirichlet(1.0), held_out=0.2)


def run(
    method: Any = None, net: Model | None = None, rounds: int = 6, workers: int = 1, seed: int = 3, **protocol: Any
) -> Outcome:
    settings = {"local": Local(2), **protocol}
    return simulate(
        net or model(), Points(), method, federation(rounds), Protocol(**settings), Running(workers), seed=seed
    )


def same(one: Outcome, other: Outcome) -> bool:
    return torch.equal(one.state.values, other.state.values) and torch.equal(one.state.mask, other.state.mask)


@pytest.mark.parametrize("name", METHODS)
def test_counts_stay_exact_and_pruned_weights_zero(name: str) -> None:
    method, net, densities = METHODS[name](), model(momentum=0.9), list[float]()
    protocol = Protocol(Local(2))
    simulate(
        net, Points(), method, federation(), protocol, seed=3, on_round=lambda row: densities.append(row["density"])
    )
    assert net.state_dict().keys() == model().state_dict().keys()
    if method is None:
        assert set(densities) == {1.0}
        return
    weights, found = method.sparsifier.weights(), method.sparsifier.masks
    total = sum(weight.numel() for weight in weights.values())
    assert densities[-1] == round(0.4 * total) / total == sum(masks.counts(found).values()) / total
    assert all(not weight[~found[each]].any() for each, weight in weights.items())
    if name not in ("GMP", "LAMP"):
        assert len(set(densities)) == 1
    else:
        assert densities == sorted(densities, reverse=True)
        assert len(set(densities)) > 2


def test_layers_keep_as_many_weights_as_they_began_with() -> None:
    method = FedSGC(0.6, Congruity(0.5), drops(1))
    first = FedSGC(0.6, Congruity(0.5), drops(1)).sparsifier
    net = model()
    Site(net, first, 6, 3).close()
    run(method)
    assert masks.counts(method.sparsifier.masks) == masks.counts(first.masks)
    assert masks.fingerprint(method.sparsifier.masks) != masks.fingerprint(first.masks), "and yet they moved"


@pytest.mark.parametrize(("name", "workers"), [*((name, 2) for name in METHODS), ("FedSGC", 3), ("PruneFL", 4)])
def test_the_number_of_workers_changes_nothing(name: str, workers: int) -> None:
    assert same(*(run(METHODS[name](), model(momentum=0.5), workers=each) for each in (1, workers)))


def test_workers_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    turns, one = Running(5, devices=["cuda:0", "cuda:1"]), Running(5, devices=["cuda:1"])
    assert [str(turns.device_of(rank)) for rank in range(5)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert {str(one.device_of(rank)) for rank in range(5)} == {"cuda:1"}
    assert {Running(5).device_of(rank) for rank in range(5)} == {None}, "the model's own"


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_device_is_that_of_every_worker(device: str, tmp_path: Path) -> None:
    code = f"""
from tests.federated import test_simulation as t
net = t.model()
running = t.Running(2, folder={str(tmp_path)!r}, devices=[{device!r}])
t.simulate(net, t.Points(), t.StaticMask(0.6), t.federation(), t.Protocol(t.Local(2)), running, seed=3)
assert {{each.device.type for each in net.parameters()}} == {{{device!r}}}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)  # of its own, as in this one CUDA may have begun
    found = torch.load(tmp_path / "federation.ckpt", weights_only=True)
    torch.testing.assert_close(found["values"], run(StaticMask(0.6)).state.values, rtol=1e-3, atol=1e-3)
    assert not any(row["failures"] for row in found["rows"])


@pytest.mark.parametrize("server", SERVERS)
def test_servers_learn_whatever_the_number_of_workers(server: str) -> None:
    protocol = Protocol(Local(2), SERVERS[server]())
    one, two = (
        simulate(model(norm=False), Points(), FedSGC(0.5, Congruity(0.5), drops()),
                 federation(16, partition=IID()), protocol, Running(workers), seed=3)
        for workers in (1, 2)
    )  # fmt: skip
    assert same(one, two)
    assert one.state.moments.keys() == two.state.moments.keys()
    assert one.metrics["val/acc"] > 0.5, "a third would be chance"


def test_no_part_by_congruity_and_no_residual_is_feddst() -> None:
    assert same(run(FedSGC(0.6, Congruity(0.0), drops())), run(FedDST(0.6, drops())))
    assert not same(run(FedSGC(0.6, Congruity(1.0), drops())), run(FedDST(0.6, drops())))


def test_nothing_pruned_is_fedavg() -> None:
    pruned, dense = model(), model()
    run(StaticMask(0.0), pruned)
    run(None, dense)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in pruned.state_dict().items())


def test_fedavg_is_the_average_of_clients_trained_alone() -> None:
    """One round against a plain loop: no engine, no payload, float64 averages."""
    net, data = model(norm=False), Points()
    site, source = Site(net, None, 1, 3), Source(data, torch.device("cpu"))
    server = Coordinator(site, source, Federation(5, 3, 1, IID()), Protocol(Local(2)), 3)
    total: dict[str, Tensor] = {}
    chosen = server.chosen()
    samples = sum(len(server.trained[client]) for client in chosen)
    for client in chosen:
        alone = model(norm=False)
        optimizer = torch.optim.SGD(alone.parameters(), 0.1)
        torch.manual_seed(seed_of(3, 0, client))
        order = torch.Generator().manual_seed(seed_of(3, 0, client))
        part = server.trained[client]
        for _ in range(2):
            for places in torch.split(part[torch.randperm(len(part), generator=order)], 4):
                optimizer.zero_grad()
                nn.functional.cross_entropy(alone(data.points[places]), data.labels[places]).backward()  # type: ignore[no-untyped-call]  # torch's
                optimizer.step()
        for name, value in alone.state_dict().items():
            total[name] = total.get(name, torch.zeros(())) + value.double() * len(part) / samples
    Engine(server).round()
    site.layout.write(server.state.values)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value.double(), total[name], atol=1e-7, rtol=0)
    site.close()


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    assert same(run(FedSGC(0.6, drops=drops())), run(FedSGC(0.6, drops=drops())))
    assert not same(run(FedSGC(0.6, drops=drops())), run(FedSGC(0.6, drops=drops()), seed=4))


def test_the_users_random_numbers_stay_theirs() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    net = model()
    torch.manual_seed(5)
    run(None, net)
    assert torch.equal(torch.rand(3), expected)


def test_scouts_decide_how_dense_layers_are_and_their_masks_stay() -> None:
    method, other = FLASH(0.6, 0.4, 3), FLASH(0.6, 0.4, 3)
    outcome = run(method, model(momentum=0.9))
    about = outcome.state.scouting
    assert len(about["clients"]) == 3
    assert about["failures"] == []
    assert about["bytes_down"] > 3 * 4 * len(outcome.state.values), "dense weights"
    assert 3 * 100 < about["bytes_up"] < 3 * 1000, "a number for each layer"
    assert run(FLASH(0.6, 0.4, 3), model(momentum=0.9), workers=2).state.scouting == about
    found = masks.counts(method.sparsifier.masks)
    for name, density in about["densities"].items():
        assert abs(found[name] - density * method.sparsifier.masks[name].numel()) < 1
    net = model()
    other.sparsifier.attach(net, torch.optim.SGD(net.parameters(), 0.1, 0.9), horizon=Horizon(6, 1))
    assert found != masks.counts(other.sparsifier.masks), "not what they began with"
    assert len({row["density"] for row in outcome.rows}) == 1
    assert sum(row["bound_masks_up"] for row in outcome.rows) == 0


def test_a_proximal_term_holds_clients_back() -> None:
    def walked(mu: float) -> float:
        net = model(norm=False)
        before = Site(net, None, 1, 3).layout.read()
        outcome = run(None, net, rounds=1, local=Local(3, proximal=mu))
        return float((outcome.state.values - before).norm())

    assert walked(5.0) < walked(1.0) < walked(0.0)


def test_a_schedule_of_rates_counts_rounds() -> None:
    rates: list[float] = []

    class Decayed(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}]

    run(None, Decayed(), rounds=5)
    assert list(dict.fromkeys(rates)) == [0.1, 0.05, 0.025]
    assert rates == sorted(rates, reverse=True)


def test_clients_are_measured_on_what_they_held_out() -> None:
    outcome = run(None)
    assert len(outcome.clients) == 8
    assert all(0 <= each["val/acc"] <= 1 for each in outcome.clients.values())
    server = Coordinator(Site(model(), None, 6, 3), Source(Points(), torch.device("cpu")), federation(), Protocol(), 3)
    for trained, held, part in zip(server.trained, server.held_out, server.parts, strict=True):
        assert set(trained.tolist()) | set(held.tolist()) == set(part.tolist())
        assert len(trained) + len(held) == len(part)
        assert len(held) == round(0.2 * len(part))


@pytest.mark.parametrize("partition", [IID(), Pathological(2), QuantitySkew(0.5), Dirichlet(0.3)])
def test_every_partition_trains(partition: Any) -> None:
    net, clients = model(norm=False), federation(16, partition=partition)
    outcome = simulate(net, Points(), StaticMask(0.5), clients, Protocol(Local(2)), seed=1)
    assert outcome.metrics["test/acc"] > 0.5


def test_zeros_of_a_pruned_model_stay() -> None:
    net = model()
    Sparsifier(0.5).attach(net)
    zeros = {name: weight == 0 for name, weight in net.named_parameters() if weight.ndim == 2}
    run(ConstantMask(), net)
    assert all(not dict(net.named_parameters())[name][zero].any() for name, zero in zeros.items())


def test_a_plain_trainer_can_be_a_client() -> None:
    """Weights, masks and directions come from elsewhere, and one fit is one client's round."""
    method, net = FedSGC(0.6, Congruity(1.0), drops()), model()
    trainer(method, epochs=1).fit(net, Points())
    sparsifier = method.sparsifier
    assert isinstance(sparsifier, Congruent)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    sparsifier.receive(first, 0, {name: torch.ones_like(mask, dtype=torch.int8) for name, mask in first.items()})
    trainer(method, epochs=1).fit(net, Points())
    assert masks.counts(sparsifier.masks) == masks.counts(first)
    assert masks.fingerprint(sparsifier.masks) != masks.fingerprint(first)
    assert sparsifier.directions


def test_a_plain_trainer_keeps_what_came_before_it_was_attached() -> None:
    """Also for another model object each round: masks and directions wait for the fit."""
    method = FedSGC(0.6, Congruity(1.0), drops())
    sparsifier = method.sparsifier
    assert isinstance(sparsifier, Congruent)
    generator = torch.Generator().manual_seed(0)
    seen: list[str] = []
    look = pl.callbacks.LambdaCallback(on_train_start=lambda *_: seen.append(masks.fingerprint(sparsifier.masks)))
    for seed in range(2):
        net = model(seed)
        came = {name: torch.rand(each.shape, generator=generator) < 0.4 for name, each in Targets().select(net).items()}
        sparsifier.receive(came, directions={name: each.to(torch.int8) for name, each in came.items()})
        before = {name: each.detach().clone() for name, each in Targets().select(net).items()}
        trainer(method, look, epochs=1).fit(net, Points(batch_size=40))
        assert seen.pop() == masks.fingerprint(came)
        begun = sparsifier.state_dict()["begun"]
        assert all(torch.equal(begun[name], value * came[name]) for name, value in before.items())


class Leaky(Model):
    """Trains its last layer only, and counts in a buffer that no checkpoint has."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("causal", torch.full((2,), -torch.inf))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen += batch[0].abs().mean()
        return super().training_step(batch) * (1 + 0.01 * self.seen)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.last.parameters(), 0.1)


def test_nothing_is_left_of_the_client_before() -> None:
    torch.manual_seed(0)
    one, other = Leaky(), Leaky()
    other.load_state_dict(one.state_dict())
    found = [run(StaticMask(0.5), net, local=Local(2, clip=0.5), workers=w) for net, w in ((one, 1), (other, 2))]
    assert same(*found)
    assert float(one.seen) == 0
    assert all(parameter.grad is None for parameter in one.parameters())


def test_modes_of_modules_are_the_users() -> None:
    net = model()
    net.norm.eval()
    before = net.state_dict()["norm.running_mean"].clone()
    run(None, net)
    assert torch.equal(net.state_dict()["norm.running_mean"], before)
    assert net.training
    assert not net.norm.training


def test_a_module_has_its_own_log_again_also_after_an_error() -> None:
    refused, net = Two(), model()
    with pytest.raises(InputError):
        run(None, refused)
    run(None, net)
    assert "log" not in vars(refused)
    assert "log" not in vars(net)


class Loud(Points):
    """Draws with numpy, drops short batches, has two validation loaders, and splits anew at each setup."""

    setups = 0

    def setup(self, stage: str) -> None:
        self.setups += 1

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(self.points[:101], self.labels[:101]), 4, drop_last=True)

    def val_dataloader(self) -> Any:
        return [self._loader(240, 250), self._loader(250, 300)]


class Noisy(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        point, label = self.tensors[0][index], self.tensors[1][index]
        return point + 0.1 * float(np.random.randn()) + 0.1 * random.random(), label


class Positional(Model):
    """Its steps call the number of the batch what they like."""

    def training_step(self, batch: Any, _: int = 0) -> Tensor:
        return super().training_step(batch)

    def validation_step(self, batch: Any, number: int) -> None:
        super().validation_step(batch, number)
        self.log("val/largest", float(number), reduce_fx="max")

    def on_validation_epoch_end(self) -> None:
        self.log("val/ended", 1.0)


def test_data_and_steps_as_people_write_them() -> None:
    found = []
    for workers in (1, 2):
        torch.manual_seed(0)
        data = Loud()
        found.append(
            simulate(Positional(), data, None, Federation(5, 5, 3), Protocol(Local(2)), Running(workers), seed=1)
        )
        assert data.setups == 2, "for training and for testing"
        assert data.trainer is None
        assert not any(row["failures"] for row in found[-1].rows), "21 samples in batches of 4 leave one"
    assert same(*found)
    loaders = [f"val/largest/dataloader_idx_{place}" for place in (0, 1)]
    assert [found[0].metrics[name] for name in loaders] == [2, 12], "as Lightning calls them"
    assert found[0].metrics["val/ended"] == 1


class Training(Points):
    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return super().train_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 100 * self.trainer.training, batch[1]]  # type: ignore[union-attr]  # the stand-in


def test_a_data_module_knows_whether_it_trains() -> None:
    sizes: list[float] = []

    class Sized(Model):
        def training_step(self, batch: Any) -> Tensor:
            sizes.append(float(batch[0].mean()))
            return super().training_step(batch)

    outcome = simulate(Sized(), Training(), None, Federation(5, 5, 1), Protocol(Local(1)), seed=1)
    assert min(sizes) > 50
    assert outcome.metrics["val/acc"] >= 0


def test_without_a_validation_split_there_is_no_accuracy(tmp_path: Path) -> None:
    class Bare(pl.LightningDataModule):
        train_dataloader = Points.train_dataloader
        _loader = Points._loader

        def __init__(self) -> None:
            super().__init__()
            vars(self).update({name: vars(Points())[name] for name in ("points", "labels", "count", "batch_size")})

    outcome = simulate(model(), Bare(), None, Federation(5, 5, 2), Protocol(Local(1)), Running(folder=tmp_path), seed=1)
    assert [row["accuracy"] for row in outcome.rows] == [None, None]
    assert outcome.metrics == {}


def test_clients_do_not_prune_where_the_server_does() -> None:
    outcome = run(GMP(0.8, Cubic(0, 3, 1)))
    assert sum(row["bound_masks_up"] for row in outcome.rows) == 0


def test_frozen_layers_keep_their_masks() -> None:
    net = model()
    net.first.requires_grad_(False)
    method = PruneFL(0.6, drops(1))
    before = Importance(0.6, drops(1))
    Site(model(), before, 6, 3).close()
    run(method, net)
    found = method.sparsifier.masks
    assert torch.equal(found["first.weight"], before.masks["first.weight"])
    assert not torch.equal(found["middle.weight"], before.masks["middle.weight"])


def test_controls_are_sent_of_kept_weights_and_kept_as_precisely_as_they_are_sent() -> None:
    method, net = FedSGC(0.6, Congruity(0.5), drops(1)), model()
    outcome = run(method, net, rounds=8, server=SCAFFOLD())
    site = Site(net, method.sparsifier, 9, 3)
    server = Coordinator(site, Source(Points(), torch.device("cpu")), federation(9), Protocol(server=SCAFFOLD()), 3)
    server.state = outcome.state
    _, task = server.outgoing(server.chosen()[0])
    assert task.controls is not None
    for control in task.controls:
        assert control[: len(task.mask)][task.mask].any()
        assert not control[: len(task.mask)][~task.mask].any()
    site.close()
    assert all(each.dtype == torch.float32 for client, each in outcome.state.controls.items() if client >= 0)


@pytest.mark.parametrize(("precision", "part"), [("float32", 1.0), ("float16", 0.5), ("int8", 0.25)])
def test_precision_counts_for_dense_models_too(precision: str, part: float) -> None:
    rows = [run(None, precision=each, rounds=1).rows[0]["bytes_up"] for each in ("float32", precision)]
    weights = 4 * 4 * (6 * 12 + 144 + 36)  # of four clients
    assert rows[0] - rows[1] == pytest.approx((1 - part) * weights, abs=4 * 100)


def test_a_model_in_bfloat16_sends_two_bytes_a_weight() -> None:
    net = model(norm=False).bfloat16()
    data = Points()
    data.points = data.points.bfloat16()
    row = simulate(net, data, None, Federation(5, 5, 1), Protocol(Local(1)), seed=1).rows[0]
    parameters = sum(each.numel() for each in net.parameters())
    assert row["bytes_dense"] == 2 * parameters * 10
    assert row["bytes_up"] < 5 * (2 * parameters + 2000)


class ByHand(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Two(Model):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.first.parameters(), 0.1), torch.optim.SGD(self.last.parameters(), 0.1)]


class Plateau(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/acc"}}


class OneCycle(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, 0.9)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3)]


class AsksTrainer(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1 / self.trainer.max_epochs)  # type: ignore[operator]  # may be None


class Empty(Model):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)


class Stream(Points):
    def train_dataloader(self) -> Any:
        class Numbers(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return iter([1, 2])

        return DataLoader(Numbers(), 2)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: run(None, Plateau()), "ReduceLROnPlateau waits for a metric"),
    (lambda: run(None, OneCycle()), "OneCycleLR cannot take its step for round 4.*schedules count rounds"),
    (lambda: run(None, AsksTrainer()), "configure_optimizers has to do without a trainer"),
    (lambda: run(None, Empty()), "Empty has no parameters"),
    (lambda: simulate(model(), Stream()), "map-style dataset and a batch_size, got Numbers"),
    (lambda: run(FedSGC(0.5, drops=drops()), local=Local(1)), "adjust_after=1 of epochs=1: let it train an epoch"),
    (lambda: run(HyperSparse(0.5)), "Adaptive finds its masks by more than weights and gradients"),
    (lambda: run(GumbelNM("1:2")), "finds its masks by more than"),
    (lambda: run(SparseMomentum(0.5)), "have to stay as many when clients move them"),
    (lambda: run(GraNet(0.5)), "have to stay as many when clients move them"),
    (lambda: run(OneShot(0.5, at=900)), "after the end of training at step 6"),
    (lambda: run(None, ByHand()), "ByHand optimizes by hand"),
    (lambda: run(None, Two()), "clients train with one optimizer, Two configures 2"),
    (lambda: run(None, model(momentum=0.9), server=SCAFFOLD()), "has to be SGD without momentum"),
    (lambda: Federation(5, 6), "per_round=6 of clients=5 cannot take part"),
    (lambda: Federation(5, 5, 0), "rounds=0 of at least 1"),
    (lambda: simulate(model(), Points(), None, Federation(500, 5, 1)), "240 samples cannot be divided among 500"),
    (lambda: simulate(model(), Points(), None, Federation(80, 5, 1, Dirichlet(0.001))), "alpha=0.001 starves a client"),
    (lambda: simulate(model(), Points(), None, Federation(5, 5, 1, Pathological(4))), "cannot share 3 classes out"),
    (lambda: Local(0), "epochs=0 and gradients=1 of at least 1"),
    (lambda: Local(proximal=-1), "proximal=-1 of at least 0"),
    (lambda: Tolerance(dropout=1), r"dropout=1 in \[0, 1\)"),
    (lambda: Tolerance(clip=0), "clip=0 above 0"),
    (lambda: Running(0), "workers=0 and evaluate_every=1 of at least 1"),
    (lambda: Running(devices=["gpu"]), "expected devices such as 'cuda:1' or 'cpu', got 'gpu'"),
    (lambda: Running(devices=["cuda:64"]), r"there is no device 'cuda:64': torch finds \d GPUs"),
    (lambda: run(tolerance=Tolerance(quorum=5)), "quorum=5 of per_round=4 clients can never answer"),
    (lambda: run(StaticMask), "a method is a callback, such as FedSGC"),
    (lambda: run(seed=-1), "expected seed=-1 of at least 0"),
    (lambda: simulate(model(), None), "clients share a LightningDataModule, got NoneType"),
    (lambda: run(None, server=FedLAW()), "FedLAW cannot learn by the 5 samples of the server, in batches of 4"),
    (lambda: run(PruneFL(0.6, drops(), times={"first": 2.0})), r"times of \['first'\], which are no targets"),
    (lambda: Running(resume="nowhere"), "there is no federation.ckpt in 'nowhere'"),
    (lambda: FedLAW(0), r"share=0 in \(0, 1\)"),
    (lambda: simulate(model(), Points(), None, Federation(200), Protocol(server=FedLAW(0.9))), "leaves a client none"),
    (lambda: run(None, precision="float8"), "precision must be one of"),
])  # fmt: skip
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
