"""The region proposal network (Ren et al., Faster R-CNN, NeurIPS 2015, Section 3.1)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from drconv_jax.detection.anchors import Anchors
from drconv_jax.detection.boxes import BoxCoder, clip, have_sides
from drconv_jax.detection.nms import nms
from drconv_jax.detection.pyramid import conv
from drconv_jax.models.parts import ConvFactory

CODER = BoxCoder()
"""Of the network's deltas."""

_LEAST_SIDE = 1e-3  # pixels, of a proposal


class Proposals(NamedTuple):
    """Boxes that may hold an object, by falling score.

    Attributes:
      boxes: in pixels.
      scores: from 0 to 1.
      real: which slots hold a box.
    """

    boxes: Float[Array, "*batch count 4"]
    scores: Float[Array, "*batch count"]
    real: Bool[Array, "*batch count"]


class RegionProposalNetwork(nn.Module):
    """Says of every anchor whether there is an object, and where exactly.

    Attributes:
      anchors: those of every level.
      depth: 3×3 convolutions before the two predictions.
      conv: makes them, called as `nn.Conv` is.
      dtype: of the computation.
    """

    anchors: Anchors = Anchors()
    depth: int = 1
    conv: ConvFactory = nn.Conv
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, maps: Sequence[Float[Array, "batch _ _ channels"]]
    ) -> tuple[list[Float[Array, "batch _"]], list[Float[Array, "batch _ 4"]]]:
        """Objectness logits and deltas of the anchors of every level, in float32."""
        (per_position,) = set(self.anchors.at_a_position)
        layers = _Head(per_position, self.depth, self.conv, self.dtype, name="head")
        predicted = [layers(x) for x in maps]
        return [o for o, _ in predicted], [d for _, d in predicted]


class _Head(nn.Module):
    """The layers, which all levels share."""

    anchors: int
    depth: int
    conv: ConvFactory
    dtype: Dtype | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch anchors"], Float[Array, "batch anchors 4"]]:
        made = functools.partial(conv, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype)
        for i in range(self.depth):
            x = nn.relu(made(x, x.shape[-1], f"conv{i}", make=self.conv))
        objectness = made(x, self.anchors, "objectness", kernel=1)
        deltas = made(x, 4 * self.anchors, "deltas", kernel=1)
        # Without it, XLA for TPUs sums the gradients of the two biases over the devices of a mesh
        # before it sums them over positions, which are far more numbers to send.
        objectness, deltas = jax.lax.optimization_barrier((objectness, deltas))
        batch = x.shape[0]
        return (
            objectness.reshape(batch, -1).astype(jnp.float32),
            deltas.reshape(batch, -1, 4).astype(jnp.float32),
        )


def propose(
    objectness: Sequence[Float[Array, " _"]],
    deltas: Sequence[Float[Array, "_ 4"]],
    anchors: Sequence[Float[Array | np.ndarray, "_ 4"]],
    size: Int[Array, " 2"],
    *,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_threshold: float = 0.7,
    score_threshold: float = 0.0,
) -> Proposals:
    """The proposals of one image.

    Args:
      objectness: logits, by level.
      deltas: by level.
      anchors: by level.
      size: the image's height and width, without padding.
      pre_nms_top_n: the best of a level that suppression is given.
      post_nms_top_n: the best of all levels that it leaves.
      nms_threshold: overlap that suppresses, within a level.
      score_threshold: least probability of an object.
    """
    boxes, scores, real = [], [], []
    for level in zip(objectness, deltas, anchors, strict=True):
        logits, best = jax.lax.top_k(level[0], min(pre_nms_top_n, level[0].size))
        candidates = clip(CODER.decode(level[1][best], jnp.asarray(level[2])[best]), size)
        score = jax.nn.sigmoid(logits)
        kept, any_there = nms(
            candidates,
            score,
            nms_threshold,
            limit=post_nms_top_n,
            real=have_sides(candidates, _LEAST_SIDE) & (score >= score_threshold),
        )
        boxes.append(candidates[kept])
        scores.append(score[kept])
        real.append(any_there)
    ranked = jnp.where(jnp.concatenate(real), jnp.concatenate(scores), -1)
    score, best = jax.lax.top_k(ranked, min(post_nms_top_n, ranked.size))
    found = score >= 0
    return Proposals(
        jnp.where(found[:, None], jnp.concatenate(boxes)[best], 0), jnp.maximum(score, 0), found
    )
