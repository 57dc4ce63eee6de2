"""Shrink: neurons and channels that pruning has left without a part to play are taken out."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsity.errors import InputError

# Each element for itself, so that a constant stays one; and pools, which leave constants alone.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Hardswish,
    nn.Softplus, nn.Identity,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
DROPOUTS = (nn.Dropout, nn.Dropout2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
LAYERS = (nn.Linear, nn.Conv2d)


def shrink(chain: nn.Sequential) -> nn.Sequential:
    """A smaller dense copy of a chain of layers that computes the same, when it does not train.

    What is taken out are outputs that the next layer does not look at, and outputs that do not depend on the input,
    whose constant goes into the next layer's bias. The chain's own inputs and outputs stay. Between linear layers and
    convolutions there may be elementwise activations, batch norms, dropout, pools and a `Flatten`; chains of chains are
    laid out in one. Dense products get as much faster as they get smaller, on any device.

    Raises `InputError` for a chain with other layers, which the `torch-pruning` package may know.
    """
    laid_out = _laid_out(chain)
    for layer in laid_out:
        if type(layer) not in (*LAYERS, *ELEMENTWISE, *NORMS, *DROPOUTS, *POOLS, nn.Flatten):
            raise InputError(f"a chain of known layers is shrunk, {type(layer).__name__} is none of them")
        if isinstance(layer, NORMS) and layer.running_mean is None:
            raise InputError("batch norms without running statistics have no constants: they are not shrunk")
        if "weight" not in dict(layer.named_parameters()) and isinstance(layer, LAYERS):
            raise InputError("a layer's weight is no parameter of its own: make torch.nn.utils.prune's masks permanent")
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            raise InputError("convolutions with groups, or padded by anything but zeros, are not shrunk")
    layers = copy.deepcopy(laid_out)
    places = [place for place, layer in enumerate(layers) if isinstance(layer, LAYERS)]
    for first, second in pairwise(places):
        _check(layers[first], layers[first + 1 : second], layers[second])  # type: ignore[arg-type]  # both are
    changed = True
    while changed:  # what goes in a later layer may leave more without use in an earlier one
        changed = False
        for first, second in reversed(list(pairwise(places))):
            changed |= _thin(layers[first], layers[first + 1 : second], layers[second])  # type: ignore[arg-type]  # both are
    return nn.Sequential(*layers)


def _check(layer: nn.Linear | nn.Conv2d, between: Sequence[nn.Module], following: nn.Linear | nn.Conv2d) -> None:
    """Raises `InputError` where it is not plain which outputs of a layer the following one looks at."""
    flat = [each for each in between if isinstance(each, nn.Flatten)]
    if any((each.start_dim, each.end_dim) != (1, -1) for each in flat):
        raise InputError("a Flatten of other dimensions than from the first to the last is not shrunk across")
    if isinstance(layer, nn.Conv2d) and isinstance(following, nn.Linear) != bool(flat):
        raise InputError(f"between {layer} and {following} there is one Flatten, or none between convolutions")
    if isinstance(layer, nn.Linear) and (
        isinstance(following, nn.Conv2d) or following.in_features != len(layer.weight)
    ):
        raise InputError(f"{following} has inputs that are not those of the {len(layer.weight)} outputs before it")
    for each in between:
        if isinstance(each, NORMS) and each.num_features != len(layer.weight):
            raise InputError(f"{each} has other features than the {len(layer.weight)} outputs before it")


@torch.no_grad()
def _thin(layer: nn.Linear | nn.Conv2d, between: Sequence[nn.Module], following: nn.Linear | nn.Conv2d) -> bool:
    """Takes outputs of a layer out that play no part in the following one; whether there were any."""
    count = len(layer.weight)
    looked_at = _by_input(following, count).count_nonzero(dim=(0, 2)) > 0
    varies = layer.weight.flatten(1).count_nonzero(dim=1) > 0
    constant = _constants(layer, between)
    folds = constant == 0
    padded = isinstance(following, nn.Conv2d) and following.padding not in (0, "valid", (0, 0))
    if not padded and not any(isinstance(each, DROPOUTS) for each in between):
        folds = constant.isfinite()
    keep = looked_at & (varies | ~folds)
    idle = False
    if not keep.any():  # one has to stay: it need not look at anything
        keep[0], idle = True, bool(layer.weight[0].any())
        layer.weight[0] = 0
    if keep.all():
        return idle
    gone = ~keep & looked_at
    if gone.any() and bool(constant[gone].any()):
        share = _by_input(following, count)[:, gone].sum(2) @ constant[gone]
        old = following.bias
        following.bias = nn.Parameter(share if old is None else old + share, old is None or old.requires_grad)
    _keep_outputs(layer, keep)
    for each in between:
        if isinstance(each, NORMS):
            _keep_features(each, keep)
    _keep_inputs(following, keep)
    return True


def _constants(layer: nn.Linear | nn.Conv2d, between: Sequence[nn.Module]) -> Tensor:
    """What each output is, if it does not depend on the input, when it reaches the following layer.

    NaN where it is not the same everywhere: an average near a border counts zeros in.
    """
    value = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.clone()
    for each in between:
        if isinstance(each, NORMS):
            assert each.running_mean is not None
            assert each.running_var is not None
            value = (value - each.running_mean) / (each.running_var + each.eps).sqrt()
            value = value * (1 if each.weight is None else each.weight) + (0 if each.bias is None else each.bias)
        elif isinstance(each, ELEMENTWISE):
            value = each(value)
        elif isinstance(each, nn.AvgPool2d) and (
            each.padding not in (0, (0, 0)) or each.ceil_mode or each.divisor_override
        ):
            value = value.where(value == 0, torch.nan)
    return value


def _by_input(following: nn.Linear | nn.Conv2d, count: int) -> Tensor:
    """The weights of the following layer by what they look at: ``[out, count, places]``."""
    return following.weight.reshape(len(following.weight), count, -1)


def _keep_outputs(layer: nn.Linear | nn.Conv2d, keep: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[keep], layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[keep], layer.bias.requires_grad)
    name = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    setattr(layer, name, int(keep.sum()))


def _keep_inputs(layer: nn.Linear | nn.Conv2d, keep: Tensor) -> None:
    kept = _by_input(layer, len(keep))[:, keep]
    if isinstance(layer, nn.Linear):
        layer.weight = nn.Parameter(kept.flatten(1), layer.weight.requires_grad)
        layer.in_features = layer.weight.shape[1]
    else:
        shape = (len(kept), int(keep.sum()), *layer.kernel_size)
        layer.weight = nn.Parameter(kept.reshape(shape), layer.weight.requires_grad)
        layer.in_channels = int(keep.sum())


def _keep_features(norm: nn.BatchNorm1d | nn.BatchNorm2d, keep: Tensor) -> None:
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        if value is not None:
            setattr(norm, name, nn.Parameter(value[keep], value.requires_grad))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[keep])
    norm.num_features = int(keep.sum())


def _laid_out(chain: nn.Sequential) -> list[nn.Module]:
    if not isinstance(chain, nn.Sequential) or type(chain).forward is not nn.Sequential.forward:
        raise InputError(
            f"an nn.Sequential is shrunk, got {type(chain).__name__}, which may do more: pass the part that is a chain"
        )
    return [each for layer in chain for each in (_laid_out(layer) if isinstance(layer, nn.Sequential) else [layer])]
