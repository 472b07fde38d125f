"""ShuffleNetV2 (Ma et al., ECCV 2018, arXiv 1807.11164), plain or with DRConv.

What DRConv replaces are 1x1 convolutions of a block's main branch: the last one in the DRConv paper
(by its multiply-adds), both in the authors' released DR-ShuffleNetV2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax import fast_cpu
from drconv_jax.checks import check_counts
from drconv_jax.models.parts import (
    BlockGuide,
    ConvFactory,
    Placement,
    block_convs,
    check_network,
    conv,
    depthwise_conv,
    norm,
)

# Table 5 of the paper: channels of the stem, of stages 2, 3, 4 and of the last convolution.
_CHANNELS = {
    0.5: (24, 48, 96, 192, 1024),
    1.0: (24, 116, 232, 464, 1024),
    1.5: (24, 176, 352, 704, 1024),
    2.0: (24, 244, 488, 976, 2048),
}


Layout = Literal["paper", "megvii"]
"""Where channels lie: "paper" shuffles them behind every block, whose branches have half of them
each, as in the paper and torchvision; "megvii" deals them out before every basic block, and the
shortcut of a downsampling block keeps its channels, the main branch making the others, as in
Megvii's code, whose stem and head have biases besides."""


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
      conv: makes the 1x1 convolutions of the main branch that `placement` names.
      placement: "all" (both), or "last".
      guide: what the block makes of the branch's input and gives to those convolutions; None
        leaves a guide to each of them.
      layout: see `Layout`.
      dtype: of the computation.
    """

    features: int
    strides: int = 1
    conv: ConvFactory = nn.Conv
    placement: Placement = "all"
    guide: BlockGuide | None = None
    layout: Layout = "paper"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], *, train: bool = False
    ) -> Float[Array, "batch out_height out_width features"]:
        """Applies the block."""
        dtype, megvii = self.dtype, self.layout == "megvii"
        half = kept = self.features // 2
        if self.strides == 1:
            shortcut, x = (x[..., ::2], x[..., 1::2]) if megvii else jnp.split(x, 2, axis=-1)
        else:
            kept = x.shape[-1] if megvii else half
            shortcut = depthwise_conv(x, "shortcut_depthwise", strides=self.strides, dtype=dtype)
            shortcut = norm(shortcut, "shortcut_depthwise_norm", train=train, dtype=dtype)
            shortcut = conv(shortcut, kept, "shortcut_conv", dtype=dtype)
            shortcut = nn.relu(norm(shortcut, "shortcut_norm", train=train, dtype=dtype))

        first, last = block_convs(x, self.conv, self.placement, self.guide, dtype)
        x = first(x, half, "conv1")
        x = nn.relu(norm(x, "norm1", train=train, dtype=dtype))
        x = depthwise_conv(x, "depthwise", strides=self.strides, dtype=dtype)
        x = norm(x, "depthwise_norm", train=train, dtype=dtype)
        x = last(x, self.features - kept, "conv2")
        x = nn.relu(norm(x, "norm2", train=train, dtype=dtype))
        x = jnp.concatenate([shortcut, x], axis=-1)
        return x if megvii else channel_shuffle(x, 2)


class ShuffleNetV2(nn.Module):
    """The network.

    Example::

      >>> import functools, jax, jax.numpy as jnp
      >>> from drconv_jax import DRConv
      >>> from drconv_jax.models import ShuffleNetV2
      >>> model = ShuffleNetV2(width=0.5, num_classes=10, conv=functools.partial(DRConv, regions=8))
      >>> x = jnp.ones((1, 64, 64, 3))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
      >>> logits.shape
      (1, 10)

    Attributes:
      num_classes: outputs of the classifier; None leaves it out and returns the pooled features.
      width: width multiplier; 0.5, 1, 1.5 and 2 have the paper's channels, others scale those of 1
        (in multiples of 4).
      blocks: blocks in stages 2, 3 and 4.
      conv: makes the blocks' 1x1 convolutions that `placement` names; called as `nn.Conv` is.
      placement, guide: see `Block`.
      stem_strides: strides of the first convolution and of the max pooling behind it; (1, 1) keeps
        small images large, and pooling with strides 1 is left out.
      channels: of the stem, of stages 2, 3 and 4 (even) and of the last convolution; None takes
        those of `width`.
      layout: "paper", or "megvii" for the weights of Megvii's code; see `Layout`.
      dtype: of the computation.
    """

    num_classes: int | None = 1000
    width: float = 1.0
    blocks: Sequence[int] = (4, 8, 4)
    conv: ConvFactory = nn.Conv
    placement: Placement = "all"
    guide: BlockGuide | None = None
    stem_strides: tuple[int, int] = (2, 2)
    channels: Sequence[int] | None = None
    layout: Layout = "paper"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width in"],
        *,
        train: bool = False,
        features: bool = False,
    ) -> Float[Array, "batch outputs"] | dict[int, Float[Array, "batch _ _ _"]]:
        """Logits, or pooled features without a classifier, or feature maps.

        Args:
          x: images.
          train: whether batch norm uses (and updates) the batch's statistics.
          features: whether to return, instead, the last feature map at every stride, by stride;
            nothing behind them is run.
        """
        check_network(x, self.width, self.num_classes)
        check_counts("blocks", self.blocks, 3)
        check_counts("stem_strides", self.stem_strides, 2)
        stem, *stages, last = _channels(self.width, self.channels)
        strides, pool_strides = self.stem_strides
        if self.layout not in ("paper", "megvii"):
            raise ValueError(f'layout must be "paper" or "megvii", got {self.layout!r}.')
        plainly = functools.partial(conv, use_bias=self.layout == "megvii", dtype=self.dtype)
        x = plainly(x, stem, "stem_conv", kernel=3, strides=strides)
        x = nn.relu(norm(x, "stem_norm", train=train, dtype=self.dtype))
        stride, maps = strides, {strides: x}
        if pool_strides > 1:
            x = fast_cpu.max_pool(x, (3, 3), (pool_strides, pool_strides), ((1, 1), (1, 1)))
            stride *= pool_strides
            maps[stride] = x
        for stage, (channels, count) in enumerate(zip(stages, self.blocks, strict=True), start=2):
            for block in range(count):
                x = Block(
                    channels,
                    strides=2 if block == 0 else 1,
                    conv=self.conv,
                    placement=self.placement,
                    guide=self.guide,
                    layout=self.layout,
                    dtype=self.dtype,
                    name=f"stage{stage}_block{block}",
                )(x, train=train)
            stride *= 2
            maps[stride] = x
        if features:
            return maps
        x = plainly(x, last, "head_conv")
        x = nn.relu(norm(x, "head_norm", train=train, dtype=self.dtype))
        x = x.mean(axis=(1, 2))
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)


def _channels(width: float, channels: Sequence[int] | None) -> Sequence[int]:
    if channels is not None:
        check_counts("channels", channels, 5)
        if any(c % 2 for c in channels[1:4]):
            raise ValueError(
                f"channels must be even from the second to the fourth, got {tuple(channels)}."
            )
        return channels
    if width in _CHANNELS:
        return _CHANNELS[width]
    stem, *stages, last = _CHANNELS[1.0]
    return (stem, *(max(4, round(c * width / 4) * 4) for c in stages), last)
