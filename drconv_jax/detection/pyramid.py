"""The feature pyramid (Lin et al., FPN, CVPR 2017), and the convolution that detectors share."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from drconv_jax.models import parts
from drconv_jax.models.parts import ConvFactory

_GROUPS = 32  # of group norm, as in its paper


def conv(
    x: Float[Array, "batch height width in"],
    features: int,
    name: str,
    *,
    kernel: int = 3,
    make: ConvFactory = nn.Conv,
    kernel_init: Initializer,
    group_norm: bool = False,
    dtype: Dtype | None = None,
) -> Float[Array, "batch height width features"]:
    """A convolution with bias, or one with group norm behind it.

    Args:
      x: its input.
      features: channels of its output.
      name: of the module; "_norm" is added for that of the norm.
      kernel: taps a side.
      make: the module.
      kernel_init: of its kernel.
      group_norm: whether it has a norm in place of a bias.
      dtype: of the computation.
    """
    x = parts.conv(
        x,
        features,
        name,
        make=make,
        kernel=kernel,
        use_bias=not group_norm,
        kernel_init=kernel_init,
        dtype=dtype,
    )
    if group_norm:
        x = nn.GroupNorm(math.gcd(_GROUPS, features), dtype=dtype, name=f"{name}_norm")(x)
    return x


class FeaturePyramid(nn.Module):
    """Feature maps of a backbone, made alike in channels and rich in context.

    Attributes:
      features: channels of every level.
      conv: makes its convolutions, called as `nn.Conv` is.
      group_norm: whether its convolutions have group norm.
      dtype: of the computation.
    """

    features: int = 256
    conv: ConvFactory = nn.Conv
    group_norm: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, maps: Sequence[Float[Array, "batch _ _ _"]]
    ) -> list[Float[Array, "batch _ _ features"]]:
        """The pyramid of feature maps that are given from fine to coarse.

        Returns:
          As many levels, and another of half the size of the last, of every second of its
          positions.
        """
        made = functools.partial(
            conv,
            features=self.features,
            make=self.conv,
            kernel_init=nn.initializers.variance_scaling(1, "fan_in", "uniform"),
            group_norm=self.group_norm,
            dtype=self.dtype,
        )
        inner = [made(x, name=f"inner{i}", kernel=1) for i, x in enumerate(maps)]
        for i in reversed(range(len(inner) - 1)):
            inner[i] += _enlarged(inner[i + 1], *inner[i].shape[1:3])
        levels = [made(x, name=f"layer{i}") for i, x in enumerate(inner)]
        return [*levels, levels[-1][:, ::2, ::2]]


def _enlarged(
    x: Float[Array, "batch height width channels"], out_height: int, out_width: int
) -> Float[Array, "batch out_height out_width channels"]:
    """Every position takes the value of the nearest one before it."""
    for axis, length in ((1, out_height), (2, out_width)):
        if length == 2 * x.shape[axis]:
            x = jnp.repeat(x, 2, axis=axis)
        else:
            x = jnp.take(x, np.arange(length) * x.shape[axis] // length, axis=axis)
    return x
