"""Lightning callbacks: one line added to a trainer makes its network sparse.

The classes work in a `pytorch_lightning` and in a `lightning.pytorch` Trainer.
"""

from .adaptive import HyperSparse
from .dry_run import DryRun
from .dynamic import SET, GraNet, RigL, SparseMomentum
from .federated import FLASH, FedDST, FedSGC, PruneFL
from .gradual import GMP, LAMP, GlobalMP
from .interrupt import SaveOnInterrupt
from .learned import PGF, SRSTE, STE, GumbelNM
from .lottery import SWAMP, IterativeMagnitude
from .migration import ModelPruning
from .oneshot import ASP, OneShot
from .report import SparsityReport
from .sparsify import Sparsify
from .static import ConstantMask, StaticMask
from .supermask import EdgePopup, LotteryJackpot, SignedSupermask

__all__ = [
    "ASP", "FLASH", "GMP", "LAMP", "PGF", "SET", "SRSTE", "STE", "SWAMP", "ConstantMask", "DryRun", "EdgePopup",
    "FedDST", "FedSGC", "GlobalMP", "GraNet", "GumbelNM", "HyperSparse", "IterativeMagnitude", "LotteryJackpot",
    "ModelPruning", "OneShot", "PruneFL", "RigL", "SaveOnInterrupt", "SignedSupermask", "SparseMomentum", "Sparsify",
    "SparsityReport", "StaticMask",
]  # fmt: skip
