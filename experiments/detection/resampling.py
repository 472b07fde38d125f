"""Linear resampling of images and masks, as torchvision does it, one axis after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, Num, UInt8

from experiments.detection import rle
from experiments.detection.rle import Window

# Rows of an image that are resized at a time, so that a processor's cache holds them.
_STRIP = 16


class Taps(NamedTuple):
    """What each of some new cells is made of: (1 - weight) * old[low] + weight * old[high]."""

    low: Int64[np.ndarray, cells]
    high: Int64[np.ndarray, cells]
    weight: Float32[np.ndarray, cells]


def taps(old: int, new: int, start: int, stop: int) -> Taps:
    """Of the cells start to stop - 1 of `new` ones that replace `old` ones.

    Cells' centres lie at halves, the step is old / new, and nothing is averaged on the way down:
    `interpolate(..., mode="bilinear")` of PyTorch.
    """
    at = np.maximum((np.arange(start, stop) + 0.5) * (old / new) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), old - 1)
    return Taps(low, np.minimum(low + 1, old - 1), (at - low).astype(np.float32))


def resized(
    image: UInt8[np.ndarray, "old_height old_width 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """An image at another size, bilinear without antialiasing, rounded to whole numbers."""
    old_height, old_width = image.shape[:2]
    if (height, width) == (old_height, old_width):
        return image
    low, high, weight = taps(old_width, width, 0, width)
    # Pixels of three numbers are laid flat: numpy is slow along an axis of three.
    flat, colours = image.reshape(old_height, -1), np.arange(3)
    lows, highs = (np.add.outer(3 * cells, colours).ravel() for cells in (low, high))
    wide = mixed(flat.take(lows, axis=1), flat.take(highs, axis=1), np.repeat(weight, 3))
    low, high, weight = taps(old_height, height, 0, height)
    result = np.empty((height, 3 * width), np.uint8)
    for start in range(0, height, _STRIP):
        strip = slice(start, start + _STRIP)
        both = mixed(wide[low[strip]], wide[high[strip]], weight[strip, None])
        result[strip] = np.rint(both, out=both)
    return result.reshape(height, width, 3)


def mixed(
    low: Num[np.ndarray, ...], high: Num[np.ndarray, ...], weight: Float32[np.ndarray, ...]
) -> Float32[np.ndarray, ...]:
    """(1 - weight) * low + weight * high, in float32."""
    both = np.multiply(low, 1 - weight, dtype=np.float32)
    both += np.multiply(high, weight, dtype=np.float32)
    return both


def mask_of_box(
    code: bytes,
    box: Float32[np.ndarray, 4],
    height: int,
    width: int,
    size: int,
    *,
    mirrored: bool = False,
) -> UInt8[np.ndarray, "size size"]:
    """An object's mask cut to its box: RoIAlign's value (He et al., 2017, Section 3) times 255.

    It is `roi_align(mask, box, (size, size), 1.0, -1, aligned=False)` of torchvision: as many
    samples a bin as it has pixels, and a pixel's value lies at its upper left corner.

    Args:
      code: of the image's mask, COCO's.
      box: x1, y1, x2, y2, in pixels, within the image.
      height, width: of the image.
      size: pixels a side of what is returned.
      mirrored: whether mask and box are mirrored, left to right, before.
    """
    x1, y1, x2, y2 = box
    if mirrored:
        x1, x2 = np.float32(width) - x2, np.float32(width) - x1
    top, rows = _averages(y1, y2, height, size, mirrored=False)
    left, columns = _averages(x1, x2, width, size, mirrored=mirrored)
    window = Window(top, left, top + rows.shape[1], left + columns.shape[1])
    mask = rle.decoded(code, height, window).astype(np.float32)
    return np.rint(255 * (rows @ mask @ columns.T)).astype(np.uint8)


def _averages(
    start: np.float32, stop: np.float32, cells: int, bins: int, *, mirrored: bool
) -> tuple[int, Float32[np.ndarray, "bins touched"]]:
    """RoIAlign along one axis: the first cell that it touches, and the cells' share in each bin."""
    length = max(stop - start, np.float32(1))
    samples = int(np.ceil(length / np.float32(bins)))
    at = start + (np.arange(bins * samples) + 0.5) * (float(length) / (bins * samples))
    inside = (at >= -1) & (at <= cells)
    at = np.clip(at, 0, cells - 1)
    low = at.astype(np.int64)
    weight = at - low
    high = np.minimum(low + 1, cells - 1)
    if mirrored:
        low, high = cells - 1 - low, cells - 1 - high
    touched = np.concatenate([low, high])
    first = int(touched.min())
    count = int(touched.max()) + 1 - first
    row = np.tile(np.arange(bins * samples) // samples, 2)
    share = np.concatenate([(1 - weight) * inside, weight * inside]) / samples
    flat = np.bincount(row * count + touched - first, share, bins * count)
    return first, flat.reshape(bins, count).astype(np.float32)
