"""What the networks share: their plain parts, and what a block gives to a convolution in it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax import depthwise
from drconv_jax.guide import grid_features

ConvFactory = Callable[..., nn.Module]
"""Makes a convolution, called as `nn.Conv` is: `nn.Conv`, `functools.partial(DRConv, regions=8)`,
`nn.ConvLocal` (the locally connected convolution of DeepFace), `functools.partial(DRConv,
regions=1)` (a dynamic convolution: one filter a sample)."""

Conv = Callable[[Array, int, str], Array]

Placement = Literal["all", "last"]
"""Which 1x1 convolutions of a block the factory makes: all, or the last alone."""

GRID_PACE = 0.0625
"""Scales the convolution of a guide that starts as a grid: regions then move slowly, and filters
can follow. docs/ablation/lessons.md has what other values gave."""


def conv(
    x: Float[Array, "batch height width in"],
    features: int,
    name: str,
    *,
    make: ConvFactory = nn.Conv,
    kernel: int = 1,
    strides: int = 1,
    use_bias: bool = False,
    dtype: Dtype | None = None,
    guide: Float[Array, "batch guide_height guide_width regions"] | None = None,
) -> Float[Array, "batch out_height out_width features"]:
    """A convolution, zero-padded by half of its kernel on every side.

    Args:
      x: its input.
      features: channels of its output.
      name: of the module.
      make: the module.
      kernel, strides: in both dimensions.
      use_bias: whether it has a bias.
      dtype: of the computation.
      guide: given to the module besides x, if any.
    """
    module = make(
        features,
        (kernel, kernel),
        strides,
        padding=kernel // 2,
        use_bias=use_bias,
        dtype=dtype,
        name=name,
    )
    result: Array = module(x) if guide is None else module(x, guide=guide)
    return result


def depthwise_conv(
    x: Float[Array, "batch height width in"],
    name: str,
    *,
    kernel_size: tuple[int, int] = (3, 3),
    strides: int = 1,
    padding: int = 1,
    dtype: Dtype | None = None,
) -> Float[Array, "batch out_height out_width in"]:
    """A depthwise convolution without bias, fast on CPUs too."""
    channels = x.shape[-1]
    module = nn.Conv(
        channels,
        kernel_size,
        strides,
        padding=padding,
        feature_group_count=channels,
        use_bias=False,
        dtype=dtype,
        conv_general_dilated=depthwise.conv_general_dilated,
        name=name,
    )
    return module(x)


def norm(
    x: Float[Array, "*batch channels"], name: str, *, train: bool, dtype: Dtype | None = None
) -> Float[Array, "*batch channels"]:
    """Batch norm with the statistics' momentum and the epsilon of the public networks."""
    module = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )
    return module(x)


@dataclasses.dataclass(frozen=True)
class BlockGuide:
    """How a block makes a guide of its input, for all of its DRConvs, as the released code does.

    Attributes:
      regions: m, that of the DRConvs.
      pool: averages the input over squares of this size, whose positions then have one region and
        cost one; 1 is the released code's.
      start: "random", the released code's, whose regions are those of a random 1x1 convolution; or
        "grid", whose regions are at first the cells of a grid over the image and then move as far
        as is learned. It scales that convolution by `GRID_PACE`, which makes its steps
        `GRID_PACE` squared as large.

    Raises:
      ValueError: a number is below 1, or the start is unknown.
    """

    regions: int = 8
    pool: int = 1
    start: str = "random"

    def __post_init__(self) -> None:
        for name in ("regions", "pool"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} of a BlockGuide must be at least 1, got {value}.")
        if self.start not in ("random", "grid"):
            raise ValueError(
                f'start of a BlockGuide must be "random" or "grid", got {self.start!r}.'
            )

    def __call__(
        self, x: Float[Array, "batch height width in"], dtype: Dtype | None = None
    ) -> Float[Array, "batch height width regions"]:
        """Guide features of a block's input, by a convolution named "guide"."""
        _, height, width, _ = x.shape
        if self.pool > 1:
            padding = ((0, -height % self.pool), (0, -width % self.pool))
            squares = (self.pool, self.pool)
            x = nn.avg_pool(x, squares, squares, padding, count_include_pad=False)
        if self.start == "random":
            guide = conv(x, self.regions, "guide", dtype=dtype)
        else:
            make = functools.partial(nn.Conv, kernel_init=nn.initializers.zeros)
            moved = GRID_PACE * conv(x, self.regions, "guide", make=make, dtype=dtype)
            grid = grid_features(x.shape[1], x.shape[2], self.regions)
            guide = moved + grid.astype(moved.dtype)[None]
        if self.pool > 1:
            guide = guide.repeat(self.pool, axis=1).repeat(self.pool, axis=2)
        return guide[:, :height, :width]


def block_convs(
    x: Float[Array, "batch height width in"],
    make: ConvFactory,
    placement: Placement,
    guide: BlockGuide | None,
    dtype: Dtype | None,
) -> tuple[Conv, Conv]:
    """A block's first and last 1x1 convolutions, as functions of an input, features and a name.

    Args:
      x: the block's input, of which its guide is made.
      make: makes those convolutions that `placement` names.
      placement: "all" or "last".
      guide: given to those; None leaves guides to the convolutions themselves.
      dtype: of the computation.

    Raises:
      ValueError: the placement is unknown.
    """
    if placement not in ("all", "last"):
        raise ValueError(f'placement must be "all" or "last", got {placement!r}.')
    features = None if guide is None else guide(x, dtype)
    made = functools.partial(conv, make=make, guide=features, dtype=dtype)
    return made if placement == "all" else functools.partial(conv, dtype=dtype), made


def scaled(channels: float, divisor: int = 8) -> int:
    """Channels rounded to a multiple of `divisor`, at least one and never below nine tenths.

    The rule of the MobileNets' public code, which torchvision and timm follow.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def check_width(width: float) -> None:
    """Raises ValueError where a width multiplier is not positive."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}.")


def relu6(x: Array) -> Array:
    """min(max(x, 0), 6), the MobileNets' activation."""
    return jnp.minimum(nn.relu(x), 6)
