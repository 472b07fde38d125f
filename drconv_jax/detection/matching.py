"""Which object a box is to learn, and which boxes learn: matching and sampling."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

BACKGROUND, BETWEEN = -1, -2
"""What `match` gives in place of an object: none, or neither one nor none."""


def match(
    iou: Float[Array, "objects n"],
    real: Bool[Array, " objects"],
    *,
    high: float,
    low: float,
    low_quality: bool = False,
) -> Int[Array, " n"]:
    """The object that each of n boxes overlaps most (Ren et al., Faster R-CNN, Section 3.1.2).

    Args:
      iou: of every object with every box.
      real: which objects there are; the others fill up slots, and are matched by no box.
      high: overlap from which on a box is matched.
      low: overlap below which a box is background.
      low_quality: whether the boxes that overlap an object most are matched in any case, each with
        the object that it overlaps most itself, which may be another. An object that no box
        touches is overlapped by all alike.

    Returns:
      Indices of objects, the first of those that overlap alike; `BACKGROUND`, or `BETWEEN` for an
      overlap from `low` to below `high`.
    """
    if not iou.shape[0]:
        return jnp.full(iou.shape[1], BACKGROUND)
    iou = jnp.where(real[:, None], iou, -1)
    best, of = iou.max(axis=0), iou.argmax(axis=0)
    matched = jnp.where(best >= high, of, jnp.where(best >= low, BETWEEN, BACKGROUND))
    if low_quality:
        of_object = iou.max(axis=1, keepdims=True)
        matched = jnp.where(((iou == of_object) & real[:, None]).any(axis=0), of, matched)
    return matched


class Sample(NamedTuple):
    """Boxes drawn for a loss, positives first.

    Attributes:
      chosen: indices of the boxes.
      positive: which of them have an object to learn.
      real: which slots hold a box at all.
    """

    chosen: Int[Array, " size"]
    positive: Bool[Array, " size"]
    real: Bool[Array, " size"]


def sample(
    key: PRNGKeyArray,
    positive: Bool[Array, " n"],
    negative: Bool[Array, " n"],
    size: int,
    positive_fraction: float,
) -> Sample:
    """Draws `size` boxes, a fraction of them positives if there are as many, negatives the others.

    Args:
      key: of the draw, in which all positives are alike, and all negatives.
      positive, negative: which boxes may be drawn as what.
      size: boxes drawn, if there are as many.
      positive_fraction: of `size`, that are positives at most.
    """
    size = min(size, positive.size)
    chance = jax.random.uniform(key, positive.shape)
    most = max(int(size * positive_fraction), 1)
    positives = jax.lax.top_k(jnp.where(positive, chance, -1), min(most, size))[1]
    negatives = jax.lax.top_k(jnp.where(negative, chance, -1), size)[1]
    count = jnp.minimum(positive.sum(), int(size * positive_fraction))
    slot = jnp.arange(size)
    is_positive = slot < count
    index = jnp.where(
        is_positive,
        positives[jnp.minimum(slot, positives.size - 1)],
        negatives[jnp.maximum(slot - count, 0)],
    )
    return Sample(index, is_positive, is_positive | (slot - count < negative.sum()))
