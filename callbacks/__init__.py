"""Lightning callbacks: one line added to a trainer makes its network sparse.

The classes work in a `pytorch_lightning` and in a `lightning.pytorch` Trainer.
"""

from .adaptive import HyperSparse
from .dynamic import SET, GraNet, RigL, SparseMomentum
from .gradual import GMP, LAMP, GlobalMP
from .learned import PGF, SRSTE, STE, GumbelNM
from .lottery import SWAMP, IterativeMagnitude
from .oneshot import ASP, OneShot
from .report import SparsityReport
from .sparsify import Sparsify
from .static import ConstantMask, StaticMask

__all__ = [
    "ASP", "GMP", "LAMP", "PGF", "SET", "SRSTE", "STE", "SWAMP", "ConstantMask", "GlobalMP", "GraNet", "GumbelNM",
    "HyperSparse", "IterativeMagnitude", "OneShot", "RigL", "SparseMomentum", "Sparsify", "SparsityReport",
    "StaticMask",
]  # fmt: skip
