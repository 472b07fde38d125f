"""What the networks share: their plain parts, and what a block gives to a convolution in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax import depthwise

ConvFactory = Callable[..., nn.Module]
"""Makes a convolution, called as `nn.Conv` is: `nn.Conv`, `functools.partial(DRConv, regions=8)`,
`nn.ConvLocal` (the locally connected convolution of DeepFace), `functools.partial(DRConv,
regions=1)` (a dynamic convolution: one filter a sample)."""

Conv = Callable[[Array, int, str], Array]

Placement = Literal["all", "last"]
"""Which 1x1 convolutions of a block the factory makes: all, or the last alone."""


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


def block_convs(
    x: Float[Array, "batch height width in"],
    make: ConvFactory,
    placement: Placement,
    *,
    guide_regions: int | None,
    guide_pool: int,
    dtype: Dtype | None,
) -> tuple[Conv, Conv]:
    """A block's first and last 1x1 convolutions, as functions of an input, features and a name.

    Args:
      x: the block's input, of which its guide is made, as the released DRConv code has it.
      make: makes those convolutions that `placement` names.
      placement: "all" or "last".
      guide_regions: of the guide; None leaves guides to the convolutions themselves.
      guide_pool: the guide is made of the input averaged over squares of this size, whose positions
        then have one region; 1 makes it of the input itself, as the released code does.
      dtype: of the computation.

    Raises:
      ValueError: the placement is unknown, guide_pool is below 1, or there is no guide to pool for.
    """
    if placement not in ("all", "last"):
        raise ValueError(f'placement must be "all" or "last", got {placement!r}.')
    if guide_pool < 1:
        raise ValueError(f"guide_pool must be at least 1, got {guide_pool}.")
    if guide_pool > 1 and guide_regions is None:
        raise ValueError(
            f"guide_pool={guide_pool} needs a block's own guide; give guide_regions too, got None."
        )
    guide = None
    if guide_regions is not None:
        guide = _guide(x, guide_regions, guide_pool, dtype)
    made = functools.partial(conv, make=make, guide=guide, dtype=dtype)
    return made if placement == "all" else functools.partial(conv, dtype=dtype), made


def _guide(
    x: Float[Array, "batch height width in"], regions: int, pool: int, dtype: Dtype | None
) -> Float[Array, "batch height width regions"]:
    if pool == 1:
        return conv(x, regions, "guide", dtype=dtype)
    _, height, width, _ = x.shape
    padding = ((0, -height % pool), (0, -width % pool))
    x = nn.avg_pool(x, (pool, pool), (pool, pool), padding, count_include_pad=False)
    guide = conv(x, regions, "guide", dtype=dtype)
    return guide.repeat(pool, axis=1).repeat(pool, axis=2)[:, :height, :width]


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
