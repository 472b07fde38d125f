"""Linear resampling of images and masks, as torchvision does it, one axis after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Num, UInt8

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
    columns, rows = _samples(x1, x2, width, size), _samples(y1, y2, height, size)
    if mirrored:
        columns = columns._replace(low=width - 1 - columns.low, high=width - 1 - columns.high)
    (left, right), (top, bottom) = columns.touched(), rows.touched()
    mask = rle.decoded(code, height, Window(top, left, bottom, right))
    cut = rows.averaged(columns.averaged(mask.T, left, size).T, top, size)
    return np.rint(255 * cut).astype(np.uint8)


class _Samples(NamedTuple):
    """RoIAlign's samples along one axis, as many in each bin, and the cells that each is made of.

    Attributes:
      low, high, weight: as of `Taps`.
      inside: whether a sample counts; it is 0 if it lies too far outside the image.
    """

    low: Int64[np.ndarray, samples]
    high: Int64[np.ndarray, samples]
    weight: Float32[np.ndarray, samples]
    inside: Bool[np.ndarray, samples]

    def touched(self) -> tuple[int, int]:
        """The first cell that is used, and the one behind the last."""
        used = np.concatenate([self.low, self.high])
        return int(used.min()), int(used.max()) + 1

    def averaged(
        self, cells: Num[np.ndarray, "cells others"], first: int, bins: int
    ) -> Float32[np.ndarray, "bins others"]:
        """The bins' values.

        It is a product of matrices, but not computed as one, for which NumPy would start threads
        on all cores, where others read images.

        Args:
          cells: from `first` on, along the first axis.
          first: number of the first of the cells.
          bins: how many.
        """
        values = mixed(cells[self.low - first], cells[self.high - first], self.weight[:, None])
        values[~self.inside] = 0
        return values.reshape(bins, -1, cells.shape[1]).mean(axis=1)


def _samples(start: np.float32, stop: np.float32, cells: int, bins: int) -> _Samples:
    """Those of a box's side in an image with some cells along it."""
    length = max(stop - start, np.float32(1))
    count = bins * int(np.ceil(length / np.float32(bins)))
    at = start + (np.arange(count) + 0.5) * (float(length) / count)
    inside = (at >= -1) & (at <= cells)
    at = np.clip(at, 0, cells - 1)
    low = at.astype(np.int64)
    return _Samples(low, np.minimum(low + 1, cells - 1), (at - low).astype(np.float32), inside)
