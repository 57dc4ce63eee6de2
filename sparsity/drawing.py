"""Drawing: charts and pictures as plain numbers and text, for a page that has to hold all of them itself."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH, HEIGHT = 340, 190  # of a chart, in the units of its SVG
LEFT, RIGHT, TOP, BOTTOM = 46, 330, 10, 156
POINTS = 256  # of a line, at most
BLUE = (40, 116, 186)
LARGEST = 320  # cells along a side of a picture

Points = Sequence[tuple[float, float]]
Chart = dict[str, Any]


def chart(title: str, lines: Mapping[str, Points], x_label: str, within: Points = (), stairs: bool = False) -> Chart:
    """Lines over one another: their points and the ticks of both axes, in the units of the SVG, and a summary in words.

    The axes reach to the points of `within`, too. `stairs`: values hold until the next, and the last to the end.
    """
    every = [point for points in (*lines.values(), within) for point in points]
    xs, ys = zip(*every, strict=True)
    across, up = _scale(min(xs), max(xs), LEFT, RIGHT), _scale(min(ys), max(ys), BOTTOM, TOP)
    drawn = []
    for name, points in lines.items():
        path = _stairs(_thinned(points), max(xs)) if stairs else _thinned(points)
        drawn.append({
            "name": name, "last": short(points[-1][1]),
            "points": " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in path),
        })  # fmt: skip
    ends = "; ".join(f"{name}: {short(p[0][1])} at {short(p[0][0])}, {short(p[-1][1])} at {short(p[-1][0])}"
                     for name, p in lines.items())  # fmt: skip
    return {
        "title": title, "x_label": x_label, "lines": drawn, "summary": f"{title} over {x_label}. {ends}.",
        "x_ticks": [(round(across(x), 1), short(x)) for x in ticks(min(xs), max(xs))],
        "y_ticks": [(round(up(y), 1), short(y)) for y in ticks(min(ys), max(ys))],
    }  # fmt: skip


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from low to high."""
    if high <= low:
        return [low]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(each * step, 12) for each in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number of at most four digits; from ten thousand on in thousands, then in millions and milliards (G)."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def bars(heights: Tensor, edge: float, widest: float, highest: float) -> str:
    """Bars from -edge to edge as an outline, for an SVG of 100 by 40 from -widest to widest and up to highest."""
    places = torch.linspace(50 - 50 * edge / widest, 50 + 50 * edge / widest, len(heights) + 1).tolist()
    tops = (40 - 38 * heights / highest).tolist()
    path = [f"V{top:.1f}H{place:.1f}" for place, top in zip(places[1:], tops, strict=True)]
    return f"M{places[0]:.1f} 40{''.join(path)}V40"


def picture(shades: Tensor) -> str:
    """A PNG as a data URI, one pixel for each shade in [0, 1], rows by columns: from transparent to blue.

    The square root of a shade is what is drawn, so that one and five per cent differ.
    """
    height, width = shades.shape
    pixels = torch.empty(height, width, 4, dtype=torch.uint8)
    pixels[..., :3] = torch.tensor(BLUE, dtype=torch.uint8)
    pixels[..., 3] = (shades.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    unfiltered = F.pad(pixels.flatten(1), (1, 0))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits each of red, green, blue and alpha
    body = zlib.compress(unfiltered.numpy().tobytes(), 9)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


def smaller(shades: Tensor) -> Tensor:
    """The means of as many cells as fit a picture."""
    height, width = shades.shape
    return F.adaptive_avg_pool2d(shades[None].float(), (min(height, LARGEST), min(width, LARGEST)))[0]


def mosaic(filters: Tensor) -> Tensor:
    """Filters ``[count, height, width]`` beside one another in about a square, one empty cell between them."""
    count, height, width = filters.shape
    across = math.ceil(math.sqrt(count))
    padded = F.pad(filters.float(), (0, 1, 0, 1, 0, -count % across))
    return padded.view(-1, across, height + 1, width + 1).transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """From numbers to places; all in the middle where there is one number only."""
    if high <= low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _thinned(points: Points) -> Points:
    every = math.ceil(len(points) / POINTS)
    return points[::-every][::-1]


def _stairs(points: Points, end: float) -> Points:
    corners = [corner for (_, before), (x, y) in pairwise(points) for corner in ((x, before), (x, y))]
    return [points[0], *corners, (end, points[-1][1])]
