"""Bits: masks as bytes, within five percent of the fewest possible."""

import math

import numpy as np
import torch
import zstandard
from torch import Tensor

from sparsity.errors import InputError

BITMAP, GAPS = 0, 1
SPARSE = 0.15  # below this part of ones the gaps between them may be shorter than a bitmap
LONG = 255  # a gap that goes on in the next byte
# Level 3 finds repetitions that are none, and gets longer by it: up to a tenth.
LEVEL = 1


def encode(mask: Tensor) -> bytes:
    """The mask as bytes: its kind, and zstandard's frame of a bitmap or of the gaps between the rarer of its values.

    A frame carries its length and a checksum. Random masks of a million weights take at most 4 % more than
    `entropy_bound` at densities of 0.05 to 0.95.
    """
    values = mask.detach().cpu().numpy().reshape(-1)
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    found = [bytes([BITMAP]) + compressor.compress(np.packbits(values).tobytes())]
    ones = int(np.count_nonzero(values))
    rare = ones * 2 <= len(values)
    if min(ones, len(values) - ones) < SPARSE * len(values):
        kind = GAPS + (0 if rare else 1)
        found.append(bytes([kind]) + compressor.compress(_gaps(values if rare else ~values)))
    return min(found, key=len)


def decode(data: bytes, shape: tuple[int, ...]) -> Tensor:
    """The bool mask of a shape that `encode` made these bytes of, on the CPU.

    Raises `InputError` for bytes that are cut off, longer, altered, or do not fit the shape; that they are for just
    this mask, and not for one a few weights longer, is for the container to say.
    """
    size = math.prod(shape)
    kind, frame = data[:1], data[1:]
    if kind not in (b"\0", b"\1", b"\2"):
        raise InputError(f"a mask of {size} weights was expected, got {len(data)} bytes that begin with {kind!r}")
    if kind[0] == BITMAP:
        bits = np.frombuffer(_opened(frame, -(-size // 8), exactly=True), np.uint8)
        values = np.unpackbits(bits)
        if values[size:].any():
            raise InputError(f"a mask of {size} weights was expected, and there is more")
        values = values[:size].astype(bool)
    else:
        values = _filled(np.frombuffer(_opened(frame, size + 1, exactly=False), np.uint8), size)
        values = values if kind[0] == GAPS else ~values
    return torch.from_numpy(values).reshape(shape)


def entropy_bound(mask: Tensor) -> float:
    """The fewest bytes that a code made for masks of this density takes on average."""
    size, ones = mask.numel(), int(mask.count_nonzero())
    if ones in (0, size):
        return 0.0
    p = ones / size
    return -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


def _gaps(values: np.ndarray) -> bytes:
    """How many zeros come before each one, in bytes; 255 says that the gap goes on."""
    gaps = np.diff(np.flatnonzero(values), prepend=-1) - 1
    more = gaps // LONG
    result = np.full(len(gaps) + int(more.sum()), LONG, np.uint8)
    result[np.cumsum(more + 1) - 1] = gaps % LONG
    return result.tobytes()


def _filled(codes: np.ndarray, size: int) -> np.ndarray:
    ends = codes != LONG
    if len(codes) and not ends[-1]:
        raise InputError("a mask is cut off in the middle of a gap")
    places = np.cumsum(codes.astype(np.int64) + ends)[ends] - 1
    if len(places) and places[-1] >= size:
        raise InputError(f"a mask of {size} weights was expected, got one of at least {int(places[-1]) + 1}")
    values = np.zeros(size, bool)
    values[places] = True
    return values


def _opened(frame: bytes, most: int, exactly: bool) -> bytes:
    """What is in a frame, of at most this length; nothing may follow it."""
    try:
        length = zstandard.frame_content_size(frame)
        if length < 0 or length > most or (exactly and length != most):
            raise InputError(f"a mask of {most} bytes was expected, got a frame of {length}")
        opener = zstandard.ZstdDecompressor().decompressobj()
        content = opener.decompress(frame)
    except zstandard.ZstdError as error:
        raise InputError(f"a mask is damaged: {error}") from error
    if not opener.eof or len(content) != length or opener.unused_data:
        raise InputError(f"a mask is damaged: {len(content)} of {length} bytes, {len(opener.unused_data)} after it")
    return content
