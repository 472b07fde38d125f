"""Images: decoded and augmented one by one on the host, or as whole batches on the device."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from experiments.runtime.errors import reason

Pixels = UInt8[np.ndarray, "size size 3"]
_Box = tuple[float, float, float, float]

# Of torchvision's RandomResizedCrop, which the public ImageNet recipes use.
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
# The share of the shorter side that a centre crop keeps: 224 of 256.
_CENTRE = 0.875
# How a picture is turned upright, by the orientation that its EXIF block tells.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(Exception):
    """An image cannot be decoded; the message says why."""


@contextlib.contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    """Opens an encoded image.

    Raises:
      BrokenImageError: it cannot be decoded, now or in the block within.
    """
    if not content:
        raise BrokenImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            yield image
    except UnidentifiedImageError:
        raise BrokenImageError("it is not an image of a format that Pillow reads") from None
    except Exception as error:  # of any kind: one broken image never stops a run
        raise BrokenImageError(reason(error)) from None


def upright(content: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image as it is to be looked at, in RGB.

    Raises:
      BrokenImageError: it cannot be decoded.
    """
    with opened(content) as image:
        image.load()  # some formats know their orientation only then
        rgb, orientation = as_rgb(image), exif_orientation(image)
        return np.asarray(rgb if orientation == 1 else rgb.transpose(UPRIGHT[orientation]))


def squashed(content: bytes, size: int | tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image and resizes it to a size, or to a height and width, whatever its shape."""
    height, width = (size, size) if isinstance(size, int) else size
    return _cut_out(content, height, width, lambda width, height: (0, 0, width, height))


def centre_crop(content: bytes, size: int) -> Pixels:
    """The middle 7/8 of the shorter side, the usual evaluation on ImageNet (224 of 256 pixels)."""

    def middle(width: int, height: int) -> _Box:
        side = _CENTRE * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    return _cut_out(content, size, size, middle)


def random_resized_crop(
    content: bytes, size: int, generator: np.random.Generator, *, flip: bool
) -> Pixels:
    """A random part of the image, resized, and mirrored every other time if asked.

    The part is between 8 and 100 % of the area and between 3:4 and 4:3 in shape, as in the
    Inception paper (Szegedy et al., CVPR 2015, Section 6) and torchvision.
    """
    pixels = _cut_out(content, size, size, functools.partial(_random_box, generator))
    return pixels[:, ::-1] if flip and generator.random() < 0.5 else pixels


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes in 8-bit RGB.

    - 16-bit grey is scaled by its range, so that 65535 is white.
    - Numbers of 32 bits, whole or not, have no range of their own: they are taken to be of the
      smallest of 0 to 1 (for floats only), 0 to 255, 0 to 65535 and 0 to 2^31 - 1 that holds them
      all. What is negative, or no number, is black.
    - What is transparent lies on white.
    - CIELAB is converted by colour management to sRGB.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_numbers(image)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    return image.convert("RGB")


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


def normalize(images: UInt8[jax.Array, ...]) -> Float[jax.Array, ...]:
    """uint8 pixels to about zero mean and unit variance."""
    return (images.astype(jax.numpy.float32) - 127.5) / 64.0


def _cut_out(
    content: bytes, out_height: int, out_width: int, box_of: Callable[[int, int], _Box]
) -> UInt8[np.ndarray, "out_height out_width 3"]:
    """Decodes an image, turns it upright, and resizes a part of it.

    Args:
      content: the encoded image.
      out_height, out_width: pixels of what is returned.
      box_of: makes of the upright image's width and height the part's left, top, right and bottom.

    Raises:
      BrokenImageError: it cannot be decoded.
    """
    with opened(content) as image:
        return _part(image, out_height, out_width, box_of)


def _part(
    image: Image.Image, out_height: int, out_width: int, box_of: Callable[[int, int], _Box]
) -> UInt8[np.ndarray, "out_height out_width 3"]:
    if image.format not in ("JPEG", "MPO"):
        image.load()  # other formats may know their orientation, or even their size, only then
    orientation = exif_orientation(image)
    height, width = image.size if orientation >= 5 else image.size[::-1]
    box = box_of(width, height)
    # A JPEG is decoded at 1/2, 1/4 or 1/8 where that still has all the pixels that are kept.
    factor = int(min((box[2] - box[0]) / out_width, (box[3] - box[1]) / out_height))
    if factor > 1:
        image.draft("RGB", (image.width // factor, image.height // factor))
    image = as_rgb(image)
    if orientation != 1:
        image = image.transpose(UPRIGHT[orientation])
    scale_x, scale_y = image.width / width, image.height / height
    box = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)
    out = (out_width, out_height)
    if box != (0, 0, *out) or image.size != out:
        image = image.resize(out, Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


def exif_orientation(image: Image.Image) -> int:
    """As the EXIF block tells it; 1 is upright."""
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of many kinds; a picture is no worse for a damaged EXIF block
        return 1
    return orientation if orientation in UPRIGHT else 1


def _from_numbers(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, np.float64), nan=0, posinf=np.inf, neginf=0)
    # Pillow scales the numbers of a PGM file to 16 bits, whatever their range is in the file.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        white = 65535.0
    else:
        ranges = (255.0, 65535.0, 2.0**31 - 1) if image.mode == "I" else (1.0, 255.0, 65535.0)
        largest = np.max(values, initial=0, where=np.isfinite(values))
        white = next((end for end in ranges if largest <= end), 2.0**31 - 1)
    grey = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _random_box(generator: np.random.Generator, width: int, height: int) -> _Box:
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
