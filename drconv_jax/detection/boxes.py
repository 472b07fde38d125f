"""Boxes: x1, y1, x2, y2 in pixels, with x to the right and y downwards; nothing is added by one.

Boxes of no size, as those that fill up a fixed number of slots, are boxes like others: no function
divides by their sides.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LARGEST_GROWTH = math.log(1000 / 16)
"""Of the logarithm of a side, as in Faster R-CNN's code: no exponential is infinite."""


def area(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Width times height, in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Float[Array, "*n 4"], b: Float[Array, "*m 4"]) -> Float[Array, "*n_m"]:
    """Intersection over union of every box of `a` with every box of `b`; 0 where both are points.

    Args:
      a: boxes.
      b: boxes.

    Returns:
      Of shape (*n, *m).
    """
    a, b = jnp.expand_dims(a, range(a.ndim - 1, a.ndim + b.ndim - 2)), _led(b, a.ndim - 1)
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    sides = jnp.maximum(high - low, 0)
    both = sides[..., 0] * sides[..., 1]
    either = area(a) + area(b) - both
    return jnp.where(either > 0, both / jnp.where(either > 0, either, 1), 0)


def _led(array: Array, axes: int) -> Array:
    return jnp.expand_dims(array, range(axes))


def clip(boxes: Float[Array, "*n 4"], size: Int[Array, " 2"]) -> Float[Array, "*n 4"]:
    """Boxes cut to an image.

    Args:
      boxes: boxes.
      size: the image's height and width.
    """
    height, width = size.astype(boxes.dtype)
    ends = jnp.stack([width, height, width, height])
    return jnp.clip(boxes, 0, _led(ends, boxes.ndim - 1))


def have_sides(boxes: Float[Array, "*n 4"], least: float) -> Bool[Array, "*n"]:
    """Whether width and height are at least so many pixels."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(axis=-1)


@dataclasses.dataclass(frozen=True)
class BoxCoder:
    """Boxes relative to others (Girshick et al., R-CNN, CVPR 2014, Appendix C).

    Attributes:
      weights: what the differences of centres in x and y and of the logarithms of widths and
        heights are multiplied by; a regression of about unit variance then learns best.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def encode(
        self, boxes: Float[Array, "*n 4"], references: Float[Array, "*n 4"]
    ) -> Float[Array, "*n 4"]:
        """The deltas from `references` to `boxes`; 0 where either has no width or no height."""
        sides, centres = _sides_and_centres(boxes)
        own_sides, own_centres = _sides_and_centres(references)
        real = ((sides > 0) & (own_sides > 0)).all(axis=-1, keepdims=True)
        sides, own_sides = jnp.where(real, sides, 1), jnp.where(real, own_sides, 1)
        deltas = jnp.concatenate(
            [(centres - own_centres) / own_sides, jnp.log(sides / own_sides)], axis=-1
        )
        return jnp.where(real, deltas * self._weights(deltas), 0)

    def decode(
        self, deltas: Float[Array, "*n 4"], references: Float[Array, "*n 4"]
    ) -> Float[Array, "*n 4"]:
        """The boxes that are `deltas` away from `references`; sides grow 62.5 times at most."""
        deltas = deltas / self._weights(deltas)
        sides, centres = _sides_and_centres(references)
        centres = deltas[..., :2] * sides + centres
        half = 0.5 * jnp.exp(jnp.minimum(deltas[..., 2:], _LARGEST_GROWTH)) * sides
        return jnp.concatenate([centres - half, centres + half], axis=-1)

    def _weights(self, like: Array) -> Array:
        return _led(jnp.asarray(self.weights, like.dtype), like.ndim - 1)


def _sides_and_centres(
    boxes: Float[Array, "*n 4"],
) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides, boxes[..., :2] + 0.5 * sides
