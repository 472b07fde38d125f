"""The definition: convolve everything with all m filters, then keep what the mask names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drconv_jax.geometry import Window
from drconv_jax.guide import guide_mask


def reference(
    x: Float[Array, "batch *spatial in"],
    filters: Float[Array, "batch regions *kernel in_per_group features"],
    guide_features: Float[Array, "batch *out_spatial regions"],
    window: Window,
    groups: int,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "batch *out_spatial features"]:
    """Eq. 3-5 word for word, m times the work and the memory of one convolution."""
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

    all_regions = jax.vmap(jax.vmap(convolve, (None, 0)))(x, filters)
    mask = guide_mask(guide_features).astype(x.dtype)
    return jnp.einsum("bm...f,b...m->b...f", all_regions, mask)
