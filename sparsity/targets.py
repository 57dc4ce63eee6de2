"""Targets: which parameters of a model may be pruned."""

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import Parameter, UninitializedParameter
from torch.optim import Optimizer

from sparsity.errors import InputError

# The modules whose weights are matrices or filters. Names, not classes, so that `transformers`' Conv1D is one too.
PRUNABLE = (
    "Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "Conv1D", "MultiheadAttention", "RNNBase", "RNNCellBase",
)  # fmt: skip

# Of these the first axis is the input's.
TRANSPOSED = ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


class Targets:
    """Selects parameters by name and by the type of the module that owns them.

    A parameter is a target if its name matches `include` and not `exclude`, it has two axes or more, and the class
    of its module (or a base class of it) is among `types`. Norms, biases, embeddings and loose parameters such as
    position embeddings are therefore left alone. An `include` entry without a wildcard that spells a parameter's
    full name takes that parameter whatever it is; adding "Embedding" to `types` takes all embeddings.

    Tied parameters are one target under their first name; every one of their names has to pass, so that a head tied
    to an embedding is left alone unless it is named. Frozen parameters count: what is a target does not depend on
    what is being trained. The prefix that `torch.compile` gives names is ignored.
    """

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        types: list[str] | None = None,
        multiple: int = 1,
    ) -> None:
        if multiple < 1:
            raise InputError(f"multiple must be at least 1, got {multiple}")
        self.multiple = multiple
        self.include = ["*"] if include is None else list(include)
        self.exclude = [] if exclude is None else list(exclude)
        self.types = list(PRUNABLE) if types is None else list(types)

    def select(self, model: nn.Module) -> dict[str, Parameter]:
        """The target parameters by name, in the order of the model; raises `InputError` where there are none."""
        groups = _tied_groups(model)
        names = [name for group in groups for name, _, _ in group]
        self._check_globs(names)
        selected = {group[0][0]: group[0][2] for group in groups if self._takes(group)}
        if not selected:
            raise InputError(
                f"no parameter to prune: include={self.include}, exclude={self.exclude} and types={self.types} leave "
                f"none of {len(names)} parameters; name one in `include`, for example '{names[0] if names else '...'}'"
            )
        for name, weight in selected.items():
            if isinstance(weight, UninitializedParameter):
                raise InputError(f"'{name}' has no shape yet: run one forward pass through the lazy module first")
        return selected

    def _takes(self, group: "list[tuple[str, nn.Module, Parameter]]") -> bool:
        names = [name for name, _, _ in group]
        if any(_matches(name, self.exclude) for name in names) or not self._divides(group[0]):
            return False
        if any(name in self.include for name in names):
            return True
        return any(_matches(name, self.include) for name in names) and all(
            _is_matrix(name, weight) and self._has_type(module) for name, module, weight in group
        )

    def _divides(self, member: "tuple[str, nn.Module, Parameter]") -> bool:
        _, module, weight = member
        if self.multiple == 1 or isinstance(weight, UninitializedParameter) or weight.ndim < 2:
            return True
        return weight.shape[0 if is_transposed(module) else 1] % self.multiple == 0

    def _has_type(self, module: nn.Module) -> bool:
        return any(base.__name__ in self.types for base in type(module).__mro__)

    def _check_globs(self, names: list[str]) -> None:
        for glob in [*self.include, *self.exclude]:
            if not any(fnmatchcase(name, glob) for name in names):
                near = difflib.get_close_matches(glob, names, n=3, cutoff=0.0)
                raise InputError(f"'{glob}' matches no parameter of the model; the nearest names are {near}")


def is_transposed(module: nn.Module) -> bool:
    """Whether the first axis of the module's weight is the input's: `transformers`' Conv1D, transposed convolutions."""
    return any(base.__name__ in TRANSPOSED for base in type(module).__mro__)


def block(name: str) -> str:
    """What a parameter belongs to: its name up to the first number ("net.blocks.0"), or its layer's."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.rpartition(".")[0]


def refuse_shared_memory(model: nn.Module, targets: Iterable[str], optimizers: Iterable[Optimizer]) -> None:
    """Raises `InputError` where optimizers step a target and another parameter in the same piece of memory.

    Each would have a gradient and a state of its own, and a step of the second would undo the zeros of the first.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    stepped = {id(each) for group in groups for each in group["params"] if each.requires_grad}
    wanted = set(targets)
    for tied in _tied_groups(model):
        found = {id(weight): name for name, _, weight in reversed(tied) if id(weight) in stepped}
        if tied[0][0] in wanted and len(found) > 1:
            *_, second, first = found.values()
            raise InputError(
                f"'{first}' and '{second}' are two parameters in one piece of memory, and the optimizer steps both: "
                f"make them one (module.{second} = module.{first})"
            )


def clean(name: str) -> str:
    """The name without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "")


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _is_matrix(name: str, weight: Parameter) -> bool:
    # MultiheadAttention's bias_k has three axes and is a bias all the same.
    is_bias = name.rpartition(".")[2].startswith("bias")
    return not is_bias and (isinstance(weight, UninitializedParameter) or weight.ndim >= 2)


def _tied_groups(model: nn.Module) -> list[list[tuple[str, nn.Module, Parameter]]]:
    """Each distinct tensor of the model with all of its (name, owner, parameter)."""
    groups: dict[tuple[object, ...], list[tuple[str, nn.Module, Parameter]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            name = clean(f"{prefix}.{leaf}" if prefix else leaf)
            groups.setdefault(_storage(weight), []).append((name, module, weight))
    return list(groups.values())


def _storage(weight: Parameter) -> tuple[object, ...]:
    # An empty or meta tensor, and one that is spread over processes, has no address, and is tied only to itself.
    if isinstance(weight, UninitializedParameter) or weight.numel() == 0 or weight.is_meta or not weight.data_ptr():
        return (id(weight),)
    return (weight.device, weight.data_ptr(), weight.shape, weight.stride())
