"""Charts and pictures, their places worked out by hand."""

import base64
import io
from itertools import pairwise

import pytest
import torch
from PIL import Image

from sparsity.drawing import LARGEST, POINTS, bars, chart, mosaic, picture, short, smaller, ticks


def opened(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_a_picture_is_a_png_with_the_root_of_each_shade() -> None:
    image = opened(picture(torch.tensor([[0.0, 0.25, 1.0], [0.01, 2.0, -1.0]])))
    assert (image.size, image.mode) == ((3, 2), "RGBA")
    assert list(image.getchannel("A").tobytes()) == [0, 128, 255, 26, 255, 0]


def test_large_masks_are_drawn_by_means() -> None:
    assert torch.equal(smaller(torch.eye(4)), torch.eye(4))
    halves = torch.zeros(2 * LARGEST, 4)
    halves[::2] = 1
    assert torch.equal(smaller(halves), torch.full((LARGEST, 4), 0.5))


def test_mosaic_by_hand() -> None:
    filters = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(3, 1, 2)
    assert mosaic(filters).tolist() == [[1, 1, 0, 2, 2], [0, 0, 0, 0, 0], [3, 3, 0, 0, 0]]


def test_chart_by_hand() -> None:
    found = chart("t", {"one": [(0, 0.0), (10, 1.0)], "two": [(0, 0.5), (5, 0.25)]}, "step")
    assert [line["points"] for line in found["lines"]] == ["46.0,156.0 330.0,10.0", "46.0,83.0 188.0,119.5"]
    assert found["summary"] == "t over step. one: 0 at 0, 1 at 10; two: 0.5 at 0, 0.25 at 5."
    assert found["y_ticks"] == [(156, "0"), (119.5, "0.25"), (83, "0.5"), (46.5, "0.75"), (10, "1")]
    assert [label for _, label in found["x_ticks"]] == ["0", "2.5", "5", "7.5", "10"]


def test_stairs_hold_to_the_end_of_the_axis() -> None:
    [line] = chart("t", {"one": [(0, 0.0), (5, 1.0)]}, "step", within=[(10, 0.5)], stairs=True)["lines"]
    assert line["points"] == "46.0,156.0 188.0,156.0 188.0,10.0 330.0,10.0"


def test_a_single_point_and_many_have_places() -> None:
    [line] = chart("t", {"one": [(3, 7.0)]}, "step")["lines"]
    assert line["points"] == "188.0,83.0"
    [line] = chart("t", {"one": [(x, float(x)) for x in range(10 * POINTS)]}, "step")["lines"]
    assert len(line["points"].split()) <= POINTS
    assert line["points"].endswith("330.0,10.0"), "the last point is there"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.9, 0.97), (3, 840), (-2, 5), (0, 1e-7), (0, 3.3e9)])
def test_ticks_are_even_inside_and_three_to_six(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 6
    assert low <= found[0] + 1e-12
    assert found[-1] <= high * (1 + 1e-9)
    gaps = [b - a for a, b in pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))


def test_numbers_are_short() -> None:
    values = (0.0, 0.05, 9999.0, 12_345.0, 81_100_000.0, 2.5e9)
    assert [short(value) for value in values] == ["0", "0.05", "9999", "12.35k", "81.1M", "2.5G"]


def test_bars_by_hand() -> None:
    assert bars(torch.tensor([1.0, 2.0]), 0.5, 1.0, 2.0) == "M25.0 40V21.0H50.0V2.0H75.0V40"
