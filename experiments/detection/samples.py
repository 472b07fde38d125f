"""One image and its objects, prepared for a network of fixed shapes."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from experiments.detection import resampling
from experiments.detection.annotations import Objects
from experiments.runtime.images import UPRIGHT, BrokenImageError, as_rgb, exif_orientation, opened
from experiments.runtime.pipeline import Arrays
from experiments.runtime.task import BatchShapes


class Canvas(NamedTuple):
    """The shape of the arrays in whose upper left corner images lie."""

    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How images become samples, arrays of these names.

    - "image", uint8 (height, width, 3): in the upper left corner of its canvas, else 0.
    - "size", int32 (2,): height and width of the image on the canvas.

    Those of training have G slots for objects:

    - "boxes", float32 (G, 4): x1, y1, x2, y2 in pixels of the canvas; 0 in empty slots.
    - "labels", int32 (G,): from 1; 0 in empty slots.
    - "masks", uint8 (G, S, S), if there are any: each object's mask cut to its box, times 255
      (`resampling.mask_of_box`).

    Attributes:
      min_size, max_size: an image is scaled until its shorter side has min_size pixels or its
        longer side max_size, whichever is sooner (Ren et al., 2015, Section 3.3).
      slots: objects of an image, at most, at least 1; which of more there are is drawn.
      mask_size: pixels a side of the objects' masks; 0 for none.
      jitter: in training, the scale is multiplied by a number drawn from this range, of numbers
        above 0 and up to 1.
      flip: whether every other image of training is mirrored.
    """

    min_size: int
    max_size: int
    slots: int
    mask_size: int
    jitter: tuple[float, float] = (1.0, 1.0)
    flip: bool = False

    def __post_init__(self) -> None:
        low, high = self.jitter
        if not 0 < low <= high <= 1:
            raise ValueError(f"jitter must be a range of numbers in (0, 1], got {self.jitter}")
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(
                "min_size must be at least 1 and at most max_size, got "
                f"{self.min_size} and {self.max_size}"
            )
        if self.slots < 1 or self.mask_size < 0:
            raise ValueError(
                "slots must be at least 1 and mask_size at least 0, got "
                f"{self.slots} and {self.mask_size}"
            )

    def training(
        self,
        content: bytes,
        height: int,
        width: int,
        objects: Objects,
        canvas: Canvas,
        generator: np.random.Generator,
    ) -> Arrays:
        """Decodes an image and resizes it and its objects, drawing scale, flip and slots.

        Crowds are no objects, and what has no size after resizing is none.

        Args:
          content: the encoded image.
          height, width: as the annotations tell them.
          objects: the annotations.
          canvas: an image for which it is too small is made smaller.
          generator: draws.

        Raises:
          BrokenImageError: the image cannot be decoded, or has another size.
        """
        jitter = generator.uniform(*self.jitter)
        mirrored = self.flip and generator.random() < 0.5
        image = decode(content, height, width)
        size = self._size(height, width, canvas, jitter)
        pixels = resampling.resized(image[:, ::-1] if mirrored else image, *size)
        own = _corners(objects.boxes, height, width)
        boxes = _moved(own, height, width, size, mirrored=mirrored)
        sized = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        chosen = np.flatnonzero(sized & ~objects.crowd)
        if len(chosen) > self.slots:
            chosen = np.sort(generator.choice(chosen, self.slots, replace=False))
        filled = slice(len(chosen))
        slots = self._empty_slots()
        slots["boxes"][filled] = boxes[chosen]
        slots["labels"][filled] = objects.labels[chosen]
        if self.mask_size:
            for slot, j in enumerate(chosen):
                slots["masks"][slot] = resampling.mask_of_box(
                    objects.masks[j], own[j], height, width, self.mask_size, mirrored=mirrored
                )
        return {**_on_canvas(pixels, canvas), **slots}

    def evaluation(self, content: bytes, height: int, width: int, canvas: Canvas) -> Arrays:
        """Decodes an image and resizes it.

        Raises:
          BrokenImageError: the image cannot be decoded, or has another size.
        """
        return self.placed(decode(content, height, width), canvas)

    def placed(self, image: UInt8[np.ndarray, "height width 3"], canvas: Canvas) -> Arrays:
        """Resizes an image and puts it on a canvas: what evaluation has of it."""
        height, width, _ = image.shape
        size = self._size(height, width, canvas)
        return _on_canvas(resampling.resized(image, *size), canvas)

    def blank(self, canvas: Canvas) -> Arrays:
        """What evaluation has in the place of an image: a black one, as large as the canvas."""
        return _on_canvas(np.zeros((*canvas, 3), np.uint8), canvas)

    def batch_shapes(self, canvas: Canvas, batch_size: int) -> BatchShapes:
        """Of a batch of training."""
        return _shapes({**self.blank(canvas), **self._empty_slots()}, batch_size)

    def evaluation_batch_shapes(self, canvas: Canvas, batch_size: int) -> BatchShapes:
        """Of a batch of evaluation."""
        return _shapes(self.blank(canvas), batch_size)

    def _empty_slots(self) -> dict[str, np.ndarray]:
        slots: dict[str, np.ndarray] = {
            "boxes": np.zeros((self.slots, 4), np.float32),
            "labels": np.zeros(self.slots, np.int32),
        }
        if self.mask_size:
            slots["masks"] = np.zeros((self.slots, self.mask_size, self.mask_size), np.uint8)
        return slots

    def _size(
        self, height: int, width: int, canvas: Canvas, jitter: float = 1.0
    ) -> tuple[int, int]:
        """Of an image after resizing."""
        size = resized_size(height, width, self.min_size, self.max_size, jitter)
        if size[0] > canvas.height or size[1] > canvas.width:
            jitter *= min(canvas.height / size[0], canvas.width / size[1])
            size = resized_size(height, width, self.min_size, self.max_size, jitter)
        return size


def resized_size(
    height: int, width: int, min_size: int, max_size: int, jitter: float = 1.0
) -> tuple[int, int]:
    """An image's height and width after resizing, as torchvision rounds them; 1 at least."""
    scale = jitter * min(min_size / min(height, width), max_size / max(height, width))
    return max(math.floor(height * scale), 1), max(math.floor(width * scale), 1)


def decode(content: bytes, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """An image in RGB, in the frame that its annotations are in.

    That is upright where its EXIF block says how it is turned, as the tools show images in which
    people annotate; or as it is stored, where only so it has the height and width that the
    annotations tell.

    Raises:
      BrokenImageError: it cannot be decoded, or has another size.
    """
    with opened(content) as image:
        image.load()
        rgb = as_rgb(image)
        orientation = exif_orientation(image)
        turned = orientation >= 5  # by a quarter, so that height and width change places
        stored = image.size == (width, height)
        if orientation != 1 and (not turned or height == width or not stored):
            rgb = rgb.transpose(UPRIGHT[orientation])
    if rgb.size != (width, height):
        raise BrokenImageError(
            f"it has {rgb.height} x {rgb.width} pixels (height x width), but {height} x {width} in "
            "the annotations"
        )
    return np.asarray(rgb)


def _corners(boxes: np.ndarray, height: int, width: int) -> Float32[np.ndarray, "objects 4"]:
    """Boxes x, y, width, height as x1, y1, x2, y2, clipped to the image."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return np.clip(corners, 0, [width, height, width, height]).astype(np.float32)


def _moved(
    boxes: Float32[np.ndarray, "objects 4"],
    height: int,
    width: int,
    size: tuple[int, int],
    *,
    mirrored: bool,
) -> Float32[np.ndarray, "objects 4"]:
    """Boxes of an image of height x width, mirrored if asked, in the image resized to `size`."""
    if mirrored:
        boxes = boxes.copy()
        boxes[:, [0, 2]] = np.float32(width) - boxes[:, [2, 0]]
    ratio = np.array([size[1], size[0]], np.float32) / np.array([width, height], np.float32)
    return boxes * np.tile(ratio, 2)


def _on_canvas(pixels: UInt8[np.ndarray, "height width 3"], canvas: Canvas) -> Arrays:
    height, width = pixels.shape[:2]
    image = np.zeros((*canvas, 3), np.uint8)
    image[:height, :width] = pixels
    return {"image": image, "size": np.array([height, width], np.int32)}


def _shapes(sample: Arrays, batch_size: int) -> BatchShapes:
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape), array.dtype)
        for name, array in sample.items()
    }
