"""A convolution as products: what every output position reads, times matrices."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drconv_jax.geometry import Window, tap_views
from drconv_jax.guide import region_index


def patches_of(
    x: Array, window: Window, groups: int
) -> Float[Array, "batch positions groups taps_in"]:
    """Every output position's window, group by group; for a pointwise window x itself."""
    batch, *spatial, channels = x.shape
    if window.is_pointwise:
        return x.reshape(batch, math.prod(spatial), groups, channels // groups)
    taps = tap_views(x, window)
    positions = math.prod(taps[0].shape[1:-1])
    stacked = jnp.stack(taps, axis=-2).reshape(
        batch, positions, len(taps), groups, channels // groups
    )
    rows = len(taps) * channels // groups
    return jnp.moveaxis(stacked, -2, -3).reshape(batch, positions, groups, rows)


def matrices_of(
    filters: Array, groups: int
) -> Float[Array, "batch regions groups taps_in features"]:
    """The filters as matrices that multiply `patches_of`, group by group."""
    batch, regions, *kernel, in_per_group, features = filters.shape
    rows = math.prod(kernel) * in_per_group
    split = filters.reshape(batch, regions, rows, groups, features // groups)
    return jnp.moveaxis(split, -2, 2)


def flat_regions(
    guide_features: Float[Array, "batch *out_spatial regions"],
) -> Int[Array, "batch positions"]:
    """The regions of a sample's positions in one row."""
    index = region_index(guide_features)
    return index.reshape(index.shape[0], math.prod(index.shape[1:]))
