"""MobileFaceNet (Chen et al., CCBR 2018, arXiv 1804.07573), plain or with DRConv."""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax import fast_cpu
from drconv_jax.checks import check_counts
from drconv_jax.models.embedding import PReLU, embedded
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

# Table 1 of the paper: channels; expanded channels of the block with strides 2 and of those
# behind it. The first of the four numbers of blocks is that of the stem's depthwise convolutions.
_STEM_CHANNELS, _STEM_EXPANDED = 64, 128
_STAGES = ((64, 128, 128), (128, 256, 256), (128, 512, 256))


class Block(nn.Module):
    """A bottleneck of expand, depthwise and project, with a shortcut where shapes allow.

    Attributes:
      features: channels of the output.
      expanded: channels inside.
      strides: 1 or 2; with strides 1 the input is added to the output.
      conv: makes the 1x1 convolutions that `placement` names.
      placement: "all", or "last" for the projection alone.
      guide: what the block makes of its input and gives to those convolutions; None leaves a
        guide to each of them.
      dtype: of the computation.
    """

    features: int
    expanded: int
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
        x = first(x, self.expanded, "expand")
        x = PReLU(name="expand_prelu")(norm(x, "expand_norm", train=train, dtype=self.dtype))
        x = depthwise_conv(x, "depthwise", strides=self.strides, dtype=self.dtype)
        x = norm(x, "depthwise_norm", train=train, dtype=self.dtype)
        x = PReLU(name="depthwise_prelu")(x)
        x = last(x, self.features, "project")
        x = norm(x, "project_norm", train=train, dtype=self.dtype)
        return x + shortcut if self.strides == 1 else x


class MobileFaceNet(nn.Module):
    """The network: an embedding of a face, for images of 112x112 pixels.

    Attributes:
      embedding_size: of the embedding, 128 in the paper, often 512; None returns the output of
        the global depthwise convolution.
      num_classes: outputs of a classifier of the embedding; None leaves it out.
      width: multiplies the channels between blocks; those inside of blocks and the last ones
        stay, as with InsightFace's `scale`.
      blocks: in the stem and at strides 4, 8 and 16. One in the stem is a depthwise convolution,
        more are bottlenecks, as in InsightFace.
      conv: makes the blocks' 1x1 convolutions that `placement` names; called as `nn.Conv` is.
      placement, guide: see `Block`.
      dtype: of the computation.
    """

    embedding_size: int | None = 128
    num_classes: int | None = None
    width: float = 1.0
    blocks: Sequence[int] = (1, 4, 6, 2)
    conv: ConvFactory = nn.Conv
    placement: Placement = "all"
    guide: BlockGuide | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width in"],
        *,
        train: bool = False,
        features: bool = False,
    ) -> Float[Array, "batch outputs"] | dict[int, Float[Array, "batch _ _ _"]]:
        """Embeddings, not yet of unit length, or logits with a classifier, or feature maps.

        Args:
          x: images.
          train: whether batch norm uses (and updates) the batch's statistics.
          features: whether to return, instead, the last feature map at every stride (2, 4, 8 and
            16), by stride; nothing behind them is run.
        """
        check_network(x, self.width, self.num_classes)
        check_counts("blocks", self.blocks, 4, least=0)

        def block(x: Array, channels: int, expanded: int, strides: int, name: str) -> Array:
            module = Block(
                round(channels * self.width),
                expanded,
                strides=strides,
                conv=self.conv,
                placement=self.placement,
                guide=self.guide,
                dtype=self.dtype,
                name=name,
            )
            return module(x, train=train)

        def norm_prelu(x: Array, name: str) -> Array:
            x = norm(x, f"{name}_norm", train=train, dtype=self.dtype)
            return PReLU(name=f"{name}_prelu")(x)

        channels = round(_STEM_CHANNELS * self.width)
        x = conv(x, channels, "stem_conv", kernel=3, strides=2, dtype=self.dtype)
        x = norm_prelu(x, "stem")
        in_stem, *in_stages = self.blocks
        if in_stem == 1:
            x = norm_prelu(self._stem_depthwise(x), "stem_depthwise")
        else:
            for i in range(in_stem):
                x = block(x, _STEM_CHANNELS, _STEM_EXPANDED, 1, f"stage0_block{i}")
        stride, maps = 2, {2: x}
        for stage, ((channels, down, inside), count) in enumerate(
            zip(_STAGES, in_stages, strict=True), start=1
        ):
            x = block(x, channels, down, 2, f"stage{stage}_down")
            for i in range(count):
                x = block(x, channels, inside, 1, f"stage{stage}_block{i}")
            stride *= 2
            maps[stride] = x
        if features:
            return maps
        x = embedded(x, self.embedding_size, train=train, dtype=self.dtype)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)

    def _stem_depthwise(self, x: Array) -> Array:
        """64 groups whatever the width: with the paper's width, a depthwise convolution."""
        channels = x.shape[-1]
        if channels <= _STEM_CHANNELS:
            return depthwise_conv(x, "stem_depthwise", dtype=self.dtype)
        return nn.Conv(
            channels,
            (3, 3),
            padding=1,
            feature_group_count=_STEM_CHANNELS,
            use_bias=False,
            dtype=self.dtype,
            conv_general_dilated=fast_cpu.conv_general_dilated,
            name="stem_depthwise",
        )(x)
