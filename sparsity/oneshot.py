"""One-shot pruning of a trained network by what its layers are given: Wanda, SparseGPT."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from sparsity import masks, shards
from sparsity.calibration import Calibration, Inputs, Run, collect, evaluating, recompute_norms, run, stages
from sparsity.distributions import Distribution, Uniform
from sparsity.errors import InputError
from sparsity.initial import Loss, NetworkScore
from sparsity.masks import Masks
from sparsity.ops import largest, whole_digits
from sparsity.patterns import NM, Pattern, Unstructured
from sparsity.permutation import permute_mlps
from sparsity.schedules import Constant
from sparsity.scores import Magnitude, Score, Scores, magnitude
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets


class Calibrated(Score):
    """A score by the weights of a layer and by its inputs. Methods override `prune`, or only `__call__`."""

    needs_inputs = True
    products = False  # whether all products of two inputs are needed, or only the squares
    pattern = "unstructured"  # what the method compares if nothing else is asked for

    def prune(self, weight: Tensor, inputs: Inputs, pattern: Pattern, count: int) -> tuple[Tensor, Tensor]:
        """The mask that keeps `count` weights of [out, in, ...], and the weights that replace them, in that shape."""
        signal = _as_weight(inputs.norms().repeat_interleave(len(weight) // len(inputs.norms()), 0), weight)
        score = self(weight, signal, torch.Generator())
        return pattern(score, count), weight


class Wanda(Calibrated):
    """|w| times the norm of its input, compared inside each output: Sun et al., "A simple and effective pruning
    approach for large language models" (ICLR 2024, arXiv 2306.11695). The weights stay as they are."""

    pattern = "row"

    def __call__(self, weight: Tensor, signal: Tensor | None, generator: torch.Generator) -> Tensor:
        if signal is None:
            raise InputError("Wanda scores by a layer's inputs: prune with data (OneShot in a Trainer, or `oneshot`)")
        return magnitude(weight.detach()) * signal


class SparseGPT(Calibrated):
    """w^2 over the squared diagonal of the Cholesky factor of the inverse Hessian, and the rest made up for.

    SparseGPT, Frantar & Alistarh (ICML 2023, arXiv 2301.00774, algorithm 1), by columns and in blocks of them: what is
    pruned in a column is compensated by the columns to its right. H is the sum of products of two inputs, its diagonal
    raised by a part of its mean; where that is not enough for a Cholesky factor, ten times as much, and so on, until
    it is. Inputs that are always zero have their weights pruned. Unlike the authors' code the number of kept weights
    is exact: a block keeps its share of the layer's.

    Args:
        update: whether the kept weights make up for the pruned ones.
        damping: what is added to the diagonal of H, as a part of its mean.
        block: columns per block.
    """

    products = True

    def __init__(self, update: bool = True, damping: float = 0.01, block: int = 128) -> None:
        if damping <= 0 or block < 1:
            raise InputError(f"expected {damping=} above 0 and {block=} of at least 1")
        self.update, self.damping, self.block = update, damping, block

    def __call__(self, weight: Tensor, signal: Tensor | None, generator: torch.Generator) -> Tensor:
        raise InputError("SparseGPT prunes by a layer's inputs: prune with data (OneShot in a Trainer, or `oneshot`)")

    def prune(self, weight: Tensor, inputs: Inputs, pattern: Pattern, count: int) -> tuple[Tensor, Tensor]:
        if type(pattern) not in (Unstructured, NM):
            raise InputError(f'SparseGPT prunes "unstructured" or "N:M", got "{pattern.name}"')
        if isinstance(pattern, NM) and count != pattern.least(tuple(weight.shape)):
            raise InputError(
                f"SparseGPT prunes to {pattern.name} exactly, which is sparsity={1 - pattern.n / pattern.m:g}, "
                f"got {1 - count / weight.numel():.4g}"
            )
        assert inputs.sums is not None
        matrix = _matrix(weight.detach()).float()
        parts = matrix.chunk(len(inputs.sums))
        ends = [round(count * (number + 1) / len(parts)) for number in range(len(parts))]
        pruned = [
            self._solve(part, products, pattern, end - start)
            for part, products, start, end in zip(parts, inputs.sums, [0, *ends], ends, strict=False)
        ]
        mask, values = (torch.cat(each) for each in zip(*pruned, strict=True))
        return _as_weight(mask, weight), _as_weight(values, weight).to(weight.dtype)

    def _solve(self, weight: Tensor, products: Tensor, pattern: Pattern, count: int) -> tuple[Tensor, Tensor]:
        weight = weight.clone()
        factor = inverse_factor(products, self.damping).float()
        weight[:, products.diagonal() == 0] = 0
        mask = torch.zeros_like(weight, dtype=torch.bool)
        width = weight.shape[1]
        size = self.block if not isinstance(pattern, NM) else -(-self.block // pattern.m) * pattern.m
        for start in range(0, width, size):
            end = min(start + size, width)
            kept = round(count * end / width) - round(count * start / width)
            part = slice(start, end)
            errors = self._solve_block(weight[:, part], factor[part, part], mask[:, part], pattern, kept)
            if self.update:
                weight[:, end:] -= errors @ factor[start:end, end:]
        return mask, weight.masked_fill_(~mask, 0)

    def _solve_block(self, weight: Tensor, factor: Tensor, mask: Tensor, pattern: Pattern, kept: int) -> Tensor:
        """Fills in the mask, and updates the weights in place; returns their errors."""
        diagonal, errors = factor.diagonal(), torch.zeros_like(weight)
        if not isinstance(pattern, NM):
            mask.copy_(largest((weight / diagonal).square(), kept))
        for column in range(weight.shape[1]):
            if isinstance(pattern, NM) and column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                mask[:, group] = pattern.best((weight[:, group] / diagonal[group]).square())
            errors[:, column] = weight[:, column].masked_fill(mask[:, column], 0) / diagonal[column]
            if self.update:
                weight[:, column:] -= errors[:, column, None] * factor[column, None, column:]
        return errors


def inverse_factor(products: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a Hessian over its mean diagonal, with a raised one; float64.

    Where the matrix is not positive definite, the damping is multiplied by ten until it is.
    """
    hessian = products.double()
    mean = hessian.diagonal().mean()
    # The scale of H is of no matter to what is pruned and how it is made up for.
    hessian = hessian / mean if mean > 0 else torch.zeros_like(hessian)
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    for power in range(40):
        raised = hessian + torch.diag(torch.full_like(hessian.diagonal(), min(1e3, damping * 10**power)))
        lower, info = torch.linalg.cholesky_ex(raised)
        if not int(info):
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(info):
                factor: Tensor = upper
                return factor
    raise InputError("the products of a layer's inputs have no Cholesky factor at any damping: check the data")


class OneShotSparsifier(Sparsifier):
    """Prunes a trained network at once, block by block: later blocks see what the pruned ones before them give.

    `batches` gives the calibration data anew each time it is called, and `forward` runs one of them; no more than one
    batch and the statistics of one block are in memory.
    """

    needs_training = False

    def __init__(
        self,
        sparsity: float,
        score: Score | None = None,
        distribution: Distribution | None = None,
        pattern: str | int | None = None,
        calibration: Calibration | None = None,
        targets: Targets | None = None,
    ) -> None:
        usual = score.pattern if isinstance(score, Calibrated) else "unstructured"
        spread = distribution or (Uniform() if isinstance(score, Calibrated) else None)
        super().__init__(sparsity, score, spread, usual if pattern is None else pattern, Constant(), targets)
        self.calibration = calibration or Calibration()
        self.batches: Callable[[], Iterable[Any]] | None = None
        self.forward: Run = run
        self.loss: Loss = _cross_entropy  # of scores at initialisation

    def check_budget(self) -> None:
        """Raises `InputError` if there is no data, or the sparsity cannot be met."""
        if not self.needs_data():
            super().check_budget()
        elif self.batches is None:
            raise InputError(
                f"{type(self.score).__name__} needs calibration data: use OneShot in a Trainer, `train.py oneshot`, "
                "or set `batches` to a function that gives them"
            )

    def needs_data(self) -> bool:
        """Whether there is something to learn from data."""
        return (
            isinstance(self.score, Calibrated | NetworkScore)
            or self.distribution.needs_inputs
            or self.calibration.norms
        )

    @torch.no_grad()
    def new_masks(self, density: float, step: int) -> Masks:
        """Prunes: the masks, and the weights where the method changes what it keeps."""
        self.check_budget()
        model = self.model
        assert model is not None
        if any(map(shards.is_spread, self.weights().values())):
            raise InputError("one-shot pruning with data wants whole weights: prune before they are sharded")
        if isinstance(self.score, NetworkScore):
            return self._by_network(model, self.score, density)
        with evaluating(model), whole_digits():
            if self.calibration.permute:
                permute_mlps(model, self.weights(), self.pattern)
            counts = self._shares(model, density)
            found = self._by_blocks(model, counts) if isinstance(self.score, Calibrated) else self._by_scores(counts)
            for name, weight in self.weights().items():
                weight.masked_fill_(~found[name], 0)
            if self.calibration.norms:
                recompute_norms(model, self._data(), self.forward)
        return found

    def _by_network(self, model: nn.Module, score: NetworkScore, density: float) -> Masks:
        """In rounds, each of which leaves the same part of the weights; the model's stay as they are until the end."""
        found, weights = masks.full(self.weights()), self.weights()
        before = {name: weight.clone() for name, weight in weights.items()}
        for number in track(range(score.rounds), "pruning", transient=True, disable=not sys.stderr.isatty()):
            scores: Any = _Table(score.of(model, weights, self._data(), self.loss), found, self)
            counts = self._counts(scores, density ** ((number + 1) / score.rounds), masks.counts(found))
            chosen = self.pattern.masks(scores, counts)
            found = {name: self.facing(name, mask).contiguous() for name, mask in chosen.items()}
            for name, weight in weights.items():
                weight.copy_(before[name].masked_fill(~found[name], 0))
        return found

    def _by_scores(self, counts: dict[str, int]) -> Masks:
        found = self.pattern.masks(self.scores(self.score, masks.full(self.weights()), "0"), counts)
        return {name: self.facing(name, mask).contiguous() for name, mask in found.items()}

    def _by_blocks(self, model: nn.Module, counts: dict[str, int]) -> Masks:
        score, layers = self.score, self._layers()
        assert isinstance(score, Calibrated)
        [first, *_] = [*islice(self._data(), 1), None]
        if first is None:
            raise InputError("the calibration data is empty: give at least one batch")
        found: Masks = {}
        owed = 0
        blocks = stages(model, layers, first, self.forward)
        for names in track(blocks, "pruning", transient=True, disable=not sys.stderr.isatty()):
            inputs = collect(model, {n: layers[n] for n in names}, self._data(), score.products, self.forward)
            for name in names:
                weight = self.weights()[name]
                face = self.facing(name, weight.detach())
                mask, values = score.prune(face, inputs.pop(name), self.pattern, counts[name] + owed)
                owed += counts[name] - int(mask.count_nonzero())
                found[name] = self.facing(name, mask).contiguous()
                weight.copy_(self.facing(name, values).masked_fill(~found[name], 0))
        return {name: found[name] for name in layers}

    def _shares(self, model: nn.Module, density: float) -> dict[str, int]:
        """How many weights each layer keeps."""
        whole = masks.full(self.weights())
        scores: Any = self.scores(Magnitude() if isinstance(self.score, Calibrated) else self.score, whole, "0")
        if self.distribution.needs_inputs:
            scores = _ByInputs(scores, collect(model, self._layers(), self._data(), False, self.forward))
        return self._counts(scores, density, masks.counts(whole))

    def _layers(self) -> dict[str, nn.Module]:
        return {name: module for name, (module, _) in self._owners.items()}

    def _data(self) -> Iterator[Any]:
        """The calibration batches: the same at each call, also of a loader that shuffles, and at no cost to others."""
        assert self.batches is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # `manual_seed` would also seed the GPUs, for good
            yield from islice(self.batches(), self.calibration.batches)


class _Table(Mapping[str, Tensor]):
    """Scores that are there, outputs before inputs; -inf where a weight is pruned."""

    def __init__(self, scores: dict[str, Tensor], kept: Masks, owner: Sparsifier) -> None:
        self.shapes = {name: tuple(owner.facing(name, score).shape) for name, score in scores.items()}
        self._scores = {}
        for name, score in scores.items():
            if not bool(torch.isfinite(score).all()):
                raise InputError(f"'{name}' cannot be ranked: {type(owner.score).__name__} scores it NaN or infinite")
            self._scores[name] = owner.facing(name, score.masked_fill(~kept[name], -torch.inf))

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Any:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a plain model on a batch (inputs, labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


class _ByInputs(Mapping[str, Tensor]):
    """Magnitudes times the norms of inputs, one layer at a time."""

    def __init__(self, magnitudes: Scores, inputs: Mapping[str, Inputs]) -> None:
        self.magnitudes, self.inputs, self.shapes = magnitudes, inputs, magnitudes.shapes

    def __getitem__(self, name: str) -> Tensor:
        score, norms = self.magnitudes[name], self.inputs[name].norms()
        return score * _as_weight(norms.repeat_interleave(len(score) // len(norms), 0), score)

    def __iter__(self) -> Any:
        return iter(self.magnitudes)

    def __len__(self) -> int:
        return len(self.magnitudes)


def _matrix(weight: Tensor) -> Tensor:
    """[out, in, ...] as [out, kernel * in], inputs fastest."""
    return weight.reshape(*weight.shape[:2], -1).transpose(1, 2).flatten(1)


def _as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """What `_matrix` made a matrix of, in the weight's shape."""
    return matrix.view(len(weight), -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
