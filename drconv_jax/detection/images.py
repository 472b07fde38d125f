"""Images as a detector wants them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue, from 0 to 1; torchvision's weights expect them."""


def normalize(
    images: UInt8[Array, "batch height width 3"], sizes: Int[Array, "batch 2"]
) -> Float[Array, "batch height width 3"]:
    """Pixels of about zero mean and unit variance, and 0 beyond each image.

    Args:
      images: in the upper left corner of a canvas.
      sizes: height and width of each image on its canvas.
    """
    mean, deviation = (jnp.array(values)[None, None, None] for values in (MEAN, DEVIATION))
    normal = (images.astype(jnp.float32) / 255 - mean) / deviation
    rows, columns = (
        jnp.arange(images.shape[1 + axis])[None] < sizes[:, axis, None] for axis in (0, 1)
    )
    return jnp.where((rows[:, :, None] & columns[:, None])[..., None], normal, 0)
