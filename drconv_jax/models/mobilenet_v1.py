"""MobileNetV1 (Howard et al., 2017, arXiv 1704.04861), plain or with DRConv."""

from __future__ import annotations

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax.checks import check_count
from drconv_jax.models.parts import (
    BlockGuide,
    ConvFactory,
    block_convs,
    check_network,
    conv,
    depthwise_conv,
    norm,
    relu6,
    scaled,
)

# Table 1 of the paper: channels, strides of the first block, and blocks of every stage.
STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 2, 6), (1024, 2, 2))
_STEM_CHANNELS = 32


class Block(nn.Module):
    """A depthwise separable convolution (Figure 3 of the paper).

    Attributes:
      features: channels of the output.
      strides: 1 or 2.
      conv: makes the pointwise convolution.
      guide: what the block makes of its input; None leaves the guide to the convolution.
      dtype: of the computation.
    """

    features: int
    strides: int = 1
    conv: ConvFactory = nn.Conv
    guide: BlockGuide | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], *, train: bool = False
    ) -> Float[Array, "batch out_height out_width features"]:
        """Applies the block."""
        _, pointwise = block_convs(x, self.conv, "last", self.guide, self.dtype)
        x = depthwise_conv(x, "depthwise", strides=self.strides, dtype=self.dtype)
        x = relu6(norm(x, "depthwise_norm", train=train, dtype=self.dtype))
        x = pointwise(x, self.features, "pointwise")
        return relu6(norm(x, "pointwise_norm", train=train, dtype=self.dtype))


class MobileNetV1(nn.Module):
    """The network.

    Attributes:
      num_classes: outputs of the classifier; None leaves it out and returns the pooled features.
      width: width multiplier; channels are rounded to multiples of 8.
      conv: makes the pointwise convolutions; called as `nn.Conv` is.
      guide: see `Block`.
      stem_strides: strides of the first convolution; 1 keeps small images large.
      dtype: of the computation.
    """

    num_classes: int | None = 1000
    width: float = 1.0
    conv: ConvFactory = nn.Conv
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
        for stage, (channels, strides, count) in enumerate(STAGES):
            for block in range(count):
                x = Block(
                    scaled(channels * self.width),
                    strides=strides if block == 0 else 1,
                    conv=self.conv,
                    guide=self.guide,
                    dtype=self.dtype,
                    name=f"stage{stage}_block{block}",
                )(x, train=train)
            stride *= strides
            maps[stride] = x
        if features:
            return maps
        x = x.mean(axis=(1, 2))
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
