"""Constant masks: what is already pruned stays pruned."""

from pathlib import Path

from sparsity import masks
from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets


class Kept(Sparsifier):
    """Keeps the zeros of a pruned model, or the masks of a file, for all of training.

    `sparsity` is what the masks are expected to have, None where anything above 0 will do. Raises `InputError`
    where the model has no zeros to keep, the file is for another model, or the sparsity is not the expected one.
    """

    def __init__(self, file: str | Path | None = None, sparsity: float | None = None, targets: Targets | None = None):
        super().__init__(sparsity or 0.0, targets=targets)
        self.file, self.expected = file, sparsity

    def first_masks(self) -> Masks:
        """The masks of the file, or else of the exact zeros of the weights."""
        weights = self.weights()
        found = masks.load(self.file) if self.file else masks.from_zeros(weights)
        masks.check(found, weights, f"the mask file '{self.file}'")
        achieved = 1 - masks.density(found)
        if achieved == 0:
            raise InputError(
                f"{self.file or 'the model'} has no pruned weights, so there is nothing to keep: "
                "load the weights of a pruned checkpoint first, or give a mask file"
            )
        if self.expected is not None and abs(achieved - self.expected) > 0.005:
            raise InputError(f"expected masks of sparsity {self.expected}, found {achieved:.4f}: leave sparsity out")
        self.sparsity = achieved
        return {name: found[name].to(weight.device) for name, weight in weights.items()}

    def new_masks(self, density: float, step: int) -> Masks:
        """The masks as they are."""
        return self.masks

    def check_budget(self) -> None:
        """Nothing is asked for that the masks do not already have."""
