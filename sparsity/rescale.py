"""Rescale: initial weights of a network that will be sparse from its first step on."""

import torch
from torch import nn

from sparsity.distributions import ERK, Distribution
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
    weights = (targets or Targets()).select(net)
    counts = (distribution or ERK())(dict(weights), 1 - sparsity)
    for name, weight in weights.items():
        if counts[name]:
            weight.div_((counts[name] / weight.numel()) ** 0.5)
    return net
