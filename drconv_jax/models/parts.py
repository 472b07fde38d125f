"""What the networks share: their plain parts, and what a block gives to a convolution in it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from drconv_jax import fast_cpu
from drconv_jax.checks import check_count
from drconv_jax.guide import grid_features

ConvFactory = Callable[..., nn.Module]
"""Makes a convolution, called as `nn.Conv` is: `nn.Conv`, `functools.partial(DRConv, regions=8)`,
`nn.ConvLocal` (the locally connected convolution of DeepFace), `functools.partial(DRConv,
regions=1)` (a dynamic convolution: one filter a sample)."""

GuideFor = Callable[[nn.Module], Array | None]
"""Makes the guide features that a convolution is given, None where it takes none."""

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
    kernel_init: Initializer | None = None,
    dtype: Dtype | None = None,
    guide: GuideFor | None = None,
) -> Float[Array, "batch out_height out_width features"]:
    """A convolution, zero-padded by half of its kernel on every side; nn.Conv is fast on CPUs too.

    Args:
      x: its input.
      features: channels of its output.
      name: of the module.
      make: the module.
      kernel, strides: in both dimensions.
      use_bias: whether it has a bias.
      kernel_init: of its kernel; None is the module's own.
      dtype: of the computation.
      guide: makes the guide features that the module is given besides x.
    """
    if make is nn.Conv:
        make = functools.partial(nn.Conv, conv_general_dilated=fast_cpu.conv_general_dilated)
    if kernel_init is not None:
        make = functools.partial(make, kernel_init=kernel_init)
    module = make(
        features,
        (kernel, kernel),
        strides,
        padding=kernel // 2,
        use_bias=use_bias,
        dtype=dtype,
        name=name,
    )
    features_of_guide = None if guide is None else guide(module)
    result: Array = module(x) if features_of_guide is None else module(x, guide=features_of_guide)
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
        conv_general_dilated=fast_cpu.conv_general_dilated,
        name=name,
    )
    return module(x)


def norm(
    x: Float[Array, "*batch channels"], name: str, *, train: bool, dtype: Dtype | None = None
) -> Float[Array, "*batch channels"]:
    """Batch norm with the statistics' momentum and the epsilon of the public networks."""
    module = fast_cpu.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )
    return module(x)


@dataclasses.dataclass(frozen=True)
class BlockGuide:
    """How a block makes a guide of its input, for all of its DRConvs, as the released code does.

    It is made for convolutions that take one: whose call has an argument `guide`, and that say in
    an attribute how many `regions` they have, unless this does. `nn.Conv` has none.

    Attributes:
      regions: m; None takes that of the convolutions that are guided.
      pool: averages the input over squares of this size, whose positions then have one region and
        cost one; 1 is the released code's.
      start: "random", the released code's, whose regions are those of a random 1x1 convolution; or
        "grid", whose regions are at first the cells of a grid over the image and then move as far
        as is learned. It scales that convolution by `GRID_PACE`, which makes its steps
        `GRID_PACE` squared as large.

    Raises:
      TypeError: a number is no integer.
      ValueError: a number is below 1, or the start is unknown.
    """

    regions: int | None = None
    pool: int = 1
    start: str = "random"

    def __post_init__(self) -> None:
        if self.regions is not None:
            check_count("regions of a BlockGuide", self.regions)
        check_count("pool of a BlockGuide", self.pool)
        if self.start not in ("random", "grid"):
            raise ValueError(
                f'start of a BlockGuide must be "random" or "grid", got {self.start!r}.'
            )

    def regions_for(self, convolution: Any) -> int | None:
        """The number of regions of the guide that a convolution is given; None gives it none.

        Raises:
          ValueError: the convolution has another number of regions than this guide.
        """
        parameters = inspect.signature(convolution).parameters
        if "guide" not in parameters:
            return None
        own: int | None = getattr(convolution, "regions", None)
        if None not in (own, self.regions) and own != self.regions:
            raise ValueError(
                f"BlockGuide(regions={self.regions}) does not fit a {type(convolution).__name__} "
                f"with regions={own}; leave out the guide's number, or make the convolution by "
                f"conv=functools.partial(DRConv, regions={self.regions})."
            )
        regions = self.regions if own is None else own
        required = parameters["guide"].default is inspect.Parameter.empty
        if regions is None and required:
            raise ValueError(
                f"{type(convolution).__name__} needs a guide and does not say of how many regions; "
                "say it by guide=BlockGuide(regions)."
            )
        return regions

    def __call__(
        self, x: Float[Array, "batch height width in"], regions: int, dtype: Dtype | None = None
    ) -> Float[Array, "batch height width regions"]:
        """Guide features of a block's input, by a convolution named "guide"."""
        _, height, width, _ = x.shape
        if self.pool > 1:
            padding = ((0, -height % self.pool), (0, -width % self.pool))
            squares = (self.pool, self.pool)
            x = nn.avg_pool(x, squares, squares, padding, count_include_pad=False)
        if self.start == "random":
            guide = conv(x, regions, "guide", dtype=dtype)
        else:
            make = functools.partial(nn.Conv, kernel_init=nn.initializers.zeros)
            moved = GRID_PACE * conv(x, regions, "guide", make=make, dtype=dtype)
            grid = grid_features(x.shape[1], x.shape[2], regions)
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
      guide: makes what those are given that take a guide; None leaves guides to the convolutions
        themselves.
      dtype: of the computation.

    Raises:
      ValueError: the placement is unknown.
    """
    if placement not in ("all", "last"):
        raise ValueError(f'placement must be "all" or "last", got {placement!r}.')
    made = functools.partial(conv, make=make, dtype=dtype)
    if guide is not None:

        @functools.cache
        def shared(regions: int | None) -> Array | None:
            return None if regions is None else guide(x, regions, dtype)

        made = functools.partial(made, guide=lambda module: shared(guide.regions_for(module)))
    return made if placement == "all" else functools.partial(conv, dtype=dtype), made


def scaled(channels: float, divisor: int = 8) -> int:
    """Channels rounded to a multiple of `divisor`, at least one and never below nine tenths.

    The rule of the MobileNets' public code, which torchvision and timm follow.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def check_network(x: Any, width: Any, num_classes: Any) -> None:
    """Raises where a network's input is no batch of images, or a field of all networks is wrong.

    Raises:
      TypeError: the width is no number, or num_classes no integer.
      ValueError: the images have another shape, or a number is too small.
    """
    if x.ndim != 4 or 0 in x.shape[1:]:
        hint = "; for a single image, give x[None]" if x.ndim == 3 else ""
        raise ValueError(
            f"x must be images of shape (batch, height, width, channels), got shape "
            f"{x.shape}{hint}."
        )
    if isinstance(width, bool) or not isinstance(width, numbers.Real):
        raise TypeError(f"width must be a number, got {width!r}.")
    if not 0 < float(width) < math.inf:
        raise ValueError(
            f"width must be positive{' and finite' * (width == math.inf)}, got {width}."
        )
    if num_classes is not None:
        check_count("num_classes", num_classes)


def relu6(x: Array) -> Array:
    """min(max(x, 0), 6), the MobileNets' activation."""
    return jnp.minimum(nn.relu(x), 6)
