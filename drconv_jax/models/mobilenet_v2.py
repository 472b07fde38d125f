"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv 1801.04381), plain or with DRConv."""

from __future__ import annotations

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax.checks import check_count
from drconv_jax.models.parts import (
    BlockGuide,
    ConvFactory,
    Placement,
    block_convs,
    check_network,
    conv,
    depthwise_conv,
    norm,
    relu6,
    scaled,
)

# Table 2 of the paper: expansion, channels, blocks, and strides of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM_CHANNELS, _LAST_CHANNELS = 32, 1280


class Block(nn.Module):
    """An inverted residual with a linear bottleneck (Figure 4 of the paper).

    Attributes:
      features: channels of the output.
      expansion: how many times as many channels are inside as go in; 1 leaves that layer out.
      strides: 1 or 2.
      conv: makes the 1x1 convolutions that `placement` names.
      placement: "all", or "last" for the projection alone.
      guide: what the block makes of its input and gives to those convolutions; None leaves a
        guide to each of them.
      dtype: of the computation.
    """

    features: int
    expansion: int
    strides: int = 1
    conv: ConvFactory = nn.Conv
    placement: Placement = "all"
    guide: BlockGuide | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], *, train: bool = False
    ) -> Float[Array, "batch out_height out_width features"]:
        """Applies the block."""
        first, last = block_convs(x, self.conv, self.placement, self.guide, self.dtype)
        shortcut = x
        if self.expansion > 1:
            x = first(x, self.expansion * x.shape[-1], "expand")
            x = relu6(norm(x, "expand_norm", train=train, dtype=self.dtype))
        x = depthwise_conv(x, "depthwise", strides=self.strides, dtype=self.dtype)
        x = relu6(norm(x, "depthwise_norm", train=train, dtype=self.dtype))
        x = last(x, self.features, "project")
        x = norm(x, "project_norm", train=train, dtype=self.dtype)
        return x + shortcut if x.shape == shortcut.shape else x


class MobileNetV2(nn.Module):
    """The network.

    Attributes:
      num_classes: outputs of the classifier; None leaves it out and returns the pooled features.
      width: width multiplier; channels are rounded to multiples of 8, and those of the last
        convolution grow with it but do not shrink.
      conv: makes the blocks' 1x1 convolutions that `placement` names; called as `nn.Conv` is.
      placement, guide: see `Block`.
      stem_strides: strides of the first convolution; 1 keeps small images large.
      dtype: of the computation.
    """

    num_classes: int | None = 1000
    width: float = 1.0
    conv: ConvFactory = nn.Conv
    placement: Placement = "all"
    guide: BlockGuide | None = None
    stem_strides: int = 2
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
        check_count("stem_strides", self.stem_strides)
        x = conv(
            x,
            scaled(_STEM_CHANNELS * self.width),
            "stem_conv",
            kernel=3,
            strides=self.stem_strides,
            dtype=self.dtype,
        )
        x = relu6(norm(x, "stem_norm", train=train, dtype=self.dtype))
        stride, maps = self.stem_strides, {self.stem_strides: x}
        for stage, (expansion, channels, count, strides) in enumerate(STAGES):
            for block in range(count):
                x = Block(
                    scaled(channels * self.width),
                    expansion,
                    strides=strides if block == 0 else 1,
                    conv=self.conv,
                    placement=self.placement,
                    guide=self.guide,
                    dtype=self.dtype,
                    name=f"stage{stage}_block{block}",
                )(x, train=train)
            stride *= strides
            maps[stride] = x
        if features:
            return maps
        last = scaled(_LAST_CHANNELS * max(1.0, self.width))
        x = conv(x, last, "head_conv", dtype=self.dtype)
        x = relu6(norm(x, "head_norm", train=train, dtype=self.dtype))
        x = x.mean(axis=(1, 2))
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
