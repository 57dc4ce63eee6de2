import itertools
import math
import re

import pytest
import torch
from torch import Tensor, nn

from sparsity.patterns import NM, ROWS, Block, Channel, Pattern, Row, Transposable, Unstructured, nm_mask, parse

Shape = tuple[int, ...]
NMS = pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (2, 8)])
SHAPES = pytest.mark.parametrize(
    "shape", [(3, 8), (1, 16), (5, 8, 3), (4, 8, 3, 3), (2, 16, 1, 1), (2, 8, 2, 2, 2)], ids=str
)


def label(value: object) -> str:
    return value.name if isinstance(value, Pattern) else str(value) if isinstance(value, tuple) else ""


def whole_numbers(shape: Shape, seed: int = 0, high: int = 1000) -> Tensor:
    """Scores whose sums are exact, with few ties or, below a low `high`, many."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).float()


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` highest: by score, then by index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def nm_by_loop(score: Tensor, n: int, m: int) -> Tensor:
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for out, *kernel in itertools.product(range(score.shape[0]), *map(range, score.shape[2:])):
        for first in range(0, score.shape[1], m):
            group = [score[(out, first + place, *kernel)].item() for place in range(m)]
            for place in best(group, n):
                mask[(out, first + place, *kernel)] = True
    return mask


def per_group(mask: Tensor, m: int) -> Tensor:
    """How many are kept in each group along axis 1."""
    return torch.stack([part.sum(1) for part in mask.split(m, dim=1)])  # type: ignore[no-untyped-call]


@NMS
@SHAPES
@pytest.mark.parametrize("high", [1000, 3], ids=["distinct", "tied"])
def test_nm_mask_keeps_the_largest_of_each_group(n: int, m: int, shape: Shape, high: int) -> None:
    weight = whole_numbers(shape, high=high) - high // 2
    mask = nm_mask(weight, n, m)
    assert mask.dtype == torch.bool
    assert (per_group(mask, m) == n).all()
    assert torch.equal(mask, nm_by_loop(weight.abs(), n, m))


def test_nm_mask_by_hand() -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0, 0.0, 1.0, 1.0, -1.0, 1.0]])
    assert nm_mask(weight, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_nm_mask_of_other_dtypes(dtype: torch.dtype) -> None:
    weight = nn.Parameter((whole_numbers((6, 8), high=7) - 3).to(dtype))
    assert torch.equal(nm_mask(weight, 2, 4), nm_by_loop(weight.detach().abs(), 2, 4))


@pytest.mark.parametrize("shape", [(3, ROWS // 2), (2, 2 * ROWS)], ids=["several rows", "one row"])
def test_nm_mask_of_more_than_is_ranked_together(shape: Shape) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = nm_mask(weight, 2, 4)
    groups, kept = weight.abs().view(-1, 4), mask.view(-1, 4)
    assert (kept.sum(1) == 2).all()
    assert (groups.masked_fill(~kept, torch.inf).amin(1) >= groups.masked_fill(kept, 0).amax(1)).all()


@pytest.mark.parametrize("shape", [(3, 6), (4, 3), (2, 7, 3, 3), (8,), (0,)], ids=str)
def test_nm_mask_refuses_what_m_does_not_divide(shape: Shape) -> None:
    message = rf"pattern 2:4 groups 4 weights along the input axis, .* 'weight' of shape {re.escape(str(shape))}: leave"
    with pytest.raises(ValueError, match=message):
        nm_mask(torch.ones(shape), 2, 4)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (0, 0), (-1, 2)])
def test_nm_refuses_to_keep_none_or_all(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f'keeps N of M with 0 < N < M, got "{n}:{m}"$'):
        NM(n, m)


@pytest.mark.parametrize("high", [1000, 3], ids=["distinct", "tied"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 2, 2)], ids=str)
def test_nm_on_the_way_from_dense(shape: Shape, high: int) -> None:
    score = whole_numbers(shape, high=high)
    lowest = nm_by_loop(score, 2, 4)
    for count in range(score.numel() + 1):
        mask = NM(2, 4)(score, count)
        rest = [-1.0 if kept else value for value, kept in zip(score.flatten(), lowest.flatten(), strict=True)]
        more = best(rest, max(0, count - int(lowest.sum())))
        expected = lowest.clone()
        expected.view(-1)[more] = True
        assert torch.equal(mask, expected), count
        assert int(mask.sum()) == max(count, score.numel() // 2)


def test_nm_keeps_the_count_where_pruned_weights_have_to_fill_it() -> None:
    inf = torch.inf
    score = torch.tensor([[3.0, 2.0, -inf, -inf, 1.0, 0.5, -inf, -inf]])
    assert [int(NM(2, 4)(score, count).sum()) for count in range(4, 9)] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("high", [1000, 3], ids=["distinct", "tied"])
def test_unstructured_keeps_the_highest(high: int) -> None:
    score = whole_numbers((5, 7), high=high)
    for count in range(36):
        kept = Unstructured()(score, count).flatten().nonzero().squeeze(1).tolist()
        assert kept == sorted(best(score.flatten().tolist(), count))
    assert Unstructured()(score, 99).all()


def blocks_by_loop(score: Tensor, rows: int, columns: int, count: int) -> Tensor:
    matrix = score.reshape(score.shape[0], -1)
    corners = list(itertools.product(range(0, matrix.shape[0], rows), range(0, matrix.shape[1], columns)))
    sums = [float(matrix[r : r + rows, c : c + columns].double().sum()) for r, c in corners]
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    for r, c in [corners[place] for place in best(sums, count)]:
        mask[r : r + rows, c : c + columns] = True
    return mask.view(score.shape)


@pytest.mark.parametrize("high", [1000, 2], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((4, 6), 2, 3), ((4, 6), 1, 2), ((4, 6), 4, 6), ((6, 4, 3, 3), 3, 9), ((6, 4, 3, 3), 2, 4), ((4, 5), 1, 1)],
    ids=str,
)
def test_block_keeps_the_blocks_of_the_highest_sums(shape: Shape, rows: int, columns: int, high: int) -> None:
    score = whole_numbers(shape, high=high)
    for count in range(1, score.numel() // (rows * columns) + 1):
        mask = Block(rows, columns)(score, count * rows * columns)
        assert torch.equal(mask, blocks_by_loop(score, rows, columns, count))


@pytest.mark.parametrize("high", [1000, 2], ids=["distinct", "tied"])
@pytest.mark.parametrize("shape", [(6, 5), (7, 2, 3, 3), (1, 4)], ids=str)
def test_channel_keeps_the_channels_of_the_highest_sums(shape: Shape, high: int) -> None:
    score = whole_numbers(shape, high=high)
    for count in range(1, shape[0] + 1):
        mask = Channel()(score, count * math.prod(shape[1:]))
        kept = best([float(channel.double().sum()) for channel in score], count)
        assert [bool(channel.all()) for channel in mask] == [row in kept for row in range(shape[0])]
        assert int(mask.sum()) == count * math.prod(shape[1:])


@pytest.mark.parametrize(
    ("count", "kept"), [(0, 10), (4, 10), (14, 10), (16, 20), (24, 20), (26, 30), (40, 40), (90, 40)]
)
@pytest.mark.parametrize("pattern", [Block(2, 5), Channel()], ids=label)
def test_counts_go_to_the_nearest_whole_unit_and_never_to_none(pattern: Pattern, count: int, kept: int) -> None:
    shape = (8, 5) if isinstance(pattern, Block) else (4, 10)
    assert int(pattern(whole_numbers(shape), count).sum()) == kept


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 6), Channel()], ids=label)
def test_the_layout_in_memory_does_not_matter(pattern: Pattern) -> None:
    score = whole_numbers((6, 8, 3, 3))
    expected = pattern(score, 300)
    assert torch.equal(pattern(score.contiguous(memory_format=torch.channels_last), 300), expected)
    assert torch.equal(pattern(score.transpose(0, 3).contiguous().transpose(0, 3), 300), expected)


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (NM(2, 4), (6, 10), r"pattern 2:4 .* 4 does not divide in 'fc' of shape \(6, 10\): .*\.exclude=\['fc'\]"),
        (NM(2, 4), (8,), r"pattern 2:4 .* 'fc' of shape \(8,\)"),
        (Block(4, 2), (6, 10), r"pattern 4x2 does not tile 'fc', a matrix of 6 x 10: .*\.exclude=\['fc'\]"),
        (Block(2, 4), (6, 3, 3, 3), r"pattern 2x4 does not tile 'fc', a matrix of 6 x 27"),
        (Block(2, 1), (6,), r"pattern 2x1 does not tile 'fc'"),
        (Channel(), (6,), r"pattern channel needs two axes or more, 'fc' has shape \(6,\)"),
    ],
    ids=label,
)
def test_patterns_refuse_shapes_by_name(pattern: Pattern, shape: Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern.check("fc", shape)


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [(NM(2, 4), (1, 8, 3, 3)), (Block(2, 9), (6, 3, 3, 3)), (Channel(), (1, 1)), (Unstructured(), (5,))],
    ids=label,
)
def test_patterns_accept_shapes_that_fit(pattern: Pattern, shape: Shape) -> None:
    pattern.check("fc", shape)
    assert pattern(whole_numbers(shape), math.prod(shape)).all()


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (NM(2, 4), (3, 8, 3, 3)),
        (NM(1, 3), (5, 6)),
        (Block(2, 9), (6, 3, 3, 3)),
        (Channel(), (4, 7)),
        (Unstructured(), (3, 3)),
    ],
    ids=label,
)
def test_least_is_what_a_count_of_zero_keeps(pattern: Pattern, shape: Shape) -> None:
    assert pattern.least(shape) == int(pattern(whole_numbers(shape), 0).sum())


@pytest.mark.parametrize(
    ("counts", "fitted"),
    [
        ({"a": 4, "b": 14}, {"a": 8, "b": 10}),  # a is raised to its 8, and b's spare 6 pay for it
        ({"a": 0, "b": 16}, {"a": 8, "b": 8}),
        ({"a": 10, "b": 12}, {"a": 10, "b": 12}),
        ({"a": 16, "b": 16}, {"a": 16, "b": 16}),
    ],
    ids=str,
)
def test_fit_by_hand(counts: dict[str, int], fitted: dict[str, int]) -> None:
    assert NM(2, 4).fit(counts, {"a": (4, 4), "b": (4, 4)}) == fitted


@pytest.mark.parametrize(
    ("counts", "fitted"),
    [
        ({"a": 12, "b": 6, "c": 6}, {"a": 10, "b": 7, "c": 7}),  # what a cannot have goes to the others, evenly
        (
            {"a": 16, "b": 5, "c": 1},
            {"a": 10, "b": 6, "c": 6},
        ),  # a has 10, c needs 4, and the other 3 go where there is room: 3 to 4
        ({"a": 9, "b": 4, "c": 4}, {"a": 9, "b": 4, "c": 4}),
    ],
    ids=str,
)
def test_fit_within_the_most_by_hand(counts: dict[str, int], fitted: dict[str, int]) -> None:
    shapes = {"a": (4, 4), "b": (2, 4), "c": (2, 4)}
    assert NM(2, 4).fit(counts, shapes, {"a": 10, "b": 8, "c": 8}) == fitted


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 8), Block(2, 4), Channel()], ids=label)
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_fit_keeps_the_sum_and_stays_within_bounds(pattern: Pattern, bounded: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    shapes = {str(i): (between(1, 8) * 2, between(1, 4) * 8) for i in range(6)}
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    least = {name: pattern.least(shape) for name, shape in shapes.items()}
    most = {name: between(least[name], size[name]) for name in shapes} if bounded else size
    counts = {name: between(0, size[name]) for name in shapes}
    if not sum(least.values()) <= sum(counts.values()) <= sum(most.values()):
        counts = dict(zip(shapes, list(most.values())[::-1], strict=True))
    fitted = pattern.fit(counts, shapes, most) if bounded else pattern.fit(counts, shapes)
    assert sum(fitted.values()) == sum(counts.values())
    assert all(least[name] <= fitted[name] <= most[name] for name in shapes)


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (NM(2, 4), (10, 8), r"pattern 2:4 keeps at least 40 of 80 .* the budget is 39: .* sparsity of at most 0\.5$"),
        (NM(1, 3), (1000, 3000), r"pattern 1:3 keeps at least 1000000 of 3000000 .* the budget is 999999: "),
        (Block(2, 4), (6, 8), r"pattern 2x4 keeps at least 8 of 48 .* the budget is 7: "),
        (Channel(), (6, 8), r"pattern channel keeps at least 8 of 48 .* the budget is 7: "),
    ],
    ids=label,
)
def test_fit_refuses_a_budget_below_the_pattern_with_advice_that_works(
    pattern: Pattern, shape: Shape, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        pattern.fit({"fc": pattern.least(shape) - 1}, {"fc": shape})
    advice = re.search(r"ask for a sparsity of at most ([\d.]+)$", str(refusal.value))
    assert advice
    kept = round((1 - float(advice[1])) * math.prod(shape))
    assert pattern.fit({"fc": kept}, {"fc": shape}) == {"fc": kept}


def test_the_next_layer_makes_up_for_whole_units_by_hand() -> None:
    scores = {name: whole_numbers((4, 4)) for name in "abc"}
    # Blocks of 4: 7 goes to 8; 6 less 1 goes to 4; 5 and the 1 that is owed go to 8.
    masks = Block(2, 2).masks(scores, {"a": 7, "b": 6, "c": 5})
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 8, "b": 4, "c": 8}


@pytest.mark.parametrize("pattern", [Block(2, 4), Block(1, 8), Channel()], ids=label)
@pytest.mark.parametrize("seed", range(20))
def test_the_sum_over_layers_is_nearest_to_the_budget(pattern: Pattern, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randint(8, 14, (12, 2), generator=generator)
    scores = {
        str(i): whole_numbers((2 * int(rows), 4 * int(columns) // 8 * 8), i) for i, (rows, columns) in enumerate(axes)
    }
    counts = {
        name: int(score.numel() * (0.3 + 0.4 * float(torch.rand((), generator=generator))))
        for name, score in scores.items()
    }
    kept = sum(int(mask.sum()) for mask in pattern.masks(scores, counts).values())
    unit = pattern.least(tuple(scores["11"].shape))
    assert abs(kept - sum(counts.values())) <= unit / 2


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("unstructured", Unstructured, "unstructured"),
        ("channel", Channel, "channel"),
        ("2:4", NM, "2:4"),
        ("1:16", NM, "1:16"),
        ("4x4", Block, "4x4"),
        ("1x32", Block, "1x32"),
    ],
)
def test_parse(text: str, kind: type[Pattern], name: str) -> None:
    pattern = parse(text)
    assert type(pattern) is kind
    assert pattern.name == name


def test_parse_reads_rows_and_columns_and_n_and_m_in_order() -> None:
    nm, block = parse("2:8"), parse("3x5")
    assert isinstance(nm, NM)
    assert isinstance(block, Block)
    assert (nm.n, nm.m, block.rows, block.columns) == (2, 8, 3, 5)


@pytest.mark.parametrize(("number", "quoted"), [(124, "2:4"), ("124", "2:4"), (62, "1:2"), (68, "1:8"), (76, "1:16")])
def test_parse_explains_an_unquoted_pattern(number: int | str, quoted: str) -> None:
    with pytest.raises(ValueError, match=f'got the number {number}: YAML reads an unquoted N:M so; write "{quoted}"$'):
        parse(number)


@pytest.mark.parametrize("text", ["", "nm", "2-4", "2:4:8", "Channel", "4x", ":", "-2:4", "2.0:4"])
def test_parse_refuses_unknown_patterns(text: str) -> None:
    message = (
        rf'unknown pattern {re.escape(repr(text))}: expected "unstructured", "row", "channel", "2:4", "2:4T" or "4x4"$'
    )
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", r'keeps N of M with 0 < N < M, got "4:2"'),
        ("0:4", r'keeps N of M with 0 < N < M, got "0:4"'),
        ("0x4", r'needs R and C of at least 1, got "0x4"'),
        ("4x0", r'needs R and C of at least 1, got "4x0"'),
    ],
)
def test_parse_refuses_impossible_numbers(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_pattern_without_a_rule_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Pattern selects nothing"):
        Pattern()(torch.ones(2, 2), 1)


def by_argsort(score: Tensor, n: int, m: int) -> Tensor:
    """The n best of each group of m along axis 1, by a stable sort of each group on its own."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], m):
            order = sorted(range(start, start + m), key=lambda i, row=row: -float(score[row, i]))  # type: ignore[misc]  # a default
            mask[row, order[:n]] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8), (5, 16), (4, 32)])
@pytest.mark.parametrize("ties", [False, True])
def test_groups_are_ranked_as_a_stable_sort_ranks_them(n: int, m: int, ties: bool) -> None:
    score = torch.randint(3, (5, 2 * m)).float() if ties else torch.randn(5, 2 * m)
    score[0, :m] = -torch.inf
    assert torch.equal(NM(n, m).best(score), by_argsort(score, n, m))


def every_tile() -> list[Tensor]:
    """All 4 x 4 tiles with two ones in each row and column, by trying all 2^16."""
    found = []
    for bits in range(1 << 16):
        if bits.bit_count() == 8:
            tile = torch.tensor([bits >> i & 1 for i in range(16)]).view(4, 4)
            if (tile.sum(0) == 2).all() and (tile.sum(1) == 2).all():
                found.append(tile.bool())
    return found


def test_transposable_tiles_are_the_best_of_all() -> None:
    tiles = every_tile()
    assert len(tiles) == 90
    score = torch.rand(8, 12)
    exact, greedy = Transposable().best(score), Transposable(exact=False).best(score)
    for r in range(0, 8, 4):
        for c in range(0, 12, 4):
            part = score[r : r + 4, c : c + 4]
            best = max(float(part[tile].sum()) for tile in tiles)
            assert float(part[exact[r : r + 4, c : c + 4]].sum()) == pytest.approx(best)
            assert float(part[greedy[r : r + 4, c : c + 4]].sum()) <= best + 1e-5


@pytest.mark.parametrize("text", ["2:4T", "2:4T-greedy"])
@pytest.mark.parametrize("shape", [(8, 12), (8, 4, 3, 3), (256, 512)])
def test_transposable_masks_are_2_4_along_both_axes(text: str, shape: tuple[int, ...]) -> None:
    pattern = parse(text)
    assert isinstance(pattern, Transposable)
    assert pattern.name == text
    mask = pattern.best(torch.randn(shape).abs())
    assert (mask.view(shape[0], -1, 4, *shape[2:]).sum(2) == 2).all()
    assert (mask.view(-1, 4, *shape[1:]).sum(1) == 2).all()


def test_greedy_transposable_masks_keep_nearly_as_much() -> None:
    score = torch.randn(512, 512).abs()
    patterns = (NM(2, 4), Transposable(), Transposable(exact=False))
    kept = {each.name: float((score * each.best(score)).sum() / score.sum()) for each in patterns}
    assert kept["2:4"] > kept["2:4T"] > kept["2:4T-greedy"] > 0.68
    assert kept["2:4T"] == pytest.approx(0.702, abs=0.01)


def test_transposable_patterns_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match='transposable patterns are "2:4T" only, got "1:4T"'):
        parse("1:4T")
    with pytest.raises(ValueError, match="does not divide the 6 outputs of 'a'"):
        Transposable().check("a", (6, 8))
    with pytest.raises(ValueError, match="groups 4 weights along the input axis"):
        Transposable().check("a", (8, 6))


@pytest.mark.parametrize("count", [0, 1, 7, 20, 33, 59, 60])
def test_rows_keep_the_same_number(count: int) -> None:
    score = torch.randn(5, 4, 3)
    mask = Row()(score, count)
    assert int(mask.count_nonzero()) == count
    per_row = mask.flatten(1).sum(1)
    assert int(per_row.max() - per_row.min()) <= 1
    for row, kept in zip(score.flatten(1), mask.flatten(1), strict=True):
        if kept.any() and not kept.all():
            assert row[kept].min() > row[~kept].max()
    if count == 7:  # the rows with one more are those whose second best is highest
        second = score.flatten(1).sort(1, descending=True).values[:, 1]
        assert set((per_row == 2).nonzero().flatten().tolist()) == set(second.topk(2).indices.tolist())
