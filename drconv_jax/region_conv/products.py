"""A convolution as products: what every output position reads, times matrices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drconv_jax.region_conv.fused import Statics


def patches_of(x: Array, statics: Statics) -> Float[Array, "batch positions groups taps_in"]:
    """Every output position's window, group by group; for a pointwise window x itself."""
    window, groups = statics.window, statics.groups
    batch, *spatial, channels = x.shape
    if window.is_pointwise:
        return x.reshape(batch, math.prod(spatial), groups, channels // groups)
    out = window.output_shape(spatial)
    x = jax.lax.pad(
        x,
        jnp.zeros((), x.dtype),
        [(0, 0, 0), *((low, high, 0) for low, high in window.padding), (0, 0, 0)],
    )
    taps = []
    for tap in range(math.prod(window.kernel_size)):
        rest, start = tap, list[int]()
        for size, dilation in zip(window.kernel_size[::-1], window.dilation[::-1], strict=True):
            rest, offset = divmod(rest, size)
            start.insert(0, offset * dilation)
        stop = [
            s + (n - 1) * stride + 1
            for s, n, stride in zip(start, out, window.strides, strict=True)
        ]
        taps.append(
            jax.lax.slice(x, (0, *start, 0), (batch, *stop, channels), (1, *window.strides, 1))
        )
    stacked = jnp.stack(taps, axis=-2).reshape(
        batch, math.prod(out), len(taps), groups, channels // groups
    )
    rows = len(taps) * channels // groups
    return jnp.moveaxis(stacked, -2, -3).reshape(batch, math.prod(out), groups, rows)


def matrices_of(
    filters: Array, groups: int
) -> Float[Array, "batch regions groups taps_in features"]:
    """The filters as matrices that multiply `patches_of`, group by group."""
    batch, regions, *kernel, in_per_group, features = filters.shape
    rows = math.prod(kernel) * in_per_group
    split = filters.reshape(batch, regions, rows, groups, features // groups)
    return jnp.moveaxis(split, -2, 2)
