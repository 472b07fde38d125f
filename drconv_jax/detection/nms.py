"""Non-maximum suppression: of boxes that overlap, only the best is kept."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from drconv_jax.detection.boxes import iou
from drconv_jax.region_conv.sharding import varying_like

_BLOCK = 128  # boxes that are decided upon together


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    iou_threshold: float,
    *,
    limit: int | None = None,
    groups: Int[Array, " n"] | None = None,
    real: Bool[Array, " n"] | None = None,
) -> tuple[Int[Array, " limit"], Bool[Array, " limit"]]:
    """The best box, then the best that overlaps none before it too much, and so on.

    Exactly that, whatever overlaps what: blocks of boxes are held against those that are kept
    already, and within a block the rule is repeated until nothing changes, when it holds.

    Args:
      boxes: boxes.
      scores: the higher, the better; of equal ones the first is better.
      iou_threshold: a box is suppressed by one that it overlaps by more.
      limit: how many are kept at most; the search ends with them. None is all.
      groups: boxes of different groups, as of different classes, do not suppress each other.
      real: which boxes there are; None is all.

    Returns:
      Indices of the boxes that are kept, by falling score, and which of the indices are any; the
      others are 0.
    """
    n = boxes.shape[0]
    limit = n if limit is None else min(limit, n)
    if not limit:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, bool)
    if real is not None:
        scores = jnp.where(real, scores, -jnp.inf)
    _, order = jax.lax.top_k(scores, n)
    blocks = -(-n // _BLOCK)
    order = jnp.pad(order, (0, blocks * _BLOCK - n))
    count = jnp.asarray(n, jnp.int32) if real is None else real.sum(dtype=jnp.int32)
    groups = jnp.zeros(n, jnp.int32) if groups is None else groups
    threshold = _rounded_down(iou_threshold)
    earlier = jnp.arange(_BLOCK)[:, None] < jnp.arange(_BLOCK)[None]

    def overlap(a: Int[Array, " a"], b: Int[Array, " b"]) -> Bool[Array, "a b"]:
        same = groups[a][:, None] == groups[b][None]
        return (iou(boxes[a], boxes[b]) > threshold) & same

    def decide(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block, kept, size = state
        candidates = jax.lax.dynamic_slice(order, (block * _BLOCK,), (_BLOCK,))
        free = block * _BLOCK + jnp.arange(_BLOCK) < count
        before = overlap(kept, candidates) & (jnp.arange(limit) < size)[:, None]
        free &= ~before.any(axis=0)
        among = overlap(candidates, candidates) & earlier
        # The first n boxes of a block are right after n turns; chains of overlaps are far shorter.
        keep = _until_constant(lambda keep: free & ~(among & keep[:, None]).any(axis=0), free)
        place = jnp.where(keep, size + jnp.cumsum(keep) - 1, limit)
        kept = kept.at[place].set(candidates, mode="drop")
        return block + 1, kept, jnp.minimum(size + keep.sum(dtype=jnp.int32), limit)

    def undecided(state: tuple[Array, Array, Array]) -> Array:
        block, _, size = state
        return (block * _BLOCK < count) & (size < limit)

    zero = jnp.zeros((), jnp.int32)
    none = varying_like((zero, jnp.zeros(limit, jnp.int32), zero), boxes, scores)
    _, kept, size = jax.lax.while_loop(undecided, decide, none)
    return kept, jnp.arange(limit) < size


def _until_constant(function: Callable[[Array], Array], value: Array) -> Array:
    """Applies a function again and again, until that changes nothing."""

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return function(state[0]), state[0]

    def changes(state: tuple[Array, Array]) -> Array:
        return (state[0] != state[1]).any()

    result: Array = jax.lax.while_loop(changes, again, (function(value), value))[0]
    return result


def _rounded_down(threshold: float) -> np.float32:
    """The largest float32 that is not above it; an overlap exceeds both or neither."""
    nearest = np.float32(threshold)
    return np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > threshold else nearest
