"""Sums are exact: any order, any grouping, the same bits, and the value is right."""

from fractions import Fraction

import torch

from sparsity.federated.exact import EVERY, LARGEST, Exact, Wide


def values(count: int, size: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    scale = 10.0 ** torch.randint(-8, 6, (count, size), generator=generator)
    return (torch.randn(count, size, generator=generator) * scale).float()


def in_turn(rows: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(rows[0])
    for row in rows:
        found += row
    return found


def total(rows: torch.Tensor, times: list[int]) -> Exact:
    found = Exact(rows.shape[1])
    for row, number in zip(rows, times, strict=True):
        found.add(row, number)
    return found


def test_the_order_does_not_matter() -> None:
    rows, times = values(40), [1 + place % 7 for place in range(40)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    one, other = total(rows, times), total(rows[order], [times[place] for place in order])
    assert all(torch.equal(*pair) for pair in zip(one.tensors(), other.tensors(), strict=True))
    plain = rows.double() * torch.tensor(times)[:, None]
    assert not torch.equal(in_turn(plain), in_turn(plain[order])), "plain sums would differ, so this test can fail"


def test_it_does_not_matter_who_adds_what() -> None:
    rows, times = values(40), [1 + place % 7 for place in range(40)]
    mine, theirs = total(rows[:13], times[:13]), total(rows[13:], times[13:])
    for one, other in zip(mine.tensors(), theirs.tensors(), strict=True):
        one += other
    assert torch.equal(mine.value(), total(rows, times).value())


def test_the_value_is_that_of_fractions() -> None:
    rows, times = values(30, 20), [3 * place + 1 for place in range(30)]
    found = total(rows, times).value()
    for column in range(20):
        exact = Fraction(0)
        for row, number in zip(rows, times, strict=True):
            exact += Fraction(float(row[column])) * number
        assert abs(Fraction(float(found[column])) - exact) <= Fraction(1, 2**53) * abs(exact) + Fraction(31, 2**53)


def test_many_addends_do_not_overflow() -> None:
    found = Exact(2)
    for _ in range(3 * EVERY):
        found.add(torch.tensor([LARGEST / 2, -1 - 2.0**-30], dtype=torch.float64))
    assert found.value().tolist() == [LARGEST / 2 * 3 * EVERY, (-1 - 2.0**-30) * 3 * EVERY]


def test_what_is_small_is_not_lost_beside_what_is_large() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = 10.0 ** torch.randint(-24, 9, (300, 40), generator=generator) * torch.randn(300, 40, generator=generator)
    rows = rows.float().abs()
    order, found = torch.randperm(300, generator=generator), [Wide(40), Wide(40)]
    for place in range(300):
        found[0].add(rows[place])
        found[1].add(rows[order[place]])
    assert torch.equal(found[0].value(), found[1].value())
    for column in (0, 7, 39):
        exact = sum((Fraction(value) for value in rows[:, column].tolist()), Fraction(0))
        assert abs(Fraction(float(found[0].value()[column])) - exact) <= exact * Fraction(2) ** -50
    tiny = Wide(3)
    tiny.add(torch.tensor([1e-20, 3e-25, 0.0]))
    torch.testing.assert_close(tiny.value(), torch.tensor([1e-20, 3e-25, 0.0]).double(), rtol=1e-4, atol=0.0)
