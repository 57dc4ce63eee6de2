"""Federated sparse training: many clients, one sparse model, and every byte counted.

outcome = simulate(model, data, FedSGC(sparsity=0.8), Federation(clients=100, per_round=10, rounds=200))
"""

from sparsity.federated.client import Local
from sparsity.federated.coordinator import Protocol
from sparsity.federated.federation import Federation
from sparsity.federated.partition import IID, ById, Dirichlet, OwnData, Pathological, QuantitySkew
from sparsity.federated.server import SCAFFOLD, FedAdam, FedAvg, FedAvgM, FedLAW, FedMedian, FedTrimmedMean
from sparsity.federated.simulation import Outcome, Running, simulate
from sparsity.federated.tolerance import Tolerance

__all__ = [
    "IID", "SCAFFOLD", "ById", "Dirichlet", "FedAdam", "FedAvg", "FedAvgM", "FedLAW", "FedMedian", "FedTrimmedMean",
    "Federation", "Local", "Outcome", "OwnData", "Pathological", "Protocol", "QuantitySkew", "Running", "Tolerance",
    "simulate",
]  # fmt: skip
