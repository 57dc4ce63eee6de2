"""Channel permutation: hidden units of an MLP in another order, so that N:M keeps more of its second matrix.

The order of hidden units is free: with the rows of the first layer moved alike, the network computes the same.
"""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparsity.patterns import NM, Pattern

ROUNDS = 24  # of exchanges between pairs of groups; 200 gain a fifth more in eight times the time
BATCH = 1 << 24  # numbers ranked together: what bounds the extra memory


def permute_mlps(model: nn.Module, weights: Mapping[str, Parameter], pattern: Pattern) -> list[str]:
    """Reorders the hidden units of each MLP whose second matrix is among the weights; returns the MLPs' names.

    An MLP is a module with exactly two linear layers, of which the second takes what the first gives, and whose outputs
    on random inputs stay the same to 1e-4 with the units in another order; others are put back as they were.
    """
    if type(pattern) is not NM:
        return []
    targets = {id(weight) for weight in weights.values()}
    found = []
    for name, module in model.named_modules():
        linear = [each for each in module.modules() if type(each) is nn.Linear]
        if len(linear) != 2 or linear[0].out_features != linear[1].in_features or id(linear[1].weight) not in targets:
            continue
        if len(list(module.parameters())) != sum(len(list(each.parameters())) for each in linear):
            continue
        if linear[1].in_features % pattern.m == 0 and _reordered(module, linear[0], linear[1], pattern):
            found.append(name)
    return found


@torch.no_grad()
def best_order(score: Tensor, pattern: NM, seed: int = 0) -> Tensor:
    """An order of the columns of [out, in] in which N:M keeps a high sum of scores, int64 [in].

    Pool & Yu, "Channel permutations for N:M sparsity" (NeurIPS 2021): groups meet in random pairs, and each pair takes
    the best of all ways to share its columns, for some rounds. Never worse than the order that
    is there.
    """
    m, width = pattern.m, score.shape[1]
    order = torch.arange(width, device=score.device)
    groups, idle = width // m, 0
    if groups < 2:
        return order
    ways = _ways(m).to(score.device)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(ROUNDS):
        pairs = torch.randperm(groups, generator=generator)[: groups // 2 * 2].view(-1, 2).to(score.device)
        columns = order.view(groups, m)[pairs].flatten(1)  # [pairs, 2 m]
        kept = _kept(score, columns, ways, pattern)
        best = kept.argmax(1)
        # The way that is there is the first; among equals it stays.
        idle = 0 if bool((kept.gather(1, best[:, None])[:, 0] > kept[:, 0] * (1 + 1e-6)).any()) else idle + 1
        order.view(groups, m)[pairs] = columns.gather(1, ways[best]).view(-1, 2, m)
        if idle == 8:
            break
    return order


def _kept(score: Tensor, columns: Tensor, ways: Tensor, pattern: NM) -> Tensor:
    """What each pair keeps in each way to share its columns, [pairs, ways]."""
    size = max(1, BATCH // (score.shape[0] * ways.numel()))
    found = []
    for part in columns.split(size):  # type: ignore[no-untyped-call]  # torch's
        shared = part[:, ways]  # [pairs, ways, 2 m]
        values = score[:, shared].view(len(score), *shared.shape[:2], 2, pattern.m)
        found.append(_highest(values, pattern).sum((0, -1)))
    return torch.cat(found)


def _highest(values: Tensor, pattern: NM) -> Tensor:
    """The sum of the n highest along the last axis."""
    if (pattern.n, pattern.m) != (2, 4):
        return values.topk(pattern.n, dim=-1).values.sum(-1)
    # Of 2:4 two pairs, one pair or the other, or the best of each: sorting few numbers many times is slow.
    a, b, c, d = values.unbind(-1)
    return torch.maximum(torch.maximum(a, b) + torch.maximum(c, d), torch.maximum(a + b, c + d))


def _ways(m: int) -> Tensor:
    """Ways to share 2 m columns between two groups, [ways, 2 m]; the first leaves them where they are.

    All of them up to groups of 4, and beyond that those that exchange one column for one.
    """
    every = range(2 * m)
    with_first = [(0, *rest) for rest in combinations(range(1, 2 * m), m - 1)]
    if m > 4:
        kept = set(range(m))
        with_first = [tuple(kept), *(tuple(sorted(kept - {i} | {j})) for i in range(m) for j in range(m, 2 * m))]
    return torch.tensor([[*one, *(column for column in every if column not in one)] for one in with_first])


def _reordered(module: nn.Module, first: nn.Linear, second: nn.Linear, pattern: NM) -> bool:
    """Puts the best order into the layers; False, and nothing changed, where that changes what the module computes."""
    order = best_order(second.weight.detach().abs().float(), pattern)
    probe = torch.randn(16, first.in_features, generator=torch.Generator().manual_seed(0)).to(first.weight)
    before = [each.detach().clone() for each in (*first.parameters(), second.weight)]
    try:
        expected = module(probe)
        _move(first, second, order)
        same = torch.allclose(module(probe), expected, rtol=1e-4, atol=1e-4)
    except Exception:  # a module that takes something else than one tensor of features
        same = False
    if not same:
        for parameter, value in zip((*first.parameters(), second.weight), before, strict=True):
            parameter.detach().copy_(value)
    return same


def _move(first: nn.Linear, second: nn.Linear, order: Tensor) -> None:
    for parameter in first.parameters():
        parameter.detach().copy_(parameter.detach()[order])
    second.weight.detach().copy_(second.weight.detach()[:, order])
