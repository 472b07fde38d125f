"""Which images are in a batch: all of it on a canvas of one shape, of a few shapes that there are.

Every shape is compiled once; the fewer there are, the more of each canvas is padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from experiments.detection.samples import Canvas, resized_size

# Canvases' sides are multiples of this, as the maps of a feature pyramid want it.
_MULTIPLE = 32
# The shape of most photographs: long side to short side.
_PHOTOGRAPH = 4 / 3


class Group(NamedTuple):
    """A batch of all processes: the images' places in their split, and the canvas of them all."""

    canvas: Canvas
    images: Int64[np.ndarray, batch]


@dataclasses.dataclass(frozen=True, eq=False)
class Canvases:
    """The canvases of a split's images.

    Attributes:
      shapes: the canvases in use, from the smallest to the largest.
      smallest: of every image, the smallest canvas that holds it, by its place in `shapes`.
    """

    shapes: tuple[Canvas, ...]
    smallest: Int64[np.ndarray, images]

    @classmethod
    def of(
        cls,
        heights: Sequence[int] | np.ndarray,
        widths: Sequence[int] | np.ndarray,
        min_size: int,
        max_size: int,
        batch_size: int,
    ) -> Canvases:
        """Chooses from upright and lying canvases of three lengths: of 1:1, 4:3 and the longest.

        One that no image is smallest on is left out. There is one of max_size x max_size more if
        without it some image could be in no batch of training: as where a single one is upright.

        Args:
          heights, widths: of the images before resizing.
          min_size, max_size: of the resized images' shorter and longer side, at most.
          batch_size: images in a batch of all processes.
        """
        shapes = _shapes(min_size, max_size)
        sizes = [
            resized_size(int(height), int(width), min_size, max_size)
            for height, width in zip(heights, widths, strict=True)
        ]
        smallest = np.array([_smallest(shapes, *size) for size in sizes], np.int64)
        used = np.unique(smallest)
        found = cls(tuple(shapes[s] for s in used), np.searchsorted(used, smallest))
        if all(found._seen(batch_size)):
            return found
        square = Canvas(_up(max_size), _up(max_size))
        if square in found.shapes:
            return found
        return cls((*found.shapes, square), found.smallest)

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch of training; fewer than images // batch_size if some do not mix."""
        counts = np.bincount(self.smallest, minlength=len(self.shapes)).tolist()
        batches = 0
        for place in range(len(self.shapes)):
            batches += counts[place] // batch_size
            larger = self._larger(place)
            if larger is not None:
                counts[larger] += counts[place] % batch_size
        return batches

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[Group]:
        """The batches of an epoch of training, in an order drawn from the seed and the epoch.

        No image is twice in it. What fills no batch on its smallest canvas goes to the next larger
        one, and is in no batch of this epoch only where there is none.
        """
        generator = np.random.default_rng((seed, epoch))
        order = generator.permutation(len(self.smallest))
        waiting = [order[self.smallest[order] == place] for place in range(len(self.shapes))]
        groups = []
        for place, canvas in enumerate(self.shapes):
            images = waiting[place]
            whole = len(images) // batch_size * batch_size
            groups += [Group(canvas, batch) for batch in images[:whole].reshape(-1, batch_size)]
            larger = self._larger(place)
            if larger is not None:
                mixed = np.concatenate([waiting[larger], images[whole:]])
                waiting[larger] = generator.permutation(mixed)
        return [groups[i] for i in generator.permutation(len(groups))]

    def evaluation(self, batch_size: int) -> list[Group]:
        """Batches with every image once; -1 stands for none behind the last of each canvas."""
        groups = []
        for place, canvas in enumerate(self.shapes):
            images = np.flatnonzero(self.smallest == place)
            padded = np.full(-(-len(images) // batch_size) * batch_size, -1, np.int64)
            padded[: len(images)] = images
            groups += [Group(canvas, batch) for batch in padded.reshape(-1, batch_size)]
        return groups

    def _larger(self, place: int) -> int | None:
        """The smallest canvas that holds another one and is larger."""
        height, width = self.shapes[place]
        for other, canvas in enumerate(self.shapes[place + 1 :], place + 1):
            if canvas.height >= height and canvas.width >= width:
                return other
        return None

    def _seen(self, batch_size: int) -> list[bool]:
        """Of each canvas, whether its images can be in a batch, on itself or a larger one."""
        counts = np.bincount(self.smallest, minlength=len(self.shapes)).tolist()
        seen = []
        for place in range(len(self.shapes)):
            larger = self._larger(place)
            seen.append(counts[place] >= batch_size)
            if larger is not None:
                counts[larger] += counts[place] % batch_size
        for place in reversed(range(len(self.shapes))):
            larger = self._larger(place)
            seen[place] = seen[place] or (larger is not None and seen[larger])
        return seen


def _shapes(min_size: int, max_size: int) -> list[Canvas]:
    short = _up(min_size)
    longs = {short, min(_up(math.ceil(min_size * _PHOTOGRAPH)), _up(max_size)), _up(max_size)}
    canvases = {Canvas(short, long) for long in longs} | {Canvas(long, short) for long in longs}
    return sorted(canvases, key=lambda canvas: (canvas.height * canvas.width, canvas))


def _up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _smallest(shapes: Sequence[Canvas], height: int, width: int) -> int:
    return next(place for place, (h, w) in enumerate(shapes) if h >= height and w >= width)
