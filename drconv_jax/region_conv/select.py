"""Every position times the matrices of all regions, then a select: plain products, nothing else.

For converters that know few operations, such as ONNX's: m times the work of one convolution, in no
loop and no gather, for any batch size.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from drconv_jax.dtypes import accumulator
from drconv_jax.region_conv.products import matrices_of, patches_of
from drconv_jax.region_conv.reference import WithAll
from drconv_jax.region_conv.spec import ConvSpec


def multiply_with_all(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Float[Array, "batch regions *kernel in_per_group features"],
) -> Float[Array, "batch regions *out_spatial features"]:
    """`reference.convolve_with_all` as one product, in float32 or wider."""
    everywhere = jnp.einsum(
        "bpgk,bmgkf->bmpgf",
        patches_of(x, spec.window, spec.groups),
        matrices_of(filters, spec.groups),
        precision=spec.precision,
        preferred_element_type=accumulator(x.dtype),
    )
    out = spec.window.output_shape(x.shape[1:-1])
    return everywhere.reshape(*everywhere.shape[:2], *out, filters.shape[-1])


select = WithAll(multiply_with_all)
