"""Masks of objects: what a mask head is to learn of them, and its masks put into an image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from drconv_jax.detection.roi_align import roi_align

_PADDING = 1  # cells of 0 around a mask that is pasted


def mask_targets(
    masks: Num[Array, "objects height width"],
    boxes: Float[Array, "n 4"],
    matched: Int[Array, " n"],
    size: int,
) -> Float[Array, "n size size"]:
    """Masks of whole images, cut to boxes (Mask R-CNN, Section 3); not rounded to 0 or 1.

    Args:
      masks: of every object, 0 or 1 at each pixel of the image.
      boxes: in pixels.
      matched: the object of each box.
      size: height and width of the result.
    """

    def cut(box: Array, of: Array) -> Array:
        mask = masks[of].astype(boxes.dtype)[..., None]
        return roi_align(mask, box[None], (size, size))[0, ..., 0]

    return jax.vmap(cut)(boxes, matched)


def mask_targets_of_crops(
    crops: Num[Array, "objects crop crop"],
    object_boxes: Float[Array, "objects 4"],
    boxes: Float[Array, "n 4"],
    matched: Int[Array, " n"],
    size: int,
) -> Float[Array, "n size size"]:
    """`mask_targets` of masks that are cut to the boxes of their objects already.

    Args:
      crops: of every object its mask within its box, between 0 and 1.
      object_boxes: those boxes.
      boxes, matched, size: see `mask_targets`.
    """
    cells = crops.shape[-1]

    def cut(box: Array, of: Array) -> Array:
        own = object_boxes[of]
        sides = jnp.maximum(own[2:] - own[:2], 1)  # as roi_align made the crops
        box = (box.reshape(2, 2) - own[None, :2]) / sides[None] * cells
        crop = jnp.pad(crops[of].astype(boxes.dtype), 1)[..., None]
        return roi_align(crop, box.reshape(1, 4) + 1, (size, size), aligned=True)[0, ..., 0]

    return jax.vmap(cut)(boxes, matched)


def paste_masks(
    masks: Float[Array, "n mask mask"], boxes: Float[Array, "n 4"], size: tuple[int, int]
) -> Float[Array, "n height width"]:
    """Puts each mask into its box in an image of zeros, interpolated bilinearly.

    As Mask R-CNN's code does: the mask is padded by one cell, and its box widened by as much; the
    box is cut to whole pixels toward zero, and the pixel that it ends in belongs to it.

    Args:
      masks: probabilities.
      boxes: in pixels.
      size: the image's height and width.
    """
    cells = masks.shape[-1]
    growth = (cells + 2 * _PADDING) / cells
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * growth
    low = jnp.trunc(centre - half)
    pixels = jnp.maximum(jnp.trunc(centre + half) - low + 1, 1)
    padded = jnp.pad(masks, ((0, 0), (_PADDING,) * 2, (_PADDING,) * 2))
    columns, rows = (
        _interpolation(low[:, axis], pixels[:, axis], padded.shape[-1], length)
        for axis, length in ((0, size[1]), (1, size[0]))
    )
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("nhi,nij,nwj->nhw", rows, padded, columns, precision=highest)


def _interpolation(
    low: Float[Array, " n"], pixels: Float[Array, " n"], cells: int, length: int
) -> Float[Array, "n length cells"]:
    """How much of each cell is at each pixel of an axis; cells are spread over `pixels` of them."""
    at = jnp.arange(length, dtype=low.dtype)[None] - low[:, None]
    point = jnp.clip((at + 0.5) * (cells / pixels)[:, None] - 0.5, 0, cells - 1)
    inside = (at >= 0) & (at < pixels[:, None])
    near = 1 - jnp.abs(point[..., None] - jnp.arange(cells, dtype=low.dtype)[None, None])
    return jnp.where(inside[..., None], jnp.maximum(near, 0), 0)
