"""Pruning at initialisation: SNIP, GraSP, SynFlow. Scores of all weights together, by passes through the network."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import Parameter

from sparsity.calibration import evaluating
from sparsity.errors import InputError
from sparsity.scores import Score

Weights = Mapping[str, Parameter]
Loss = Callable[[nn.Module, Any], Tensor]


class NetworkScore(Score):
    """A score that takes the whole network, before any training. Methods override `of`.

    Args:
        rounds: in how many rounds the weights are removed, each leaving the same part of those before.
    """

    def __init__(self, rounds: int = 1) -> None:
        if rounds < 1:
            raise InputError(f"rounds must be at least 1, got {rounds}")
        self.rounds = rounds

    def __call__(self, weight: Tensor, signal: Tensor | None, generator: torch.Generator) -> Tensor:
        raise InputError(
            f"{type(self).__name__} scores a whole network by its data: use OneShot in a Trainer, or `train.py oneshot`"
        )

    def of(self, model: nn.Module, weights: Weights, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
        """The score of each weight in its shape, the higher the more it matters; the model is as it was afterwards."""
        raise NotImplementedError(f"{type(self).__name__} defines no score")


class SNIP(NetworkScore):
    """|g w|, how much the loss would change without the weight: Lee et al. (ICLR 2019, arXiv 1810.02340).

    g is the mean gradient over the batches; batch norms see each batch as in training.
    """

    def of(self, model: nn.Module, weights: Weights, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
        found = _mean(_gradients(model, weights, batches, loss))
        return {name: (gradient * weights[name].detach()).abs() for name, gradient in found.items()}


class GraSP(NetworkScore):
    """w times (H g), what removing the weight takes from the flow of gradients: Wang et al. (ICLR 2020, arXiv
    2002.07376). g and H are those of the mean loss over the batches. The authors' code divides the logits by 200 first,
    which is not done here: the loss is the model's own.
    """

    def of(self, model: nn.Module, weights: Weights, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
        batches = list(batches)
        gradient = _mean(_gradients(model, weights, batches, loss))
        product = _mean(_gradients(model, weights, batches, loss, gradient))
        return {name: each * weights[name].detach() for name, each in product.items()}


class SynFlow(NetworkScore):
    """|w dR/dw| of the network with all of its weights made positive and ones as inputs, R being the sum of what it
    gives: Tanaka et al. (NeurIPS 2020, arXiv 2006.05467). In float64, and in a hundred rounds, so that no layer is
    emptied; of the data only the shape of an input is used.
    """

    def __init__(self, rounds: int = 100) -> None:
        super().__init__(rounds)

    def of(self, model: nn.Module, weights: Weights, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
        inputs = _ones(model, batches)
        every = {name: each.detach().abs().double() for name, each in model.named_parameters()}
        buffers = {n: each.abs().double() if each.is_floating_point() else each for n, each in model.named_buffers()}
        names = {id(each): name for name, each in model.named_parameters()}
        leaves = {name: every[names[id(weight)]].requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad(), evaluating(model):
            outputs = functional_call(model, {**every, **buffers}, (inputs,))
            total = torch.stack([each.sum() for each in _tensors(outputs)]).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else (gradient * leaf.detach()).abs()
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }


def _ones(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """An input of ones, one sample."""
    batch = next(iter(batches), None)
    first = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise InputError(
            "SynFlow feeds ones to the network, so it wants batches of floats or (floats, ...): it cannot prune a "
            "network of tokens; use SNIP or GraSP"
        )
    return torch.ones_like(first[:1], dtype=torch.float64)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    for each in outputs if isinstance(outputs, list | tuple) else [outputs]:
        if isinstance(each, Tensor):
            yield each


def _gradients(
    model: nn.Module, weights: Weights, batches: Iterable[Any], loss: Loss, along: dict[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """For each batch the gradient of the loss; or H times `along`, which is the gradient of their product."""
    before = {name: each.clone() for name, each in model.named_buffers()}  # batch norms move theirs
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_()
        with torch.enable_grad():
            for batch in batches:
                leaves = list(weights.values())
                found = torch.autograd.grad(loss(model, batch), leaves, allow_unused=True, create_graph=bool(along))
                if along:
                    parts = [(g * along[n]).sum() for n, g in zip(weights, found, strict=True) if g is not None]
                    found = torch.autograd.grad(torch.stack(parts).sum(), leaves, allow_unused=True)
                yield {
                    name: torch.zeros_like(weight) if gradient is None else gradient.detach()
                    for (name, weight), gradient in zip(weights.items(), found, strict=True)
                }
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        with torch.no_grad():
            for name, each in model.named_buffers():
                each.copy_(before[name])


def _mean(found: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    count = 0
    for each in found:
        total = {name: gradient + total[name] if total else gradient for name, gradient in each.items()}
        count += 1
    if not count:
        raise InputError("there is no batch to score the network by: give at least one")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        batches = torch.tensor(count, device=next(iter(total.values())).device)
        for tensor in (batches, *total.values()):
            torch.distributed.all_reduce(tensor)
        count = int(batches)
    return {name: gradient / count for name, gradient in total.items()}
