"""Coupled: outputs that several layers of a network share, and that are taken out of all of them at once.

Which layers share them is found by torch-pruning's dependency graph (Fang et al., "DepGraph", arXiv 2301.12900); which
of them have no part to play, and what becomes of their constants, is decided here.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsity.errors import InputError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HEADS = ("heads", "num_heads")  # what modules call the number of their heads

log = logging.getLogger(__name__)


class Coupled:
    """A network that gets smaller in place, while its outputs for some inputs, and for others like them, stay.

    Raises `InputError` where torch-pruning is missing or cannot follow the network.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        try:
            import torch_pruning
        except ImportError as error:
            raise InputError(
                "networks that are no plain chain are shrunk by torch-pruning, which is missing: "
                'pip install "lightning-sparsity[structured]"'
            ) from error
        self.pruning, self.model, self.inputs = torch_pruning, model, tuple(inputs)
        self.tried = [self.inputs, *(_like(self.inputs, seed) for seed in (1, 2))]
        try:
            self.before = [self._outputs(each) for each in self.tried]
        except Exception as error:
            raise InputError(f"{type(model).__name__} does not run on these inputs: {error}") from error
        self.graph: Any = None
        self.kept: set[str] = set()  # layers without some of whose outputs the network is another
        self.constants: dict[str, int] = {}  # how many outputs of a layer stay only for their constants

    def thin(self) -> None:
        """Takes out heads and outputs until there is none left to take."""
        for name, module in self.model.named_modules():
            self._try(name, partial(_drop_heads, module))
        while self._pass():
            pass
        if self.constants:
            log.info("outputs without weights stay where no bias can take over their constant: %s", self.constants)
        if self.kept:
            log.info("outputs without weights stay where the network is another without them: %s", sorted(self.kept))

    def _pass(self) -> bool:
        """Tries each group of layers that share outputs, the last first; whether any got smaller."""
        changed, seen = False, set()
        self.constants.clear()
        for name, layer in reversed(list(self.model.named_modules())):
            self.graph = self.graph or self._traced()
            if type(layer) not in LAYERS or layer in seen or name in self.kept or layer not in self.graph.module2node:
                continue
            group = self._group(layer, range(len(layer.weight)))
            seen |= {each for item, each, out in self._items(group) if out and len(item.idxs) == len(each.weight)}
            if self._is_known(group):
                changed |= self._thin(name, layer, group)
        return changed

    def _thin(self, name: str, layer: Any, group: Any) -> bool:
        """Takes out what can be of a group of layers that share outputs; whether there was any."""
        empty, unread, read = self._empty(group, len(layer.weight))
        if not bool((read & (empty | unread)).any()):
            return False
        readers = [(each, *_indices(item)) for item, each, out in self._items(group) if not out]
        seen = _Inputs(self.model, [each for each, _, _ in readers], self.tried, self._run)
        folds = torch.ones_like(empty)
        for each, places, roots in readers:
            folds.index_fill_(0, roots[~(_is_zero(each, 1) | seen.folds(each).cpu())[places]], False)
        if left := int((read & empty & ~unread & ~folds).sum()):
            self.constants[name] = left
        gone = (read & (unread | (empty & folds))).nonzero().flatten().tolist()
        gone = gone[1:] if len(gone) == len(layer.weight) else gone  # one has to stay
        return bool(gone) and self._try(name, partial(self._take, self._group(layer, gone), seen))

    def _take(self, group: Any, seen: "_Inputs") -> bool:
        if not self.graph.check_pruning_group(group):
            return False
        for item, each, out in self._items(group):
            if not out:
                seen.fold(each, _indices(item)[0])
        group.prune()
        return True

    def _try(self, name: str, change: Callable[[], bool]) -> bool:
        """Makes a change, and takes it back where the network does not compute the same any more."""
        state = _state(self.model)
        try:
            with torch.no_grad():
                if not change():
                    return False
            same = all(map(_alike, (self._outputs(each) for each in self.tried), self.before))
        except Exception as error:  # of any kind: what a network makes of other shapes is not known
            log.debug("without some outputs of '%s' the network does not run: %s", name, error)
            same = False
        if not same:
            _restore(state)
            self.kept.add(name)
            self.graph = None
        return same

    def _empty(self, group: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which outputs no layer makes of its inputs, which no layer looks at, and which are an input of any."""
        empty, unread = torch.ones(2, count, dtype=torch.bool).unbind()
        read = torch.zeros(count, dtype=torch.bool)
        for item, each, out in self._items(group):
            places, roots = _indices(item)
            zero = _is_zero(each, 0 if out else 1)[places]
            (empty if out else unread).index_fill_(0, roots[~zero], False)
            if not out:
                read.index_fill_(0, roots, True)
        return empty, unread, read

    def _is_known(self, group: Any) -> bool:
        """Whether all that shares these outputs keeps them apart, and has its weights for itself."""
        owners: dict[int, int] = {}
        for module in self.model.modules():
            for weight in module.parameters(recurse=False):
                owners[id(weight)] = owners.get(id(weight), 0) + 1
        for item in group:
            each = item.dep.target.module
            if isinstance(each, nn.Parameter | self.pruning.ops._UnbindOp):
                return False
            if type(each) in LAYERS:
                found = each._parameters.get("weight")
                if found is None or owners[id(found)] > 1 or getattr(each, "groups", 1) != 1:
                    return False
                axis = 0 if self.graph.is_out_channel_pruning_fn(item.dep.handler) else 1
                if max(item.idxs, default=0) >= found.shape[axis]:  # a padding has made more of fewer
                    return False
            elif type(each) not in NORMS and list(each.parameters(recurse=False)):
                return False
        return True

    def _items(self, group: Any) -> list[tuple[Any, Any, bool]]:
        """The parts that Linear layers and convolutions have in a group, and whether it is by their outputs."""
        return [
            (item, item.dep.target.module, self.graph.is_out_channel_pruning_fn(item.dep.handler))
            for item in group if type(item.dep.target.module) in LAYERS
        ]  # fmt: skip

    def _group(self, layer: nn.Module, places: Sequence[int]) -> Any:
        function = self.graph.get_pruner_of_module(layer).prune_out_channels
        return self.graph.get_pruning_group(layer, function, list(places))

    def _traced(self) -> Any:
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # it follows gradients
        try:
            with torch.enable_grad():
                graph = self.pruning.DependencyGraph().build_dependency(
                    self.model, self.inputs, lambda model, inputs: _tensors(model(*inputs)), verbose=False
                )
            if not any(type(layer) in LAYERS for layer in graph.module2node):
                raise ValueError("no gradient leads from its outputs to a linear layer or a convolution")
            return graph
        except Exception as error:  # of any kind: what it meets in a network is not known
            raise InputError(
                f"torch-pruning cannot follow {type(self.model).__name__} ({type(error).__name__}: {error}): shrink "
                "those of its parts that it can, or leave it masked"
            ) from error

    @torch.no_grad()
    def _run(self, inputs: Sequence[Any]) -> Any:
        return self.model(*inputs)

    def _outputs(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [each.clone() for each in _tensors(self._run(inputs))]


class _Inputs:
    """What reaches some layers, and where it is the same at all places of all samples."""

    def __init__(self, model: nn.Module, layers: list[Any], tried: list[Any], run: Callable[[Any], Any]) -> None:
        self.least: dict[nn.Module, Tensor] = {}
        self.most: dict[nn.Module, Tensor] = {}
        handles = [layer.register_forward_pre_hook(self._look, with_kwargs=True) for layer in layers]
        try:
            for inputs in tried:
                run(inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = given[0] if given else named["input"]
        axis = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
        rows = x.movedim(axis, 0).flatten(1)
        least, most = rows.amin(1), rows.amax(1)
        if layer in self.least:
            least, most = torch.minimum(least, self.least[layer]), torch.maximum(most, self.most[layer])
        self.least[layer], self.most[layer] = least, most

    def folds(self, layer: Any) -> Tensor:
        """Which inputs of a layer are a constant that its bias can take over: ``[in]``."""
        if layer not in self.least:
            return torch.zeros(layer.weight.shape[1], dtype=torch.bool, device=layer.weight.device)
        least, most = self.least[layer], self.most[layer]
        same = most - least <= 16 * torch.finfo(most.dtype).eps * torch.maximum(most.abs(), least.abs())
        return same & (most == 0) if _pads(layer) else same  # a constant ends at a border of zeros

    def fold(self, layer: Any, places: Tensor) -> None:
        """Adds what these inputs are to a layer's bias."""
        if layer not in self.most:
            return
        value = torch.where(self.folds(layer), self.most[layer], 0)[places]
        share = layer.weight[:, places].reshape(len(layer.weight), len(places), -1).sum(2) @ value
        if bool(share.any()):
            layer.bias = nn.Parameter(share if layer.bias is None else layer.bias + share)


def _drop_heads(module: Any) -> bool:
    """Takes heads out of attention by one `qkv` and one `proj` layer; whether there were any to take.

    Those that `proj` does not look at, and those whose values are constant: attention sums them up to that constant.
    """
    name = next((each for each in HEADS if isinstance(getattr(module, each, None), int)), "")
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    if not name or type(qkv) is not nn.Linear or type(proj) is not nn.Linear:
        return False
    heads, width = getattr(module, name), proj.in_features
    if heads < 2 or width % heads or qkv.out_features != 3 * width:
        return False
    unread = ~proj.weight.view(len(proj.weight), heads, -1).any(2).any(0)
    empty = ~qkv.weight.view(3, heads, -1)[2].any(1)
    keep = ~(unread | empty)
    if not keep.any():
        keep[0] = True
    if keep.all():
        return False
    wide = keep.repeat_interleave(width // heads)
    if qkv.bias is not None:
        share = torch.where(wide, 0, qkv.bias.view(3, width)[2]) @ proj.weight.t()
        proj.bias = nn.Parameter(share if proj.bias is None else proj.bias + share)
        qkv.bias = nn.Parameter(qkv.bias[wide.repeat(3)])
    qkv.weight, proj.weight = nn.Parameter(qkv.weight[wide.repeat(3)]), nn.Parameter(proj.weight[:, wide])
    qkv.out_features, proj.in_features = len(qkv.weight), proj.weight.shape[1]
    setattr(module, name, int(keep.sum()))
    return True


def _is_zero(layer: Any, axis: int) -> Tensor:
    """Which outputs (axis 0) or inputs (axis 1) of a layer have no weight."""
    found: Tensor = ~layer.weight.movedim(axis, 0).flatten(1).any(1)
    return found.cpu()


def _pads(layer: Any) -> bool:
    padding = getattr(layer, "padding", 0)
    some = padding == "same" if isinstance(padding, str) else any(padding) if isinstance(padding, tuple) else padding
    return bool(some) and layer.padding_mode == "zeros"


def _indices(item: Any) -> tuple[Tensor, Tensor]:
    """The places in a layer, and of which outputs of the first layer they are."""
    return torch.tensor(item.idxs, dtype=torch.long), torch.tensor(item.root_idxs, dtype=torch.long)


def _tensors(found: Any) -> list[Tensor]:
    return [each for each in tree_leaves(found) if isinstance(each, Tensor)]


def _like(inputs: Sequence[Any], seed: int) -> Any:
    """Other inputs of the same shapes: random numbers as large, whole numbers in another order."""
    generator = torch.Generator().manual_seed(seed)

    def other(given: Any) -> Any:
        if not isinstance(given, Tensor) or given.dtype == torch.bool:
            return given
        if given.is_floating_point():
            noise = torch.randn(given.shape, generator=generator, dtype=torch.float64)
            return (noise * given.double().abs().mean().cpu().clamp_min(1e-3) * 1.25).to(given)
        return given.flatten()[torch.randperm(given.numel(), generator=generator).to(given.device)].view_as(given)

    return tree_map(other, tuple(inputs))


def _alike(found: list[Tensor], before: list[Tensor]) -> bool:
    """Whether outputs are the same up to rounding."""
    return len(found) == len(before) and all(map(_near, found, before))


def _near(found: Tensor, before: Tensor) -> bool:
    if found.shape != before.shape or found.dtype != before.dtype or not before.is_floating_point():
        return bool(torch.equal(found, before))
    largest = before[before.isfinite()].abs().max() if bool(before.isfinite().any()) else 0.0
    least = torch.finfo(before.dtype).eps ** 0.5 * float(largest)
    return torch.allclose(found, before, rtol=0, atol=least, equal_nan=True)


def _state(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """All attributes of all modules; tensors are not copied, as changes put others in their places."""
    return [(each, {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(each).items()})
            for each in model.modules()]  # fmt: skip


def _restore(state: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, attributes in state:
        vars(module).clear()
        vars(module).update(attributes)
