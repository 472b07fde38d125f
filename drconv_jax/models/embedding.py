"""Embeddings of faces: MobileFaceNet's head, and networks that end with it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax.checks import check_count
from drconv_jax.models.parts import conv, depthwise_conv, norm

_HEAD_CHANNELS = 512


class PReLU(nn.Module):
    """max(0, x) + slope * min(0, x) with a learnt slope for every channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Applies the activation."""
        slope = self.param("negative_slope", nn.initializers.constant(0.25), (x.shape[-1],))
        slope = jnp.expand_dims(slope.astype(x.dtype), range(x.ndim - 1))
        return jnp.where(x >= 0, x, slope * x)


def embedded(
    x: Float[Array, "batch height width in"],
    size: int | None,
    *,
    train: bool,
    dtype: Dtype | None = None,
) -> Float[Array, "batch size"]:
    """MobileFaceNet's head (Chen et al., CCBR 2018, Section 3.2), within an `nn.compact` call.

    Instead of a mean over positions, which are not alike in a face, it has a depthwise convolution
    as large as the feature map.

    Args:
      x: the last feature map.
      size: of the embedding; None returns the 512 outputs of that convolution.
      train: whether batch norms use (and update) the batch's statistics.
      dtype: of the computation.
    """
    x = conv(x, _HEAD_CHANNELS, "head_conv", dtype=dtype)
    x = PReLU(name="head_prelu")(norm(x, "head_norm", train=train, dtype=dtype))
    whole = (x.shape[1], x.shape[2])
    x = depthwise_conv(x, "global_depthwise", kernel_size=whole, padding=0, dtype=dtype)
    x = norm(x, "global_depthwise_norm", train=train, dtype=dtype)
    x = x.reshape(x.shape[0], x.shape[-1])
    if size is None:
        return x
    check_count("embedding_size", size)
    x = nn.Dense(size, use_bias=False, dtype=dtype, name="embedding")(x)
    return norm(x, "embedding_norm", train=train, dtype=dtype)


class EmbeddingNetwork(nn.Module):
    """An embedding of a face by any network of `drconv_jax.models`.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from drconv_jax.models import EmbeddingNetwork, ShuffleNetV2
      >>> model = EmbeddingNetwork(ShuffleNetV2(width=0.5, stem_strides=(1, 2)))
      >>> x = jnp.ones((1, 112, 112, 3))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
      (1, 128)

    Attributes:
      backbone: a network whose call takes `features=True` and then returns feature maps by stride;
        the last is used.
      embedding_size: of the embedding.
      dtype: of the head's computation.
    """

    backbone: nn.Module
    embedding_size: int = 128
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], *, train: bool = False
    ) -> Float[Array, "batch embedding_size"]:
        """Embeddings, not yet of unit length.

        Args:
          x: images, all of the size of the first: the head is made for it.
          train: whether batch norm uses (and updates) the batch's statistics.
        """
        maps = self.backbone(x, train=train, features=True)
        return embedded(maps[max(maps)], self.embedding_size, train=train, dtype=self.dtype)
