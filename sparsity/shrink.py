"""Shrink: neurons and channels that pruning has left without a part to play are taken out."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.coupled import LAYERS as COUPLED_LAYERS
from sparsity.coupled import Coupled
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


# What layers say of the shapes of their tensors.
SIZES = (
    "in_features", "out_features", "in_channels", "out_channels", "num_features", "groups", "num_embeddings",
    "embedding_dim", "heads", "num_heads",
)  # fmt: skip

Manifest = dict[str, dict[str, Any]]


def shrink(model: nn.Module, *inputs: Any) -> nn.Module:
    """A smaller dense copy of a model that computes the same, when it does not train.

    What is taken out are outputs that the next layers do not look at, and outputs that do not depend on the input,
    whose constant goes into the next layers' biases. Outputs whose constant does not fit there stay, as before a
    padding of zeros, and so do the model's own inputs and outputs. Dense products get as much faster as they get
    smaller, on any device.

    A chain (`nn.Sequential`) of linear layers and convolutions with elementwise activations, batch norms, dropout,
    pools and a `Flatten` between them needs nothing else. Any other model needs one batch of `inputs`, as its forward
    pass takes them, and the torch-pruning package (`pip install "lightning-sparsity[structured]"`), which finds out
    what its branches share. There attention heads go, too, where a module holds their number as `heads` or
    `num_heads` and its layers as `qkv` and `proj`. Each step is compared with the model before, on these inputs and two
    batches of random ones, and taken back if the outputs differ by more than rounding.

    Raises `InputError` for a model that cannot be followed.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, COUPLED_LAYERS) and "weight" not in layer._parameters:
            raise InputError(f"the weight of '{name}' is no parameter of its own: make masks of torch.nn.utils.prune, "
                             "and parametrizations, permanent")  # fmt: skip
    try:
        return _shrunk_chain(model)
    except InputError:
        if not inputs:
            raise
    found = copy.deepcopy(model).eval()
    Coupled(found, inputs).thin()
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in found.named_modules():
        module.training = modes[name]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    known = dict(model.named_parameters())
    for name, parameter in found.named_parameters():  # a bias that was not there before is trained
        parameter.requires_grad_(name in trained or name not in known)
    return found


def manifest(model: nn.Module) -> Manifest:
    """The shapes of a model's tensors and what its layers say of them, by module: for JSON, and `shrunk_like`."""
    found: Manifest = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        entry: dict[str, Any] = {k: list(v.shape) for k, v in tensors.items() if v is not None}
        entry |= {size: getattr(module, size) for size in SIZES if isinstance(getattr(module, size, None), int)}
        if entry:
            found[name] = entry
    return found


def shrunk_like(model: nn.Module, manifest: Manifest) -> nn.Module:
    """A copy of a dense model in the shapes of a manifest, so that the `state_dict` of the smaller model fits.

    Its tensors that are not of the dense model's shape are zeros. Raises `InputError` for a manifest of another model:
    no tensor may be larger than the dense model's, none may be missing, and only biases may be new.
    """
    if not isinstance(manifest, dict) or not all(isinstance(each, dict) for each in manifest.values()):
        raise InputError(f"a manifest is a dict of dicts, got {type(manifest).__name__}: see sparsity.shrink.manifest")
    found = copy.deepcopy(model)
    modules = dict(found.named_modules())
    if unknown := sorted(manifest.keys() - modules.keys()):
        raise InputError(f"the manifest has {unknown[:3]}, which {type(model).__name__} does not: it is of another one")
    for name, module in modules.items():
        entry = manifest.get(name, {})
        for key, tensor in {**module._parameters, **module._buffers}.items():
            place = f"{name}.{key}" if name else key
            shape = entry.get(key)
            if shape is None and tensor is None:
                continue
            most = _largest(module, key, tensor)
            if most is None or not _fits(shape, most):
                raise InputError(f"'{place}' has the shape {shape} in the manifest, in the model {most}: "
                                 "give the dense model that was shrunk")  # fmt: skip
            if shape and (tensor is None or list(tensor.shape) != shape):
                _reshape(module, key, shape)
        for size in SIZES:
            old, new = getattr(module, size, None), entry.get(size)
            if type(old) is int and old != new:
                if type(new) is not int or not 0 < new < old:
                    raise InputError(f"'{name}' has {size}={old} in the model, the manifest says {new!r}")
                setattr(module, size, new)
        _check_sizes(name, module)
    return found


def _check_sizes(name: str, module: nn.Module) -> None:
    """Raises `InputError` where a layer's weight is not of the sizes that it says."""
    weight = module._parameters.get("weight")
    if weight is None or not isinstance(module, COUPLED_LAYERS):
        return
    if isinstance(module, nn.Linear):
        said = [module.out_features, module.in_features]
    else:
        said = [module.out_channels, module.in_channels // module.groups]
    if list(weight.shape[:2]) != said:
        raise InputError(f"'{name}' says it has {said} outputs and inputs, its weight has {list(weight.shape[:2])}")


def _largest(module: nn.Module, key: str, tensor: Tensor | None) -> list[int] | None:
    """The shape that a tensor of a shrunk model may have at most; None where it may not be there."""
    if tensor is not None:
        return list(tensor.shape)
    return [len(module.get_parameter("weight"))] if key == "bias" and isinstance(module, COUPLED_LAYERS) else None


def _fits(shape: Any, most: list[int]) -> bool:
    sizes = shape if isinstance(shape, list) and len(shape) == len(most) else None
    return sizes is not None and all(type(a) is int and min(1, b) <= a <= b for a, b in zip(sizes, most, strict=True))


def _reshape(module: nn.Module, key: str, shape: list[int]) -> None:
    """Zeros of another shape in a tensor's place."""
    old = getattr(module, key)
    like = module.get_parameter("weight") if old is None else old
    zeros = like.detach().new_zeros(shape)
    setattr(module, key, zeros if key in module._buffers else nn.Parameter(zeros, like.requires_grad))


def _shrunk_chain(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    layers = _laid_out(found)
    for layer in layers:
        if type(layer) not in (*LAYERS, *ELEMENTWISE, *NORMS, *DROPOUTS, *POOLS, nn.Flatten):
            raise InputError(f"a chain of known layers is shrunk by itself, {type(layer).__name__} is none of them: "
                             "pass a batch of inputs, too")  # fmt: skip
        if isinstance(layer, NORMS) and layer.running_mean is None:
            raise InputError("batch norms without running statistics have no constants: they are not shrunk")
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            raise InputError("convolutions with groups, or padded by anything but zeros, are not shrunk")
    places = [place for place, layer in enumerate(layers) if isinstance(layer, LAYERS)]
    if len({id(layers[place].weight) for place in places}) < len(places):
        raise InputError("layers that share their weight are not shrunk")
    for first, second in pairwise(places):
        _check(layers[first], layers[first + 1 : second], layers[second])  # type: ignore[arg-type]  # both are
    changed = True
    while changed:  # what goes in a later layer may leave more without use in an earlier one
        changed = False
        for first, second in reversed(list(pairwise(places))):
            changed |= _thin(layers[first], layers[first + 1 : second], layers[second])  # type: ignore[arg-type]  # both are
    return found


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


def _laid_out(chain: nn.Module) -> list[nn.Module]:
    if not isinstance(chain, nn.Sequential) or type(chain).forward is not nn.Sequential.forward:
        raise InputError(
            f"an nn.Sequential is shrunk by itself, got {type(chain).__name__}, which may do more: "
            "pass a batch of inputs, too"
        )
    return [each for layer in chain for each in (_laid_out(layer) if isinstance(layer, nn.Sequential) else [layer])]
