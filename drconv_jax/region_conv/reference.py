"""The definition: convolve everything with all m filters, then keep what the mask names."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drconv_jax.geometry import Window
from drconv_jax.guide import guide_mask
from drconv_jax.region_conv.derivatives import with_gradient
from drconv_jax.region_conv.fused import foldable
from drconv_jax.region_conv.sharding import per_shard


def reference(
    x: Float[Array, "batch *spatial in"],
    filters: Float[Array, "batch regions *kernel in_per_group features"],
    guide_features: Float[Array, "batch *out_spatial regions"],
    window: Window,
    groups: int,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "batch *out_spatial features"]:
    """Eq. 3-5 word for word, m times the work and the memory of one convolution."""

    def select(x: Array, filters: Array, guide_features: Array) -> Array:
        everywhere = _convolve_with_all(x, filters, window, groups, precision)
        mask = guide_mask(guide_features).astype(x.dtype)
        return jnp.einsum("bm...f,b...m->b...f", everywhere, mask)

    return _sample_by_sample(select)(x, filters, guide_features)


def _convolve_with_all(
    x: Array, filters: Array, window: Window, groups: int, precision: jax.lax.PrecisionLike
) -> Float[Array, "batch regions *out_spatial features"]:
    spatial = "DHW"[-len(window.strides) :]

    def convolve(sample: Array, filter: Array) -> Array:
        return jax.lax.conv_general_dilated(
            sample[None],
            filter,
            window.strides,
            window.padding,
            rhs_dilation=window.dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=groups,
            precision=precision,
        )[0]

    return jax.vmap(jax.vmap(convolve, (None, 0)))(x, filters)


def _sample_by_sample(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` with JAX's own gradient, kept on each device's samples in both directions."""

    def gradient(*args: Array) -> tuple[Array, ...]:
        *inputs, _, dy = args
        return jax.vjp(function, *inputs)[1](dy)

    return with_gradient(foldable(per_shard(function)), foldable(per_shard(gradient)), function)
