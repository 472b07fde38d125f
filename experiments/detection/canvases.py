"""Which images make a batch: all of them lie on canvases of one shape, one of a few.

For every shape a step is compiled; with fewer shapes, more of each canvas is padding.
"""

from __future__ import annotations

import dataclasses
import math
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
        heights: Int64[np.ndarray, images],
        widths: Int64[np.ndarray, images],
        min_size: int,
        max_size: int,
    ) -> Canvases:
        """Those in use of upright and lying canvases of three lengths: 1:1, 4:3 and the longest.

        Args:
          heights, widths: of the images before resizing.
          min_size, max_size: of the resized images' shorter and longer side, at most.
        """
        shapes = _shapes(min_size, max_size)
        smallest = np.empty(len(heights), np.int64)
        for image, size in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
            height, width = resized_size(*size, min_size, max_size)
            smallest[image] = next(
                place for place, (h, w) in enumerate(shapes) if h >= height and w >= width
            )
        used, smallest = np.unique(smallest, return_inverse=True)
        return cls(tuple(shapes[place] for place in used), smallest)

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch of training."""
        return len(self.smallest) // batch_size

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[Group]:
        """The batches of an epoch of training, in an order drawn from the seed and the epoch.

        No image is twice in it; what is more than whole batches is left out by lot. Images that
        fill no batch on their smallest canvas go to the next larger one. Where neither of the
        largest holds the other, upright and lying, what fills no batch on either is one batch on
        the canvas of most of it: the others must be made smaller to lie there.
        """
        generator = np.random.default_rng((seed, epoch))
        order = generator.permutation(len(self.smallest))
        order = order[: self.steps(batch_size) * batch_size]
        waiting = [order[self.smallest[order] == place] for place in range(len(self.shapes))]
        groups: list[Group] = []
        rest: list[Group] = []
        for place, canvas in enumerate(self.shapes):
            images = waiting[place]
            whole = len(images) // batch_size * batch_size
            groups += [Group(canvas, batch) for batch in images[:whole].reshape(-1, batch_size)]
            larger = self._larger(place)
            if larger is None:
                rest.append(Group(canvas, images[whole:]))
            else:
                waiting[larger] = np.concatenate([images[whole:], waiting[larger]])
        mixed = np.concatenate([group.images for group in rest])
        if len(mixed):  # a batch exactly, as all images are whole batches
            groups.append(Group(max(rest, key=lambda group: len(group.images)).canvas, mixed))
        return [groups[place] for place in generator.permutation(len(groups))]

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


def photograph(min_size: int, max_size: int) -> Canvas:
    """The canvas of a lying photograph, of 4:3; for the sizes, see `Canvases.of`."""
    (canvas,) = Canvases.of(np.array([480]), np.array([640]), min_size, max_size).shapes
    return canvas


def _shapes(min_size: int, max_size: int) -> list[Canvas]:
    short = _up(min_size)
    longs = {short, min(_up(math.ceil(min_size * _PHOTOGRAPH)), _up(max_size)), _up(max_size)}
    canvases = {Canvas(short, long) for long in longs} | {Canvas(long, short) for long in longs}
    return sorted(canvases, key=lambda canvas: (canvas.height * canvas.width, canvas))


def _up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE
