"""A depthwise convolution that is fast on CPUs too.

XLA's CPU backend takes ten to fifty times as long for a depthwise convolution as for the same sum
written as one multiply-add of the whole input per tap. Elsewhere XLA's own convolution is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import Window, dilate, pad_in_reach, tap_views


def conv_general_dilated(
    lhs: Num[Array, "batch *spatial in"],
    rhs: Num[Array, "*kernel in_per_group features"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Num[Array, "batch *out_spatial features"]:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv`'s argument of that name.

    On a CPU, a depthwise convolution (as many groups as channels and features) without input
    dilation is a sum of shifted products, taken in float32 or wider; anything else, and every
    other platform, is left to XLA, but for padding that its CPU backend gets wrong
    (`geometry.pad_in_reach`).

    Example::

      >>> from flax import linen as nn
      >>> from drconv_jax import depthwise
      >>> layer = nn.Conv(
      ...     32,
      ...     (3, 3),
      ...     feature_group_count=32,
      ...     conv_general_dilated=depthwise.conv_general_dilated,
      ... )

    Args:
      lhs: the input, channels last.
      rhs: the kernel, one input channel per group.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        options: as in `jax.lax.conv_general_dilated`; `dimension_numbers` those of
        `flax.linen.Conv`, channels last.

    Returns:
      The output, in the dtype of `lhs`.
    """
    *kernel_size, in_per_group, features = rhs.shape
    dilation = tuple(rhs_dilation or (1,) * len(kernel_size))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    if not isinstance(padding, str) and any(
        not 0 <= side < e for pair, e in zip(padding, extent, strict=True) for side in pair
    ):
        lhs, padding = pad_in_reach(dilate(lhs, lhs_dilation), padding, extent)
        lhs_dilation = None

    def by_xla(lhs: Array, rhs: Array) -> Array:
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            **options,
        )

    depthwise = in_per_group == 1 and features == feature_group_count
    dilated = lhs_dilation is not None and any(d != 1 for d in lhs_dilation)
    other_result = options.get("preferred_element_type") not in (None, lhs.dtype)
    if not depthwise or dilated or other_result or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return by_xla(lhs, rhs)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:-1], extent, window_strides, padding)
    pairs = tuple((low, high) for low, high in padding)
    window = Window(tuple(kernel_size), tuple(window_strides), pairs, dilation)
    return jax.lax.platform_dependent(
        lhs, rhs, cpu=functools.partial(_shifted_products, window=window), default=by_xla
    )


def _shifted_products(x: Array, kernel: Array, *, window: Window) -> Array:
    wide = accumulator(x.dtype)
    weights = kernel.astype(wide).reshape(-1, kernel.shape[-1])
    products = (
        view.astype(wide) * jnp.expand_dims(tap, range(x.ndim - 1))
        for view, tap in zip(tap_views(x, window), weights, strict=True)
    )
    return functools.reduce(jnp.add, products).astype(x.dtype)
