"""The losses of Faster R-CNN and Mask R-CNN, of slots of which only some are real.

Means are over the whole batch, as in torchvision: an image with many objects counts for more.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

_BETA = 1 / 9  # where smooth L1 turns from a parabola into a line


def rpn_losses(
    objectness: Float[Array, "*n"],
    deltas: Float[Array, "*n 4"],
    targets: Float[Array, "*n 4"],
    positive: Bool[Array, "*n"],
    real: Bool[Array, "*n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of the region proposal network (Faster R-CNN, Section 3.1.2, Eq. 1).

    Args:
      objectness: logits of sampled anchors.
      deltas: predicted for them.
      targets: deltas to their objects, where they are positive.
      positive: which have an object.
      real: which slots hold an anchor.

    Returns:
      Binary cross-entropy; smooth L1 of the positives' deltas over the number of all.
    """
    count = jnp.maximum(real.sum(dtype=deltas.dtype), 1)
    entropy = optax.sigmoid_binary_cross_entropy(objectness, positive.astype(objectness.dtype))
    distances = jnp.where(positive & real, smooth_l1(deltas - targets).sum(axis=-1), 0)
    return jnp.where(real, entropy, 0).sum() / count, distances.sum() / count


def box_losses(
    class_logits: Float[Array, "*n classes"],
    deltas: Float[Array, "*n classes 4"],
    labels: Int[Array, "*n"],
    targets: Float[Array, "*n 4"],
    real: Bool[Array, "*n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of the box head (Fast R-CNN, ICCV 2015, Eq. 1-3).

    Args:
      class_logits: of sampled regions; class 0 is the background.
      deltas: predicted for every class.
      labels: the regions' classes.
      targets: deltas to their objects, where they have one.
      real: which slots hold a region.

    Returns:
      Cross-entropy; smooth L1 of the true class's deltas over the number of all.
    """
    count = jnp.maximum(real.sum(dtype=deltas.dtype), 1)
    entropy = optax.softmax_cross_entropy_with_integer_labels(class_logits, labels)
    own = jnp.take_along_axis(deltas, labels[..., None, None], axis=-2)[..., 0, :]
    distances = jnp.where((labels > 0) & real, smooth_l1(own - targets).sum(axis=-1), 0)
    return jnp.where(real, entropy, 0).sum() / count, distances.sum() / count


def mask_loss(
    logits: Float[Array, "*n size size classes"],
    labels: Int[Array, "*n"],
    targets: Float[Array, "*n size size"],
    real: Bool[Array, "*n"],
) -> Float[Array, ""]:
    """Of the mask head: binary cross-entropy of the true class (Mask R-CNN, Section 3).

    Args:
      logits: of every class's mask.
      labels: the regions' classes.
      targets: of their masks, between 0 and 1.
      real: which slots hold a region.
    """
    own = jnp.take_along_axis(logits, labels[..., None, None, None], axis=-1)[..., 0]
    entropy = optax.sigmoid_binary_cross_entropy(own, targets).mean(axis=(-2, -1))
    return jnp.where(real, entropy, 0).sum() / jnp.maximum(real.sum(dtype=logits.dtype), 1)


def smooth_l1(difference: Float[Array, "*n"], beta: float = _BETA) -> Float[Array, "*n"]:
    """A parabola up to `beta`, a line of slope 1 from there (Fast R-CNN, Eq. 3)."""
    size = jnp.abs(difference)
    return jnp.where(size < beta, 0.5 * jnp.square(size) / beta, size - 0.5 * beta)
