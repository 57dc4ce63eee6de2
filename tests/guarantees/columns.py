"""Ways to prune a Lightning module to 75 %: the methods of this project, and peers as their documentation says."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torch.nn.utils import parametrize, prune

from callbacks import (
    GMP,
    LAMP,
    PGF,
    SET,
    SRSTE,
    ConstantMask,
    EdgePopup,
    GlobalMP,
    GraNet,
    GumbelNM,
    HyperSparse,
    IterativeMagnitude,
    OneShot,
    RigL,
    SparseMomentum,
    Sparsify,
    StaticMask,
)
from callbacks.staged import Staged
from sparsity import Sparsifier, shards
from sparsity.adaptive import Phases
from sparsity.penalties import Lasso
from sparsity.schedules import CosineDrop, Linear
from sparsity.targets import clean

SPARSITY = 0.75
Named = dict[str, Tensor]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to prune by name: linear layers, as all columns are told to."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


class Column:
    """A way to prune. A fresh one is made for every run."""

    name = ""
    keeps_state = False  # whether dense momentum is what it grows weights by

    def callbacks(self, model: pl.LightningModule) -> list[pl.Callback]:
        """What the trainer gets; methods that need none prune the model here."""
        raise NotImplementedError

    def asked(self) -> float:
        """The sparsity that is asked for at this moment of training."""
        raise NotImplementedError

    def masks(self, model: nn.Module) -> Named:
        """What the method says it keeps, by the dense model's names."""
        raise NotImplementedError

    def weights(self, model: nn.Module) -> Named:
        """The weights as the forward pass uses them, by the dense model's names."""
        raise NotImplementedError

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What the optimizer holds for each of them."""
        raise NotImplementedError

    def finish(self, model: nn.Module) -> None:
        """What the documentation says to do after training."""

    def took(self, steps: int, all_steps: int) -> bool:
        """Whether that is how many steps training takes."""
        return steps == all_steps


class Ours(Column):
    """A callback of this project."""

    def __init__(self, name: str, make: Callable[[], Sparsify]) -> None:
        self.name, self.method = name, make()
        self.keeps_state = self.method.sparsifier.keeps_state

    def callbacks(self, model: pl.LightningModule) -> list[pl.Callback]:
        if isinstance(self.method, ConstantMask) and all(bool(m.weight.all()) for m in layers(model).values()):  # type: ignore[operator]  # a Linear's weight
            Sparsifier(SPARSITY, targets=self.method.sparsifier.targets).attach(model)
        return [self.method]

    def took(self, steps: int, all_steps: int) -> bool:
        # Training in stages may end by itself.
        return steps == all_steps or (isinstance(self.method, Staged) and all_steps // 3 <= steps < all_steps)

    def asked(self) -> float:
        if isinstance(self.method, ConstantMask):
            return SPARSITY
        return self.method.sparsifier.target(max(0, self.method.step - 1))

    def masks(self, model: nn.Module) -> Named:
        return self.method.sparsifier.masks

    def weights(self, model: nn.Module) -> Named:
        return {name: weight.detach() for name, weight in self.parameters(model).items()}

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        named = {clean(name): weight for name, weight in model.named_parameters(remove_duplicate=False)}
        return {name: named[name] for name in self.masks(model)}


class Peer(Column):
    """A peer that keeps a dense parameter and a mask beside it in each module."""

    pruned = True

    def asked(self) -> float:
        return SPARSITY if self.pruned else 0.0

    def masks(self, model: nn.Module) -> Named:
        return {f"{name}.weight": self.kept(module) for name, module in layers(model).items()}

    def weights(self, model: nn.Module) -> Named:
        parameters, masks = self.parameters(model), self.masks(model)
        return {name: shards.whole(weight.detach()) * masks[name] for name, weight in parameters.items()}

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {f"{name}.weight": self.original(module) for name, module in layers(model).items()}

    def original(self, module: nn.Module) -> nn.Parameter:
        return next(
            p for name, p in module.named_parameters() if name.startswith(("weight", "parametrizations.weight"))
        )

    def kept(self, module: nn.Module) -> Tensor:
        found = [b for name, b in module.named_buffers() if name.endswith("mask")]
        return shards.whole(found[0]).bool() if found else shards.whole(self.original(module).detach()) != 0


class TorchPrune(Peer):
    """`torch.nn.utils.prune`: pruned before training, made permanent after it."""

    name = "torch.nn.utils.prune"

    def callbacks(self, model: pl.LightningModule) -> list[pl.Callback]:
        pairs = [(module, "weight") for module in layers(model).values() if not prune.is_pruned(module)]
        if pairs:
            prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=SPARSITY)
        return []

    def finish(self, model: nn.Module) -> None:
        for module in layers(model).values():
            prune.remove(module, "weight")  # type: ignore[no-untyped-call]  # torch's


class LightningPruning(Peer):
    """Lightning's `ModelPruning`: prunes at the end of the first epoch, permanent in checkpoints, as is its default."""

    name = "ModelPruning"
    pruned = False

    def callbacks(self, model: pl.LightningModule) -> list[pl.Callback]:
        def amount(epoch: int) -> float:
            self.pruned = True
            return SPARSITY

        return [
            ModelPruning(
                "l1_unstructured", parameters_to_prune=[(module, "weight") for module in layers(model).values()],
                amount=amount, apply_pruning=lambda epoch: epoch == 0, use_lottery_ticket_hypothesis=False,
            )
        ]  # fmt: skip


class AoPruning(Peer):
    """`torch.ao.pruning`: prepared and pruned before training, squashed after it."""

    name = "torch.ao.pruning"

    def callbacks(self, model: pl.LightningModule) -> list[pl.Callback]:
        if any(parametrize.is_parametrized(module) for module in layers(model).values()):
            return []
        self.sparsifier = WeightNormSparsifier(SPARSITY, sparse_block_shape=(1, 1), zeros_per_block=1)
        names = [{"tensor_fqn": f"{name}.weight"} for name in layers(model)]
        self.sparsifier.prepare(model, config=names)  # type: ignore[no-untyped-call]  # torch's
        self.sparsifier.step()
        return []

    def finish(self, model: nn.Module) -> None:
        self.sparsifier.squash_mask()


def gradual() -> Any:
    """A schedule with a renewal at every second step up to the middle of training."""
    return Linear(0.1, 0.6, 0.1)


def often() -> Any:
    """Drops at every second step, all through training."""
    return CosineDrop(0.5, every=2, end=1.0)


OURS: dict[str, Callable[[], Sparsify]] = {
    "OneShot": lambda: OneShot(SPARSITY, at=2),
    "GMP": lambda: GMP(SPARSITY, schedule=gradual()),
    "LAMP": lambda: LAMP(SPARSITY, schedule=gradual()),
    "GlobalMP": lambda: GlobalMP(SPARSITY, schedule=gradual()),
    "StaticMask": lambda: StaticMask(SPARSITY),
    "ConstantMask": ConstantMask,
    "SparseMomentum": lambda: SparseMomentum(SPARSITY, often()),
    "SET": lambda: SET(SPARSITY, often()),
    "RigL": lambda: RigL(SPARSITY, often()),
    "GraNet": lambda: GraNet(SPARSITY, drops=often()),
    "GumbelNM": lambda: GumbelNM("1:4"),
    "SRSTE": lambda: SRSTE("1:4"),
    "PGF": lambda: PGF("1:4"),
    "EdgePopup": lambda: EdgePopup(SPARSITY),
    "HyperSparse": lambda: HyperSparse(SPARSITY, Lasso(1e-6), Phases(0.0, 0.34, 0)),
    "IterativeMagnitude": lambda: IterativeMagnitude(SPARSITY, rate=0.5),
}
SCALED: dict[str, Callable[[], Sparsify]] = {"RigL, scaled": lambda: RigL(SPARSITY, often()).scaled()}
PEERS: dict[str, Callable[[], Column]] = {
    "ModelPruning": LightningPruning, "torch.nn.utils.prune": TorchPrune, "torch.ao.pruning": AoPruning,
}  # fmt: skip


def column(name: str) -> Column:
    """A fresh column by its name."""
    ours = OURS | SCALED
    return Ours(name, ours[name]) if name in ours else PEERS[name]()


def kept(masks: Named) -> int:
    """How many weights all masks keep."""
    return sum(int(torch.count_nonzero(mask)) for mask in masks.values())
