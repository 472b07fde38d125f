"""Every position times the matrices of all regions, then a select: plain products, nothing else.

For converters that know few operations, such as ONNX's: m times the work of one convolution, in no
loop and no gather, for any batch size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import Window
from drconv_jax.guide import guide_mask
from drconv_jax.region_conv.products import matrices_of, patches_of


def select(
    x: Float[Array, "batch *spatial in"],
    filters: Float[Array, "batch regions *kernel in_per_group features"],
    guide_features: Float[Array, "batch *out_spatial regions"],
    window: Window,
    groups: int,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "batch *out_spatial features"]:
    """See `drconv_jax.region_conv.region_conv`."""
    patches = patches_of(x, window, groups)
    matrices = matrices_of(filters, groups)
    everywhere = jnp.einsum(
        "bpgk,bmgkf->bmpgf",
        patches,
        matrices,
        precision=precision,
        preferred_element_type=accumulator(x.dtype),
    )
    batch, regions, positions, *_ = everywhere.shape
    mask = guide_mask(guide_features).astype(everywhere.dtype).reshape(batch, positions, regions)
    y = (everywhere * jnp.moveaxis(mask, -1, 1)[..., None, None]).sum(axis=1)
    return y.astype(x.dtype).reshape(*guide_features.shape[:-1], filters.shape[-1])
