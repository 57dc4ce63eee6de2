"""Rescale: initial weights and learning rates of a network that will be sparse from its first step on."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsity.distributions import ERK, Distribution
from sparsity.errors import InputError
from sparsity.targets import Targets


@torch.no_grad()
def rescaled(
    net: nn.Module, sparsity: float, distribution: Distribution | None = None, targets: Targets | None = None
) -> nn.Module:
    """The same network, each of its target weights divided by the square root of its layer's density.

    An initialisation fits a neuron's weights to the number of its inputs. Random masks of density d leave it d of
    these, so that what it gives is √d times as large as it should be, and signals fade from layer to layer; larger
    weights make up for that. After Evci et al., "Gradient flow in sparse neural networks and how lottery tickets win"
    (AAAI 2022, arXiv 2010.03533), who draw each neuron's weights by the inputs that its mask leaves it; here a layer
    is scaled as a whole, whatever its initialisation was, so no mask has to be there yet.

    For methods whose masks are random at first (StaticMask, SET, RigL, FedDST, FedSGC ...), with their `sparsity`,
    `distribution` (`ERK()` if not given, as in most of them) and `targets`; not for a network that is trained already.

    Raises `InputError` for a sparsity that cannot be met.
    """
    for weight, density in _densities(net, sparsity, distribution, targets):
        weight.div_(density**0.5)
    return net


def scaled_rates(
    optimizer: Optimizer, net: nn.Module, sparsity: float, distribution: Distribution | None = None,
    targets: Targets | None = None,
) -> Optimizer:  # fmt: skip
    """The same optimizer, target weights in groups of their own, whose learning rate is divided by the layer's density.

    What a step changes in a neuron's output is a sum over the weights that the mask leaves it: of density d, a layer
    learns d times as fast as a dense one with the same rate. Divided by d, the rate that is good for the dense network
    is good for the sparse one. After Dey, Bergsma & Hestness, "Sparse maximal update parameterization" (NeurIPS 2024,
    arXiv 2405.15743); here relative to the user's own dense network, whatever its width, for every optimizer of
    gradient steps, and with weight decay times d, so that weights decay as before.

    For networks that begin with larger weights (`rescaled`), with the same arguments. Call it before a schedule of
    rates is made. A second call changes nothing: each group says its `density`.

        def configure_optimizers(self):
            return scaled_rates(torch.optim.SGD(self.parameters(), 0.01), self, sparsity=0.9)

    Raises `InputError` for a sparsity that cannot be met, and where a schedule of this optimizer is there already.
    """
    if any("density" in group for group in optimizer.param_groups):
        return optimizer
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise InputError(f"{type(optimizer).__name__} has a schedule already: scale its rates first, then make that")
    densities = {id(weight): density for weight, density in _densities(net, sparsity, distribution, targets)}
    optimizer.param_groups[:] = [part for group in optimizer.param_groups for part in _parted(group, densities)]
    return optimizer


def _densities(
    net: nn.Module, sparsity: float, distribution: Distribution | None, targets: Targets | None
) -> list[tuple[nn.Parameter, float]]:
    """The target weights that keep any, and what part of theirs."""
    weights = (targets or Targets()).select(net)
    counts = (distribution or ERK())(dict(weights), 1 - sparsity)
    return [(weight, counts[name] / weight.numel()) for name, weight in weights.items() if counts[name]]


def _parted(group: dict[str, Any], densities: dict[int, float]) -> list[dict[str, Any]]:
    """The group in parts of one density each, the densest first: its rate is the one that was asked for."""
    parts: dict[float, list[int]] = {}
    for place, weight in enumerate(group["params"]):
        parts.setdefault(densities.get(id(weight), 1.0), []).append(place)
    return [_part(group, parts[density], density) for density in sorted(parts, reverse=True)]


def _part(group: dict[str, Any], places: list[int], density: float) -> dict[str, Any]:
    each: dict[str, Any] = {"lr": group["lr"] / density, "density": density}
    if "weight_decay" in group:
        each["weight_decay"] = group["weight_decay"] * density
    for name in {"params", "param_names"} & set(group):
        each[name] = [group[name][place] for place in places]
    return {**group, **each}
