"""Lightning's ModelPruning, by the arguments that it takes and with the masks of this project."""

from collections.abc import Sequence
from typing import Any

from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from torch.nn.parameter import Parameter
from torch.nn.utils import prune

from sparsity.distributions import Global, Uniform
from sparsity.errors import InputError
from sparsity.schedules import Once
from sparsity.scores import Magnitude, Random
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets, clean

from .sparsify import Sparsify

FUNCTIONS = {
    "l1_unstructured": Magnitude, "random_unstructured": Random, "ln_structured": Magnitude,
    "random_structured": Random,
}  # fmt: skip
DIFFERENCES = (
    "amount is of all targets, once, when the first epoch has ended; Lightning's compounds at every epoch",
    "pruned weights and their optimizer state stay zero, and a resumed run has its masks",
    "the keys of the state dict never change, so there is nothing to make permanent",
)
METHODS: dict[object, str] = {prune.L1Unstructured: "l1_unstructured", prune.RandomUnstructured: "random_unstructured"}


class Given(Targets):
    """Just these parameters, as pairs of a module and the name of its parameter."""

    def __init__(self, parameters: Sequence[tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.parameters = list(parameters)

    def select(self, model: nn.Module) -> dict[str, Parameter]:
        wanted = [module.get_parameter(name) for module, name in self.parameters]
        found = {clean(n): p for n, p in model.named_parameters() if any(p is each for each in wanted)}
        if len(found) != len({id(each) for each in wanted}):
            raise InputError(
                f"{len(wanted)} parameters_to_prune were given, {len(found)} of them are the model's: give the modules "
                "of the model that is trained"
            )
        return found


class ModelPruning(Sparsify):
    """Takes what Lightning's `ModelPruning` takes; says what is different, and refuses what has no counterpart.

    Once, when the first epoch has ended, `amount` of all targets becomes zero, and stays so. In new code write
    `OneShot(amount, at="1ep")`, or take a method that prunes gradually, such as `GMP` or `LAMP`.

    Args:
        pruning_fn: "l1_unstructured", "random_unstructured", torch's classes of these, or "ln_structured" and
            "random_structured" of whole outputs (pruning_dim=0, and pruning_norm=1 for the first).
        parameters_to_prune: pairs of a module and the name of its parameter; all Linear and convolution weights if
            none are given.
        parameter_names: None, or names with "weight" among them.
        use_global_unstructured: whether the weights of all layers are compared, or each layer keeps as much.
        amount: fraction of zeros over all targets, in (0, 1).
        apply_pruning: True.
        make_pruning_permanent: either, there is nothing to make permanent.
        use_lottery_ticket_hypothesis: False, or not given, which is the same: nothing is rewound.
        resample_parameters: False.
        pruning_dim: 0 for whole outputs.
        pruning_norm: 1 for "ln_structured".
        verbose: any, `SparsityReport` prints every layer.
        prune_on_train_epoch_end: either, pruning comes with the first step of the second epoch.
    """

    def __init__(
        self,
        pruning_fn: Any,
        parameters_to_prune: Sequence[tuple[nn.Module, str]] = (),
        parameter_names: Sequence[str] | None = None,
        use_global_unstructured: bool = True,
        amount: Any = 0.5,
        apply_pruning: Any = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: Any = None,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        function = METHODS.get(pruning_fn, pruning_fn) if isinstance(pruning_fn, type) else str(pruning_fn).lower()
        if function not in FUNCTIONS:
            raise InputError(
                f"pruning_fn={pruning_fn!r} is none of {', '.join(FUNCTIONS)}: a criterion of your own is a `Score` "
                "here (sparsity/scores.py), for OneShot(score=...)"
            )
        _refuse_functions_of_the_epoch(amount=amount, apply_pruning=apply_pruning)
        if not isinstance(amount, float) or not 0 < amount < 1:
            raise InputError(f"amount is a fraction of all targets here, a float in (0, 1), got {amount!r}")
        if use_lottery_ticket_hypothesis or resample_parameters:
            raise InputError(
                f"use_lottery_ticket_hypothesis and resample_parameters: IterativeMagnitude(sparsity={amount}) trains, "
                "prunes and rewinds in rounds, and never resamples"
            )
        if not apply_pruning:
            raise InputError("apply_pruning=False prunes nothing: leave the callback out")
        if "weight" not in (parameter_names or ["weight"]):
            raise InputError(f"parameter_names={parameter_names}: name biases one by one in parameters_to_prune")
        structured = function.endswith("_structured")
        if structured:
            _check_structured(function, use_global_unstructured, pruning_dim, pruning_norm)
        sparsifier = Sparsifier(
            amount, FUNCTIONS[function](), Global() if use_global_unstructured else Uniform(),
            "channel" if structured else "unstructured", Once("1ep"),
            Given(parameters_to_prune) if parameters_to_prune else None,
        )  # fmt: skip
        super().__init__(sparsifier)
        note = [*DIFFERENCES]
        if not parameters_to_prune:
            note.append("only weights of linear layers and convolutions are pruned: no biases, norms or embeddings")
        if use_lottery_ticket_hypothesis is None:
            note.append("nothing is rewound, which Lightning's does unless told not to: IterativeMagnitude does")
        rank_zero_info("\n- ".join(["ModelPruning as in Lightning, with these differences:", *note]))


def _refuse_functions_of_the_epoch(**given: Any) -> None:
    for name, value in given.items():
        if callable(value):
            raise InputError(
                f"{name} as a function of the epoch is a schedule here: "
                'GMP(sparsity, schedule=Cubic(start="1ep", end="5ep", every="1ep")), or Linear, or Iterative'
            )


def _check_structured(function: str, is_global: bool, dim: int | None, norm: int | None) -> None:
    if is_global:
        raise InputError(f'pruning_fn="{function}" wants use_global_unstructured=False, as in Lightning')
    if dim != 0:
        raise InputError(f"whole outputs are pruned (pruning_dim=0), got pruning_dim={dim}")
    if function == "ln_structured" and norm != 1:
        raise InputError(f"outputs are compared by the sum of their magnitudes (pruning_norm=1), got {norm}")
