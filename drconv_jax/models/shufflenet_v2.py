"""ShuffleNetV2 (Ma et al., ECCV 2018, arXiv 1807.11164), plain or with DRConv.

The paper's networks have one argument that DRConv needs: `conv`, what stands where DRConv replaces
a convolution. Here these are the 1x1 convolutions of a block's main branch, as in the authors'
released DR-ShuffleNetV2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax import depthwise

ConvFactory = Callable[..., nn.Module]

# Table 5 of the paper: channels of stages 2, 3, 4 and of the last convolution.
_CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
_STEM_CHANNELS = 24


def channel_shuffle(x: Float[Array, "... channels"], groups: int) -> Float[Array, "... channels"]:
    """Interleaves the channels of `groups` groups (Section 2 of the ShuffleNetV2 paper)."""
    shape = x.shape
    x = x.reshape(*shape[:-1], groups, shape[-1] // groups)
    return jnp.swapaxes(x, -1, -2).reshape(shape)


class Block(nn.Module):
    """One block: basic (strides 1, on half of the channels) or downsampling (strides 2).

    Attributes:
      features: channels of the output.
      strides: 1 or 2.
      conv: makes the 1x1 convolutions of the main branch.
      guide_regions: regions of a guide that the block computes once and gives to both of its
        convolutions, as the released DRConv code does; None leaves the guide to each of them.
      dtype: of the computation.
    """

    features: int
    strides: int = 1
    conv: ConvFactory = nn.Conv
    guide_regions: int | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], *, train: bool = False
    ) -> Float[Array, "batch out_height out_width features"]:
        """Applies the block."""

        def norm(name: str) -> nn.BatchNorm:
            return _norm(name, train, self.dtype)

        half = self.features // 2
        if self.strides == 1:
            shortcut, x = jnp.split(x, 2, axis=-1)
        else:
            shortcut = _depthwise(x, self.strides, "shortcut_depthwise", self.dtype)
            shortcut = norm("shortcut_depthwise_norm")(shortcut)
            shortcut = nn.Conv(
                half, (1, 1), use_bias=False, dtype=self.dtype, name="shortcut_conv"
            )(shortcut)
            shortcut = nn.relu(norm("shortcut_norm")(shortcut))

        guide = {}
        if self.guide_regions is not None:
            features = nn.Conv(
                self.guide_regions, (1, 1), use_bias=False, dtype=self.dtype, name="guide"
            )(x)
            guide = {"guide": features}

        def conv(name: str) -> nn.Module:
            return self.conv(half, (1, 1), use_bias=False, dtype=self.dtype, name=name)

        x = nn.relu(norm("norm1")(conv("conv1")(x, **guide)))
        x = norm("depthwise_norm")(_depthwise(x, self.strides, "depthwise", self.dtype))
        x = nn.relu(norm("norm2")(conv("conv2")(x, **guide)))
        return channel_shuffle(jnp.concatenate([shortcut, x], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """The network.

    Example::

      >>> import functools, jax, jax.numpy as jnp
      >>> from drconv_jax import DRConv
      >>> from drconv_jax.models import ShuffleNetV2
      >>> model = ShuffleNetV2(width=0.5, num_classes=10, conv=functools.partial(DRConv, regions=8))
      >>> x = jnp.ones((1, 64, 64, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> model.apply(variables, x).shape
      (1, 10)

    Attributes:
      num_classes: outputs of the classifier; None leaves it out and returns the pooled features.
      width: width multiplier; 0.5, 1, 1.5 and 2 have the paper's channels, others scale those of 1
        (in multiples of 4).
      blocks: blocks in stages 2, 3 and 4.
      conv: makes the 1x1 convolutions of the blocks' main branches; called as `nn.Conv` is.
      guide_regions: see `Block`.
      stem_strides: strides of the first convolution and of the max pooling behind it; (1, 1) keeps
        small images large, and pooling with strides 1 is left out.
      dtype: of the computation.
    """

    num_classes: int | None = 1000
    width: float = 1.0
    blocks: Sequence[int] = (4, 8, 4)
    conv: ConvFactory = nn.Conv
    guide_regions: int | None = None
    stem_strides: tuple[int, int] = (2, 2)
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], *, train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Logits, or pooled features without a classifier.

        Args:
          x: images.
          train: whether batch norm uses (and updates) the batch's statistics.
        """
        *stages, last = _channels(self.width)
        conv_strides, pool_strides = self.stem_strides
        x = nn.Conv(
            _STEM_CHANNELS,
            (3, 3),
            conv_strides,
            padding=1,
            use_bias=False,
            dtype=self.dtype,
            name="stem_conv",
        )(x)
        x = nn.relu(_norm("stem_norm", train, self.dtype)(x))
        if pool_strides > 1:
            x = nn.max_pool(x, (3, 3), (pool_strides, pool_strides), ((1, 1), (1, 1)))
        for stage, (features, count) in enumerate(zip(stages, self.blocks, strict=True), start=2):
            for block in range(count):
                x = Block(
                    features,
                    strides=2 if block == 0 else 1,
                    conv=self.conv,
                    guide_regions=self.guide_regions,
                    dtype=self.dtype,
                    name=f"stage{stage}_block{block}",
                )(x, train=train)
        x = nn.Conv(last, (1, 1), use_bias=False, dtype=self.dtype, name="head_conv")(x)
        x = nn.relu(_norm("head_norm", train, self.dtype)(x))
        x = x.mean(axis=(1, 2))
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)


def _channels(width: float) -> tuple[int, ...]:
    if width <= 0:
        raise ValueError(f"width must be positive, got {width}.")
    if width in _CHANNELS:
        return _CHANNELS[width]
    *stages, last = _CHANNELS[1.0]
    return (*(max(4, round(c * width / 4) * 4) for c in stages), last)


def _depthwise(x: Array, strides: int, name: str, dtype: Dtype | None) -> Array:
    channels = x.shape[-1]
    convolution = nn.Conv(
        channels,
        (3, 3),
        strides,
        padding=1,
        feature_group_count=channels,
        use_bias=False,
        dtype=dtype,
        conv_general_dilated=depthwise.conv_general_dilated,
        name=name,
    )
    return convolution(x)


def _norm(name: str, train: bool, dtype: Any) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )
