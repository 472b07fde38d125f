"""COCO's run-length code of masks, read and written within a part of the image.

A mask is taken column after column; its code has the lengths of the runs of 0 and of 1 in turn,
beginning with 0, and packs them into characters of five bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from pycocotools import mask as codec

# Characters of a number: seven have 35 bits, and no mask has as many pixels.
_LONGEST = 7


class Window(NamedTuple):
    """A part of an image: rows top to bottom - 1, columns left to right - 1."""

    top: int
    left: int
    bottom: int
    right: int


def run_lengths(code: bytes) -> Int64[np.ndarray, runs]:
    """The lengths of a mask's runs of 0 and of 1 in turn.

    Raises:
      ValueError: the code is none.
    """
    digits = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0  # of the digits of its number, which begin with the lowest
    if not len(digits) or not last[-1] or digits.min() < 0 or digits.max() > 63:
        raise ValueError("it is no run-length code of COCO's")
    first = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(digits)) - first[np.cumsum(last) - last]
    if place.max() >= _LONGEST:
        raise ValueError("it is no run-length code of COCO's")
    lengths = np.add.reduceat((digits & 31) << (5 * place), first)
    lengths -= ((digits[last] & 16) >> 4) << (5 * (place[last] + 1))  # the highest bit is the sign
    # From the fourth number on, what is written is the difference to the number before the last.
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths


def decoded(code: bytes, height: int, window: Window) -> UInt8[np.ndarray, "rows columns"]:
    """A window of the mask of an image that is `height` pixels high, of 0 and 1."""
    begin, end = window.left * height, window.right * height
    ends = np.clip(np.cumsum(run_lengths(code)), begin, end)
    runs = np.diff(ends, prepend=begin)
    columns = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(-1, height)
    return columns[:, window.top : window.bottom].T


def encoded(
    mask: Bool[np.ndarray, "rows columns"], top: int, left: int, height: int, width: int
) -> bytes:
    """The code of an image's mask, of which a part is given and all else is 0.

    Args:
      mask: the part.
      top, left: where it lies.
      height, width: of the image.
    """
    columns = np.zeros((mask.shape[1], height), np.int8)
    columns[:, top : top + mask.shape[0]] = mask.T
    changes = np.flatnonzero(np.diff(columns.ravel(), prepend=0, append=0)) + left * height
    lengths = np.diff(changes, prepend=0, append=height * width)
    if len(lengths) > 1 and lengths[-1] == 0:
        lengths = lengths[:-1]
    return from_lengths(lengths.tolist(), height, width)


def from_lengths(lengths: list[int], height: int, width: int) -> bytes:
    """The code of a mask whose runs' lengths are given."""
    return codec.frPyObjects({"size": [height, width], "counts": lengths}, height, width)["counts"]


def from_polygons(polygons: list[list[float]], height: int, width: int) -> bytes:
    """The code of all that lies in one of the polygons, each x, y, x, y, ... of 3 points or more.

    Pixels are COCO's: what pycocotools gives.
    """
    return codec.merge(codec.frPyObjects(polygons, height, width))["counts"]
