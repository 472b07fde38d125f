"""Images: decoded and augmented one by one on the host, or as whole batches on the device."""

from __future__ import annotations

import io
import math

import jax
import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "size size 3"]

# Of torchvision's RandomResizedCrop, which the public ImageNet recipes use.
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
# The share of the shorter side that a centre crop keeps: 224 of 256.
_CENTRE = 0.875


class BrokenImageError(Exception):
    """An image cannot be decoded; the message says why."""


def squashed(content: bytes, size: int) -> Pixels:
    """Decodes an image and resizes it to size x size, whatever its shape."""
    image = _opened(content)
    return _resized(image, (0, 0, *image.size), size)


def centre_crop(content: bytes, size: int) -> Pixels:
    """The middle 7/8 of the shorter side, the usual evaluation on ImageNet (224 of 256 pixels)."""
    image = _opened(content)
    width, height = image.size
    side = _CENTRE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return _resized(image, (left, top, left + side, top + side), size)


def random_resized_crop(
    content: bytes, size: int, generator: np.random.Generator, *, flip: bool
) -> Pixels:
    """A random part of the image, resized, and mirrored every other time if asked.

    The part is between 8 and 100 % of the area and between 3:4 and 4:3 in shape, as in the
    Inception paper (Szegedy et al., CVPR 2015, Section 6) and torchvision.
    """
    image = _opened(content)
    pixels = _resized(image, _random_box(*image.size, generator), size)
    return pixels[:, ::-1] if flip and generator.random() < 0.5 else pixels


def pad_crop_flip(
    key: jax.Array, images: Num[jax.Array, "batch size size 3"], *, flip: bool
) -> Num[jax.Array, "batch size size 3"]:
    """Pads by an eighth of the size, crops at random, and flips every other image if asked."""
    batch, size = images.shape[:2]
    pad = size // 8
    crop_key, flip_key = jax.random.split(key)
    padded = jax.numpy.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, 3))

    images = jax.vmap(crop)(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jax.numpy.where(mirrored, images[:, :, ::-1], images)
    return images


def _opened(content: bytes) -> Image.Image:
    if not content:
        raise BrokenImageError("the file is empty")
    try:
        return Image.open(io.BytesIO(content))
    except Exception as error:  # of any kind: one broken image never stops a run
        raise BrokenImageError(str(error) or type(error).__name__) from None


def _resized(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Pixels:
    """The part of an image within `box` (left, top, right, bottom)."""
    try:
        width, height = image.size
        # A JPEG is decoded at 1/2, 1/4 or 1/8 where that still has all the pixels that are kept.
        factor = int(min(box[2] - box[0], box[3] - box[1]) // size)
        if factor > 1:
            image.draft("RGB", (width // factor, height // factor))
        scale_x, scale_y = image.size[0] / width, image.size[1] / height
        box = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)
        image = image.convert("RGB")
        if box != (0, 0, size, size) or image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image)
    except Exception as error:  # of any kind, as above
        raise BrokenImageError(str(error) or type(error).__name__) from None


def _random_box(
    width: int, height: int, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    for _ in range(10):
        area = width * height * generator.uniform(*_SCALE)
        ratio = math.exp(generator.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
            return left, top, left + w, top + h
    # Of a very long image, the middle, as long as the shapes allow.
    w, h = min(width, height * _RATIO[1]), min(height, width / _RATIO[0])
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
