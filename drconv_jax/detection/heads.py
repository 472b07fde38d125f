"""The heads that look at each proposal: its class and box, and its mask."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from drconv_jax.detection.boxes import BoxCoder, clip, have_sides
from drconv_jax.detection.nms import nms
from drconv_jax.detection.pyramid import conv
from drconv_jax.models.parts import ConvFactory

CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))
"""Of the box head's deltas."""

_LEAST_SIDE = 0.01  # pixels, of a detection


class BoxHead(nn.Module):
    """Two layers, and a prediction of class and box (FPN, Section 4.2).

    Attributes:
      classes: with the background, which is class 0.
      features: of the two layers.
      dtype: of the computation.
    """

    classes: int
    features: int = 1024
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, regions: Float[Array, "n height width channels"]
    ) -> tuple[Float[Array, "n classes"], Float[Array, "n classes 4"]]:
        """Class logits, and deltas for every class, in float32."""
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        x = regions.reshape(regions.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = nn.relu(dense(self.features, kernel_init=_uniform, name=name)(x))
        logits = dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="class")(x)
        deltas = dense(4 * self.classes, kernel_init=nn.initializers.normal(0.001), name="deltas")(
            x
        )
        deltas = deltas.reshape(-1, self.classes, 4)
        return logits.astype(jnp.float32), deltas.astype(jnp.float32)


_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class MaskHead(nn.Module):
    """Four convolutions, one to twice the size, and a mask for every class (Mask R-CNN, Figure 4).

    Attributes:
      classes: with the background.
      features: of the convolutions.
      upsampled: features of the convolution to twice the size.
      conv: makes the four, called as `nn.Conv` is.
      group_norm: whether they have group norm.
      dtype: of the computation.
    """

    classes: int
    features: tuple[int, ...] = (256, 256, 256, 256)
    upsampled: int = 256
    conv: ConvFactory = nn.Conv
    group_norm: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, regions: Float[Array, "n size size channels"]
    ) -> Float[Array, "n double_size double_size classes"]:
        """Mask logits, in float32."""
        he = nn.initializers.he_normal()
        x = regions
        for i, features in enumerate(self.features):
            x = nn.relu(
                conv(
                    x, features, f"conv{i}", make=self.conv, kernel_init=he,
                    group_norm=self.group_norm, dtype=self.dtype,
                )
            )  # fmt: skip
        x = nn.relu(_Enlarged(self.upsampled, he, self.dtype, name="upsample")(x))
        return conv(x, self.classes, "logits", kernel=1, kernel_init=he, dtype=self.dtype).astype(
            jnp.float32
        )


class _Enlarged(nn.Module):
    """`nn.ConvTranspose` to twice the size, whose windows do not overlap: it is a product."""

    features: int
    kernel_init: Initializer
    dtype: Dtype | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "n height width channels"]
    ) -> Float[Array, "n double_height double_width features"]:
        shape = (2, 2, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        n, height, width, channels = x.shape
        y = x.reshape(-1, channels) @ kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
        y = y.reshape(n, height, width, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(n, 2 * height, 2 * width, -1) + bias[None, None, None]


def detect(
    class_logits: Float[Array, "n classes"],
    deltas: Float[Array, "n classes 4"],
    proposals: Float[Array, "n 4"],
    real: Bool[Array, " n"],
    size: Int[Array, " 2"],
    *,
    limit: int,
    score_threshold: float,
    nms_threshold: float,
) -> tuple[Float[Array, "limit 4"], Float[Array, " limit"], Int[Array, " limit"]]:
    """The objects of one image: the best of every proposal and class, by falling score.

    Args:
      class_logits: of the box head; class 0 is the background.
      deltas: of the box head.
      proposals: that it was given.
      real: which slots hold a proposal.
      size: the image's height and width, without padding.
      limit: objects at most.
      score_threshold: least probability, which must be exceeded.
      nms_threshold: overlap that suppresses, within a class.

    Returns:
      Boxes, scores, and classes, of which 0 is an empty slot.
    """
    n, classes, _ = deltas.shape
    boxes = CODER.decode(deltas, jnp.broadcast_to(proposals[:, None], deltas.shape))
    boxes = clip(boxes, size)[:, 1:].reshape(-1, 4)
    scores = jax.nn.softmax(class_logits)[:, 1:].reshape(-1)
    labels = jnp.broadcast_to(jnp.arange(1, classes), (n, classes - 1)).reshape(-1)
    candidate = (scores > score_threshold) & have_sides(boxes, _LEAST_SIDE)
    kept, found = nms(
        boxes,
        scores,
        nms_threshold,
        limit=limit,
        groups=labels,
        real=candidate & jnp.repeat(real, classes - 1),
    )
    kept, found = (jnp.pad(a, (0, limit - a.size)) for a in (kept, found))
    return (
        jnp.where(found[:, None], boxes[kept], 0),
        jnp.where(found, scores[kept], 0),
        jnp.where(found, labels[kept], 0),
    )
