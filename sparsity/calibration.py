"""Calibration: what the layers of a network are given as inputs, over some batches of data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.errors import InputError
from sparsity.targets import block

Run = Callable[[nn.Module, Any], Any]


class Calibration:
    """How a trained network is pruned at once, beside its score.

    Args:
        batches: how many batches of the training data are looked at.
        permute: whether hidden units of MLPs are reordered first, so that N:M keeps more; see `permutation`.
        norms: whether the running statistics of batch norms are computed anew afterwards.
    """

    def __init__(self, batches: int = 32, permute: bool = False, norms: bool = False) -> None:
        if batches < 1:
            raise InputError(f"batches must be at least 1, got {batches}")
        self.batches, self.permute, self.norms = batches, permute, norms


class Inputs:
    """Second moments of a layer's inputs, per group of a convolution: sums over tokens or places.

    A column of the layer's matrix [out, kernel * in] has one input; inputs run fastest, so that N:M groups are
    neighbours. With `products`, [groups, columns, columns]; otherwise their diagonal, [groups, columns].
    """

    def __init__(self, products: bool) -> None:
        self.products, self.tokens = products, 0
        self.sums: Tensor | None = None

    def add(self, columns: Tensor) -> None:
        """Takes in [groups, tokens, columns]."""
        columns = columns.float()
        sums = columns.mT @ columns if self.products else columns.square().sum(1)
        self.sums = sums if self.sums is None else self.sums.add_(sums)
        self.tokens += columns.shape[1]

    def norms(self) -> Tensor:
        """The root of the mean square of each column, [groups, columns]."""
        assert self.sums is not None
        squares = self.sums.diagonal(dim1=1, dim2=2) if self.products else self.sums
        return (squares / self.tokens).sqrt()

    def reduce(self, name: str) -> None:
        """Adds up what all processes have seen; raises `InputError` where that is nothing, or not finite."""
        assert self.sums is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            tokens = torch.tensor(self.tokens, device=self.sums.device)
            for each in (self.sums, tokens):
                torch.distributed.all_reduce(each)
            self.tokens = int(tokens)
        if not bool(torch.isfinite(self.sums).all()):
            raise InputError(
                f"the inputs of '{name}' on the calibration data are NaN or infinite: check the data and the "
                "checkpoint; nothing has been pruned in this layer"
            )


class _Enough(Exception):
    """All that was to be seen of a forward pass has been seen."""


def run(model: nn.Module, batch: Any) -> Any:
    """One forward pass of a batch: `model(**batch)`, the first of a pair or a list, or the batch itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs of a layer as [groups, tokens, columns]; raises `InputError` for a kind of layer that is not known."""
    names = [base.__name__ for base in type(module).__mro__]
    if "Linear" in names or "Conv1D" in names:
        return inputs.reshape(1, -1, inputs.shape[-1])
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        flat = isinstance(module, nn.Conv1d)
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode)
            padding: Any = 0
        else:
            padding = (0, *module.padding) if flat else module.padding
        one = (1,) if flat else ()
        unfolded = F.unfold(
            inputs.unsqueeze(2) if flat else inputs, (*one, *module.kernel_size), (*one, *module.dilation), padding,
            (*one, *module.stride),
        )  # fmt: skip
        kernel = unfolded.shape[1] // module.in_channels
        return rearrange(unfolded, "b (g c k) l -> g (b l) (k c)", g=module.groups, k=kernel)
    raise InputError(
        f"{type(module).__name__} has no calibrated score: Linear, Conv1d, Conv2d and Conv1D have. Leave the layer out "
        "with targets.exclude, or score by magnitude"
    )


def stages(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Run = run) -> list[list[str]]:
    """The layers by block, in the order in which a forward pass calls them; `InputError` for one never called."""
    called: list[str] = []
    with _hooks(layers, lambda name, _: called.append(name)), torch.no_grad():
        forward(model, batch)
    unused = [name for name in layers if name not in called]
    if unused:
        raise InputError(
            f"the forward pass never calls the layers of {unused[:3]}, so that nothing is known of their inputs: leave "
            f"them out with targets.exclude={unused[:3]}, or score by magnitude"
        )
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(called):
        found.setdefault(block(name), []).append(name)
    return list(found.values())


def collect(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], products: bool, forward: Run = run
) -> dict[str, Inputs]:
    """What these layers are given, by name. A forward pass ends where it has called all of them."""
    found = {name: Inputs(products) for name in layers}
    left: dict[str, int] = {}
    calls = dict.fromkeys(layers, 0)

    def see(name: str, inputs: Tensor) -> None:
        found[name].add(columns(layers[name], inputs))
        if not left:  # the first pass goes to the end, and counts
            calls[name] += 1
            return
        left[name] -= 1
        if not any(left.values()):
            raise _Enough

    seen = 0
    with _hooks(layers, see), torch.no_grad():
        for batch in batches:
            left = dict(calls) if seen else {}
            seen += 1
            with suppress(_Enough):
                forward(model, batch)
    if not seen:
        raise InputError("the calibration data is empty: give at least one batch")
    for name, inputs in found.items():
        inputs.reduce(name)
    return found


@torch.no_grad()
def recompute_norms(model: nn.Module, batches: Iterable[Any], forward: Run = run) -> int:
    """Computes the running statistics of all batch norms anew, as means over the batches; returns how many norms."""
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    for batch in batches if norms else ():
        forward(model, batch)
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.train(training)
    return len(norms)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, not compiled; afterwards each module is in the mode it was in."""
    before = {module: module.training for module in model.modules()}
    compiled = any(getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in before)
    model.eval()
    try:
        # Hooks do not reach into what has been compiled.
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
