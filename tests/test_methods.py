"""The conformance table: every method, every situation, every invariant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks import (
    ASP,
    FLASH,
    GMP,
    LAMP,
    PGF,
    SET,
    SRSTE,
    STE,
    SWAMP,
    ConstantMask,
    EdgePopup,
    FedDST,
    FedSGC,
    GlobalMP,
    GraNet,
    GumbelNM,
    HyperSparse,
    IterativeMagnitude,
    LotteryJackpot,
    OneShot,
    PruneFL,
    RigL,
    SignedSupermask,
    SparseMomentum,
    Sparsify,
    StaticMask,
)
from sparsity import Sparsifier, Targets, masks
from sparsity.adaptive import Adaptive, Phases
from sparsity.congruent import Congruity, GradientCongruity
from sparsity.distributions import ER, ERK, Uniform, UniformPlus
from sparsity.dynamic import Dynamic
from sparsity.gumbel import Annealing, Prior
from sparsity.initial import SNIP, SynFlow
from sparsity.learned import Learned
from sparsity.lottery import Lottery, Particles
from sparsity.penalties import HyperSparsity, Lasso
from sparsity.redistribution import InPlace, Proportional
from sparsity.relaxation import Geometric, LinearDecay, Stepwise
from sparsity.schedules import ConstantDrop, CosineDrop, InTime, Iterative, Linear, LinearDrop, Once
from sparsity.scores import Gradient, Lamp, Magnitude, Random
from tests.nets import Batches, MakeOptimizer, SaveEpochs, Task, adamw, sgd, task, trainer

METHODS: dict[str, Callable[[], Sparsify]] = {
    "OneShot": lambda: OneShot(sparsity=0.8),
    "OneShot midway": lambda: OneShot(sparsity=0.7, at=0.5, distribution=UniformPlus()),
    "OneShot random": lambda: OneShot(sparsity=0.5, at="1ep", score=Random(), distribution=ERK()),
    "OneShot 2:4": lambda: OneShot(sparsity=0.5, pattern="2:4", distribution=Uniform()),
    "OneShot by LAMP scores": lambda: OneShot(sparsity=0.9, at="1ep", score=Lamp()),
    "GMP": lambda: GMP(sparsity=0.9),
    "GMP linear, ERK": lambda: GMP(sparsity=0.9, schedule=Linear(0.1, 0.8, 0.15), distribution=ERK()),
    "GMP 1:4": lambda: GMP(sparsity=0.75, pattern="1:4", schedule=Linear(0.1, 0.8, 2)),
    "GMP channel": lambda: GMP(sparsity=0.5, pattern="channel", targets=Targets(exclude=["net.head.*"])),
    "GMP blocks": lambda: GMP(sparsity=0.5, pattern="4x4", targets=Targets(exclude=["net.head.*"])),
    "LAMP gradual": lambda: LAMP(sparsity=0.9),
    "LAMP iterative": lambda: LAMP(sparsity=0.9, schedule=Iterative(0.3, 0.1, 0.8)),
    "LAMP one-shot": lambda: LAMP(sparsity=0.9, schedule=Once("1ep")),
    "GlobalMP": lambda: GlobalMP(sparsity=0.9, minimum=0.01),
    "StaticMask": lambda: StaticMask(sparsity=0.9),
    "StaticMask ER": lambda: StaticMask(sparsity=0.9, distribution=ER()),
    "StaticMask uniform": lambda: StaticMask(sparsity=0.9, distribution=Uniform()),
    "ConstantMask": lambda: ConstantMask(),
    "SparseMomentum": lambda: SparseMomentum(sparsity=0.9, drops=CosineDrop(0.5, 2, 1.0, 0.005)),
    "SparseMomentum by epochs": lambda: SparseMomentum(sparsity=0.6, distribution=ERK()),
    "SparseMomentum in place": lambda: SparseMomentum(
        sparsity=0.7, drops=LinearDrop(0.5, 1, 1.0), redistribution=InPlace()
    ),
    "SparseMomentum by gradients and magnitudes": lambda: SparseMomentum(
        sparsity=0.8, drops=ConstantDrop(0.4, 2, 1.0), grow=Gradient(), redistribution=Proportional(Magnitude())
    ),
    "SET": lambda: SET(sparsity=0.9, drops=CosineDrop(0.3, 2)),
    "SET uniform": lambda: SET(sparsity=0.5, drops=ConstantDrop(0.3, "1ep", 1.0), distribution=Uniform()),
    "RigL": lambda: RigL(sparsity=0.8, drops=CosineDrop(0.3, 2)),
    "RigL in time": lambda: RigL(sparsity=0.9, drops=InTime(every=5)),
    "GraNet": lambda: GraNet(sparsity=0.8, drops=CosineDrop(0.5, 2, 1.0, 0.005)),
    "GumbelNM": lambda: GumbelNM("2:4"),
    "GumbelNM 1:4, weights too": lambda: GumbelNM("1:4", Prior(strength=0), Annealing(energy=0.0), frozen=False),
    "SRSTE": lambda: SRSTE("2:4"),
    "STE 1:4": lambda: STE("1:4"),
    "STE transposable": lambda: STE("2:4T", targets=Targets(exclude=["net.head.*"])),
    "PGF exponential": lambda: PGF("1:4"),
    "PGF linear": lambda: PGF("1:2", LinearDecay(0.8)),
    "PGF stepwise": lambda: PGF("1:4", Stepwise(0.7)),
    "PGF geometric": lambda: PGF("1:4", Geometric(0.7)),
    "ASP": lambda: ASP("2:4"),
    "OneShot by SNIP": lambda: OneShot(0.8, score=SNIP(), targets=Targets(exclude=["*unused*"])),
    "OneShot by SynFlow": lambda: OneShot(0.9, score=SynFlow(5), distribution=ERK()),
    "LotteryJackpot": lambda: LotteryJackpot(0.8),
    "EdgePopup": lambda: EdgePopup(0.5),
    "EdgePopup, constant": lambda: EdgePopup(0.7, constant=True, distribution=ERK()),
    "SignedSupermask": lambda: SignedSupermask(0.6),
    "HyperSparse": lambda: HyperSparse(0.9, HyperSparsity(1e-5), Phases(0.0, 0.5, 0), measure="loss"),
    "HyperSparse, L1": lambda: HyperSparse(0.9, Lasso(1e-5), Phases("1ep", "1ep", 0), distribution=ERK()),
    "IterativeMagnitude": lambda: IterativeMagnitude(0.6, rate=0.5),
    "IterativeMagnitude, rewound": lambda: IterativeMagnitude(0.5, rate=0.5, rewind="1ep", distribution=ERK()),
    "SWAMP": lambda: SWAMP(0.8, rate=0.8, rewind="1ep", particles=Particles(1, 1.0)),
    "FedDST": lambda: FedDST(sparsity=0.8, drops=CosineDrop(0.3, 2)),
    "FedSGC": lambda: FedSGC(sparsity=0.7, congruity=Congruity(0.5), drops=ConstantDrop(0.2, "1ep", 1.0)),
    "FedSGC by gradient": lambda: FedSGC(0.9, GradientCongruity(1.0), CosineDrop(0.3, 2), Uniform()),
    "FLASH": lambda: FLASH(sparsity=0.6, drops=CosineDrop(0.5, 2, 1.0, 0.005)),
    "PruneFL": lambda: PruneFL(sparsity=0.8, drops=CosineDrop(0.3, 2)),
    "StaticMask, scaled": lambda: StaticMask(sparsity=0.9).scaled(),
    "SET, scaled weights": lambda: SET(sparsity=0.8, drops=CosineDrop(0.3, 2)).scaled("weights"),
    "SparseMomentum, scaled": lambda: SparseMomentum(sparsity=0.8, drops=CosineDrop(0.5, 2, 1.0, 0.005)).scaled(),
    "FedSGC, scaled": lambda: FedSGC(sparsity=0.7, congruity=Congruity(0.5), drops=CosineDrop(0.3, 2)).scaled(),
    "GraNet from dense": lambda: GraNet(sparsity=0.9, initial=0.0, end=0.7, drops=CosineDrop(0.5, 1, 1.0, 0.005)),
}
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "accumulation with a remainder": {"accumulate_grad_batches": 4},
    "clipping by norm": {"gradient_clip_val": 0.5},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16 autocast": {"precision": "bf16-mixed"},
}
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD momentum": sgd,
    "SGD Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": adamw,
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
}
every_method = pytest.mark.parametrize("name", METHODS)


class Watch(pl.Callback):
    """Checks the invariants from outside after every batch; `steps` counts the optimizer steps it saw."""

    def __init__(self, method: Sparsify) -> None:
        self.method, self.steps, self.sparsities = method, 0, [0.0]
        self.masks: masks.Masks = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        sparsifier = self.method.sparsifier
        if trainer.global_step > self.steps:
            self.steps += 1
            assert trainer.global_step == self.steps == self.method.step
        weights = dict(pl_module.named_parameters(remove_duplicate=False))
        for name, mask in sparsifier.masks.items():
            assert mask.dtype == torch.bool
            assert not weights[name][~mask].any(), f"{name} is not zero where it is pruned"
            # Methods that grow by momentum keep that of pruned weights: it is their signal.
            for optimizer in trainer.optimizers if not sparsifier.keeps_state else []:
                for state in optimizer.state.get(weights[name], {}).values():
                    if isinstance(state, Tensor) and state.shape == mask.shape:
                        assert not state[~mask].any(), f"the optimizer state of {name} is not zero"
        if self.steps:
            self._check_density(sparsifier)

    def _check_density(self, sparsifier: Sparsifier) -> None:
        kept, total = sum(masks.counts(sparsifier.masks).values()), sum(m.numel() for m in sparsifier.masks.values())
        planned = round((1 - sparsifier.target(self.steps - 1)) * total)
        if sparsifier.pattern.name in ("channel", "4x4"):
            # Whole units only: off by at most half the largest unit, the last layer's.
            assert abs(kept - planned) <= 36
        elif not isinstance(self.method, ConstantMask):
            assert kept == planned, f"{kept} kept instead of {planned} after step {self.steps}"
        self.sparsities.append(1 - kept / total)
        assert self.sparsities[-1] >= self.sparsities[-2], "there are more weights than before"
        if self.masks and not isinstance(sparsifier, Dynamic | Learned):
            assert not any((mask & ~self.masks[name]).any() for name, mask in sparsifier.masks.items()), "one returned"
        self.masks = sparsifier.masks


def start(name: str, make_optimizer: MakeOptimizer = sgd, seed: int = 0) -> tuple[Task, Sparsify]:
    """A fresh task and method; ConstantMask gets a network that is already pruned."""
    model = task(seed, make_optimizer)
    if name == "ConstantMask":
        Sparsifier(0.7).attach(model)
    return model, METHODS[name]()


def run(name: str, make_optimizer: MakeOptimizer = sgd, **settings: Any) -> tuple[Task, Sparsify, Watch]:
    model, method = start(name, make_optimizer)
    watch = Watch(method)
    trainer(method, watch, **settings).fit(model, Batches())
    return model, method, watch


def parameters_equal(one: Task, other: Task) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@every_method
@pytest.mark.parametrize("situation", SITUATIONS)
def test_exact_and_zero_after_every_step(name: str, situation: str) -> None:
    settings = SITUATIONS[situation]
    _, method, watch = run(name, **settings)
    per_epoch = -(-6 // settings.get("accumulate_grad_batches", 1))
    assert watch.steps == 3 * per_epoch
    assert method.sparsifier.renewed == method.sparsifier.last_renewal()
    expected = 0.7 if name == "ConstantMask" else method.sparsifier.sparsity
    assert watch.sparsities[-1] == pytest.approx(expected, abs=0.02)


@every_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_keeps_the_zeros(name: str, optimizer: str) -> None:
    _, _, watch = run(name, OPTIMIZERS[optimizer])
    assert watch.steps == 18


@every_method
def test_state_dict_keys_are_the_dense_models(name: str, tmp_path: Path) -> None:
    model, method = start(name)
    keys = list(task().state_dict())
    runner = trainer(method)
    runner.fit(model, Batches())
    runner.save_checkpoint(tmp_path / "full.ckpt")
    saved = torch.load(tmp_path / "full.ckpt", weights_only=True)
    assert list(model.state_dict()) == keys == list(saved["state_dict"])
    dense = task(seed=9)
    dense.load_state_dict(saved["state_dict"])
    assert parameters_equal(dense, model)


@every_method
def test_same_seed_same_masks(name: str) -> None:
    first, second = run(name), run(name)
    assert masks.fingerprint(first[1].sparsifier.masks) == masks.fingerprint(second[1].sparsifier.masks)
    assert parameters_equal(first[0], second[0])


def test_lamps_counts_and_lamps_scores_are_one_method() -> None:
    by_counts, by_scores = run("LAMP one-shot"), run("OneShot by LAMP scores")
    assert masks.fingerprint(by_counts[1].sparsifier.masks) == masks.fingerprint(by_scores[1].sparsifier.masks)


@pytest.mark.parametrize("name", ["StaticMask", "OneShot random"])
def test_other_seed_other_random_masks(name: str) -> None:
    found = []
    for seed in (0, 1):
        model, method = start(name, seed=seed)
        trainer(method).fit(model, Batches())
        found.append(masks.fingerprint(method.sparsifier.masks))
    assert found[0] != found[1]


@every_method
@pytest.mark.parametrize(
    ("make_optimizer", "epoch"), [(sgd, 0), (adamw, 1), (sgd, 2)], ids=["SGD 0", "AdamW 1", "SGD 2"]
)
def test_resume_equals_the_uninterrupted_run(
    name: str, make_optimizer: MakeOptimizer, epoch: int, tmp_path: Path
) -> None:
    model, method = start(name, make_optimizer)
    whole = trainer(method, SaveEpochs(tmp_path), epochs=4, enable_checkpointing=True)
    whole.fit(model, Batches())

    again, resumed = task(5, make_optimizer), METHODS[name]()
    watch = Watch(resumed)
    watch.steps = 6 * (epoch + 1)
    second = trainer(resumed, watch, epochs=4)
    second.fit(again, Batches(), ckpt_path=str(tmp_path / f"{epoch}.ckpt"), weights_only=True)

    assert watch.steps == resumed.step == method.step == whole.global_step
    assert whole.global_step == 24 or isinstance(method.sparsifier, Adaptive | Lottery), "only these end by themselves"
    assert masks.fingerprint(resumed.sparsifier.masks) == masks.fingerprint(method.sparsifier.masks)
    assert parameters_equal(again, model)
    states = [run.optimizers[0].state_dict()["state"] for run in (whole, second)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][index][k])) for k, v in state.items())


@every_method
def test_masks_come_back_from_a_weights_only_checkpoint(name: str, tmp_path: Path) -> None:
    model, method = start(name)
    runner = trainer(method)
    runner.fit(model, Batches())
    runner.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    fresh = task(seed=3)
    fresh.load_state_dict(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"])
    keep = ConstantMask(targets=method.sparsifier.targets)
    watch = Watch(keep)
    trainer(keep, watch).fit(fresh, Batches())
    assert watch.steps == 18
    expected = method.sparsifier.masks
    if isinstance(method.sparsifier, Dynamic):
        # A newly grown weight is exactly zero until it gets a gradient, which behind a dead neuron it never does.
        weights = dict(model.named_parameters())
        expected = {name: mask & (weights[name] != 0) for name, mask in expected.items()}
        assert masks.density(expected) > 0.9 * method.sparsifier.density()
    assert masks.fingerprint(keep.sparsifier.masks) == masks.fingerprint(expected)


@every_method
def test_callback_state_is_tensors_and_primitives_of_one_bit_per_weight(name: str) -> None:
    _, method, _ = run(name)
    state = method.state_dict()["sparsifier"]["masks"]
    for name_, mask in method.sparsifier.masks.items():
        assert state[name_]["bits"].dtype == torch.uint8
        assert state[name_]["bits"].numel() == -(-mask.numel() // 8)
