"""Patterns: which weights of a layer may be kept together. `(score, count) -> mask`."""

import math
import re
from collections.abc import Mapping
from functools import cache
from itertools import accumulate, combinations, pairwise, product

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from sparsity.errors import InputError
from sparsity.masks import Masks
from sparsity.ops import largest, whole_digits

ROWS = 1 << 20  # weights ranked together inside their groups: what bounds the extra memory
COMPARED = 16  # up to this many weights of a group are ranked by comparing all pairs


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """A bool mask that keeps the n largest magnitudes of each m consecutive weights along the input axis.

    The input axis is the one that is summed over: axis 1 of a Linear's [out, in] and of a convolution's
    [out, in, height, width]. Exactly n are kept in each group; among equals, the first. Raises `InputError` if m does
    not divide the axis.
    """
    pattern = NM(n, m)
    pattern.check("weight", tuple(weight.shape))
    return pattern.best(weight.detach().abs())


def parse(text: str | int) -> "Pattern":
    """The pattern a recipe names: "unstructured", "row", "channel", "2:4" (keep 2 of 4), "2:4T" (transposable) or
    "4x4" (blocks).

    Numbers are accepted only to explain them: YAML reads an unquoted 2:4 as 124.
    """
    if isinstance(text, int) or text.isdigit():
        quoted = f'"{int(text) // 60}:{int(text) % 60}"'
        raise InputError(f"pattern must be text, got the number {text}: YAML reads an unquoted N:M so; write {quoted}")
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+):(\d+)T(-greedy)?", text):
        return Transposable(int(match[1]), int(match[2]), exact=match[3] is None)
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    if text in PLAIN:
        return PLAIN[text]()
    raise InputError(f'unknown pattern {text!r}: expected "unstructured", "row", "channel", "2:4", "2:4T" or "4x4"')


def to_groups(tensor: Tensor, m: int) -> Tensor:
    """A tensor [out, in, ...] as groups of m along the input axis: [groups, m]."""
    if tensor.ndim == 2:
        return tensor.reshape(-1, m)
    return rearrange(tensor.flatten(2), "out (group m) k -> (out group k) m", m=m)


def from_groups(groups: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `to_groups` made groups of, in its shape [out, in, ...]."""
    if len(shape) == 2:
        return groups.reshape(shape)
    k = math.prod(shape[2:])
    return rearrange(groups, "(out group k) m -> out (group m) k", out=shape[0], k=k).reshape(shape)


class Pattern:
    """Which weights may be kept together. Patterns override `__call__`, and `check` and `least` where they need to."""

    name = "unstructured"

    def __call__(self, score: Tensor, count: int) -> Tensor:
        """A bool mask of the score's shape that keeps `count` weights, to the nearest whole unit of the pattern."""
        raise NotImplementedError(f"{type(self).__name__} selects nothing")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `InputError`, naming the parameter, where the pattern does not fit its shape."""

    def least(self, shape: tuple[int, ...]) -> int:
        """The fewest weights the pattern keeps in a tensor of this shape."""
        return 0

    def fit(
        self, counts: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], most: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """The counts with the same sum, at least what the pattern keeps and at most `most` (all weights if not given).

        Raises `InputError` if the sum is below what the pattern keeps.
        """
        least = {name: self.least(shapes[name]) for name in counts}
        most = most or {name: math.prod(shapes[name]) for name in counts}
        if sum(counts.values()) < sum(least.values()):
            total = sum(math.prod(shapes[name]) for name in counts)
            highest = math.floor((1 - sum(least.values()) / total) * 1e6) / 1e6
            raise InputError(
                f"pattern {self.name} keeps at least {sum(least.values())} of {total} target weights, the budget is "
                f"{sum(counts.values())}: ask for a sparsity of at most {highest:.6g}"
            )
        found = {name: max(least[name], min(count, most[name])) for name, count in counts.items()}
        over = sum(found.values()) - sum(counts.values())
        room = [(found[name] - least[name]) if over > 0 else (most[name] - found[name]) for name in found]
        # Rounding the running sum, rather than each share, keeps the total exact.
        ends = [round(part * over / max(1, sum(room))) for part in accumulate(room, initial=0)]
        return {
            name: count - (end - start)
            for (name, count), (start, end) in zip(found.items(), pairwise(ends), strict=True)
        }

    def masks(self, scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Masks:
        """The masks of all layers. What one layer misses of its count, by whole units, the next makes up for.

        A weight that scores -inf is not kept to make up for another.
        """
        masks: Masks = {}
        owed = 0
        for name, count in counts.items():
            score = scores[name]
            able = max(count, int((score > -torch.inf).count_nonzero()))
            masks[name] = self(score, max(0, min(able, count + owed)))
            owed += count - int(masks[name].count_nonzero())
        return masks


class Unstructured(Pattern):
    """Any weights: the `count` highest scores; among equals, the first."""

    def __call__(self, score: Tensor, count: int) -> Tensor:
        return largest(score, min(count, score.numel()))


class NM(Pattern):
    """At least n of each m consecutive weights along the input axis (axis 1), and exactly n at the lowest count.

    A count above that keeps the n best of each group and then the best of the rest, so that a gradual schedule has a
    way from dense to N:M.
    """

    def __init__(self, n: int, m: int) -> None:
        if not 0 < n < m:
            raise InputError(f'a pattern "N:M" keeps N of M with 0 < N < M, got "{n}:{m}"')
        self.n, self.m, self.name = n, m, f"{n}:{m}"

    def __call__(self, score: Tensor, count: int) -> Tensor:
        mask = self.best(score)
        more = min(count, score.numel()) - int(mask.count_nonzero())
        rest = ~mask
        if more > 0:
            mask[rest] = largest(score[rest], more)
        return mask

    def best(self, score: Tensor) -> Tensor:
        """The mask of the n best of each group."""
        parts = torch.split(score, max(1, ROWS // max(1, score[0].numel())))
        return torch.cat([self._best(part) for part in parts])

    def _best(self, score: Tensor) -> Tensor:
        groups = rearrange(score, "out (group m) ... -> m out group ...", m=self.m)
        return rearrange(_ranks(groups) < self.n, "m out group ... -> out (group m) ...")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        width = shape[1] if len(shape) > 1 else 0
        if width % self.m or not width:
            raise InputError(
                f"pattern {self.name} groups {self.m} weights along the input axis, which {self.m} does not divide in "
                f"'{name}' of shape {shape}: leave it out with targets.exclude=['{name}'], skip all such layers with "
                f"targets.multiple={self.m}, or pad its inputs from {width} to {-(-max(width, 1) // self.m) * self.m}"
            )

    def least(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.n // self.m


class Transposable(NM):
    """2:4 along both axes: in each tile of 4 x 4 exactly two weights of each row and two of each column.

    So a matrix and its transpose are both 2:4, and the input gradient can be as sparse as the forward pass (Hubara et
    al., "Accelerated sparse neural training", NeurIPS 2021, arXiv 2102.08124). There are 90 such tiles; `exact` takes
    the one that keeps the highest sum of scores. Otherwise weights are taken from the highest down as long as row and
    column have room, which keeps a little less; a tile that this leaves short of eight weights gets the best one.
    """

    def __init__(self, n: int = 2, m: int = 4, exact: bool = True) -> None:
        if (n, m) != (2, 4):
            raise InputError(f'transposable patterns are "2:4T" only, got "{n}:{m}T"')
        super().__init__(n, m)
        self.exact, self.name = exact, "2:4T" if exact else "2:4T-greedy"

    def best(self, score: Tensor) -> Tensor:
        """The mask of the best tiles."""
        flat = score.reshape(*score.shape[:2], -1)
        # -inf marks what is pruned already: as a large negative number it can be added up.
        tiles = rearrange(flat, "(R r) (C c) k -> (R C k) (r c)", r=4, c=4).float().clamp_min(-1e30)
        mask = torch.cat([self._chosen(part) for part in torch.split(tiles, ROWS // 128)])
        size = {"R": score.shape[0] // 4, "C": score.shape[1] // 4, "r": 4}
        return rearrange(mask, "(R C k) (r c) -> (R r) (C c) k", **size).reshape(score.shape)

    def _chosen(self, tiles: Tensor) -> Tensor:
        if self.exact:
            return _best_tiles(tiles)
        mask = _greedy_tiles(tiles)
        short = mask.sum(1) < 8
        mask[short] = _best_tiles(tiles[short])
        return mask

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        super().check(name, shape)
        if shape[0] % 4:
            raise InputError(
                f"pattern {self.name} tiles both axes by 4, which does not divide the {shape[0]} outputs of '{name}': "
                f"leave it out with targets.exclude=['{name}']"
            )


class Row(Pattern):
    """The same number of weights in each row (output), to the nearest; what is over goes to the highest left.

    Wanda compares weights so (Sun et al., arXiv 2306.11695).
    """

    name = "row"

    def __call__(self, score: Tensor, count: int) -> Tensor:
        rows = score.flatten(1)
        each, over = divmod(min(count, score.numel()), len(rows))
        order = rows.argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, :each], True)
        if over:
            next_ = order[:, each]
            best = largest(rows.gather(1, next_[:, None]).squeeze(1), over)
            mask[best, next_[best]] = True
        return mask.view(score.shape)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise InputError(f"pattern row needs two axes or more, '{name}' has shape {shape}: leave it out")


class Block(Pattern):
    """Whole blocks of `rows` x `columns` of the matrix [out, in * kernel], by the sum of their scores."""

    def __init__(self, rows: int, columns: int) -> None:
        if rows < 1 or columns < 1:
            raise InputError(f'a block pattern "RxC" needs R and C of at least 1, got "{rows}x{columns}"')
        self.rows, self.columns, self.name = rows, columns, f"{rows}x{columns}"

    def __call__(self, score: Tensor, count: int) -> Tensor:
        size = {"r": self.rows, "c": self.columns}
        units = reduce(score.flatten(1), "(R r) (C c) -> R C", "sum", **size)
        kept = _whole_units(count, self.rows * self.columns, units.numel())
        return repeat(largest(units, kept), "R C -> (R r) (C c)", **size).view(score.shape)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        columns = math.prod(shape[1:])
        if len(shape) < 2 or shape[0] % self.rows or columns % self.columns:
            raise InputError(
                f"pattern {self.name} does not tile '{name}', a matrix of {shape[0]} x {columns}: "
                f"leave it out with targets.exclude=['{name}']"
            )

    def least(self, shape: tuple[int, ...]) -> int:
        return self.rows * self.columns


class Channel(Pattern):
    """Whole output channels (axis 0), by the sum of their scores; at least one stays."""

    name = "channel"

    def __call__(self, score: Tensor, count: int) -> Tensor:
        units = score.flatten(1).sum(1)
        kept = _whole_units(count, score[0].numel(), units.numel())
        return largest(units, kept).view(-1, *[1] * (score.ndim - 1)).expand_as(score).contiguous()

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise InputError(f"pattern channel needs two axes or more, '{name}' has shape {shape}: leave it out")

    def least(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[1:])


def _whole_units(count: int, size: int, units: int) -> int:
    """The count in whole units of `size` weights, to the nearest, and at least one."""
    return min(units, max(1, round(count / size)))


def _ranks(groups: Tensor) -> Tensor:
    """The rank of each score among those along axis 0, from 0 for the highest; among equals, the first is higher."""
    if len(groups) > COMPARED:
        return groups.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    # A comparison of each pair takes a fraction of the time of many sorts of few numbers.
    ranks = torch.zeros(groups.shape, dtype=torch.int8, device=groups.device)
    for first, second in combinations(range(len(groups)), 2):
        loses = groups[second] > groups[first]
        ranks[first] += loses
        ranks[second] += ~loses
    return ranks


@cache
def _tiles() -> Tensor:
    """The 90 tiles of 4 x 4 with two ones in each row and each column, float ``[90, 16]``."""
    pairs = [sum(1 << i for i in pair) for pair in combinations(range(4), 2)]
    rows = torch.tensor([[[pair >> i & 1 for i in range(4)] for pair in tile] for tile in product(pairs, repeat=4)])
    return rows[(rows.sum(1) == 2).all(1)].flatten(1).float()


def _best_tiles(scores: Tensor) -> Tensor:
    table = _tiles().to(scores)
    with whole_digits():
        return table[(scores @ table.T).argmax(1)].bool()


def _greedy_tiles(scores: Tensor) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    rows, columns = scores.new_zeros(2, len(scores), 4).unbind(0)
    every = torch.arange(len(scores), device=scores.device)
    for place in scores.argsort(dim=1, descending=True, stable=True).unbind(1):
        row, column = place // 4, place % 4
        fits = (rows[every, row] < 2) & (columns[every, column] < 2)
        mask[every, place] = fits
        rows[every, row] += fits
        columns[every, column] += fits
    return mask


PLAIN = {each.name: each for each in (Unstructured, Row, Channel)}
