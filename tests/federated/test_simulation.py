"""Whole federations: identities between methods, exact counts, and results that nothing but the seed decides."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
from sparsity import Horizon, InputError, Sparsifier, masks
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
from sparsity.federated.site import Site, Source
from sparsity.schedules import Cubic
from tests.federated.small import Model, Points, drops, model
from tests.nets import trainer

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
    found = masks.counts(method.sparsifier.masks)
    for name, density in about["densities"].items():
        assert abs(found[name] - density * method.sparsifier.masks[name].numel()) < 1
    net = model()
    other.sparsifier.attach(net, torch.optim.SGD(net.parameters(), 0.1, 0.9), horizon=Horizon(6, 1))
    assert found != masks.counts(other.sparsifier.masks), "not what they began with"
    assert len({row["density"] for row in outcome.rows}) == 1
    assert sum(row["mask_bound_up"] for row in outcome.rows) == 0


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
    assert all(0 <= each["val/acc"] <= 1 for each in outcome.clients)
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


class ByHand(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Two(Model):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.first.parameters(), 0.1), torch.optim.SGD(self.last.parameters(), 0.1)]


@pytest.mark.parametrize(("make", "message"), [
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
    (lambda: Running(resume="nowhere"), "there is no federation.ckpt in 'nowhere'"),
    (lambda: FedLAW(0), r"share=0 in \(0, 1\)"),
    (lambda: simulate(model(), Points(), None, Federation(200), Protocol(server=FedLAW(0.9))), "leaves a client none"),
    (lambda: run(None, precision="float8"), "precision must be one of"),
])  # fmt: skip
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
