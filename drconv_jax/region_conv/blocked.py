"""Pure XLA: region by region, one product of one convolution's size at a time.

Runs everywhere and keeps nothing with a factor m in memory beyond the filters themselves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drconv_jax.dtypes import accumulator
from drconv_jax.region_conv.fused import Statics
from drconv_jax.region_conv.products import flat, matrices_of, patches_of
from drconv_jax.region_conv.sharding import varying_like


def forward(statics: Statics, x: Array, filters: Array, index: Array) -> Array:
    """See `fused.Kernel.forward`."""
    patches, matrices = patches_of(x, statics), matrices_of(filters, statics.groups)
    y = multiply(statics.precision, patches, matrices, flat(index))
    return y.reshape(*index.shape, filters.shape[-1])


def backward(
    statics: Statics, x: Array, filters: Array, index: Array, y: Array, dy: Array
) -> tuple[Array, Array, Array]:
    """See `fused.Kernel.backward`."""
    patches, to_input = jax.vjp(lambda x: patches_of(x, statics), x)
    matrices, to_filters = jax.vjp(lambda w: matrices_of(w, statics.groups), filters)
    dy = dy.reshape(*patches.shape[:3], matrices.shape[-1])
    dpatches, dmatrices, scores = multiply_backward(
        statics.precision, patches, matrices, flat(index), dy
    )
    return *to_input(dpatches), *to_filters(dmatrices), scores.reshape(*index.shape, -1)


def multiply(
    precision: Any,
    patches: Float[Array, "batch positions groups taps_in"],
    matrices: Float[Array, "batch regions groups taps_in features"],
    index: Int[Array, "batch positions"],
) -> Float[Array, "batch positions groups features"]:
    """Every position's window times the matrix of its region."""
    own = index[..., None, None]

    def add_region(region: Array, y: Array) -> Array:
        product = _einsum("bpgk,bgkf->bpgf", patches, matrices[:, region], precision)
        return jnp.where(own == region.astype(own.dtype), product, y)

    y = jnp.zeros((*patches.shape[:3], matrices.shape[-1]), accumulator(patches.dtype))
    y = jax.lax.fori_loop(
        0, matrices.shape[1], add_region, varying_like(y, patches, matrices, index)
    )
    return y.astype(patches.dtype)


def multiply_backward(
    precision: Any,
    patches: Float[Array, "batch positions groups taps_in"],
    matrices: Float[Array, "batch regions groups taps_in features"],
    index: Int[Array, "batch positions"],
    dy: Float[Array, "batch positions groups features"],
) -> tuple[
    Float[Array, "batch positions groups taps_in"],
    Float[Array, "batch regions groups taps_in features"],
    Float[Array, "batch positions regions"],
]:
    """The gradients of the windows and the matrices, and every region's score."""
    chosen = index[..., None, None]

    def region_gradients(dpatches: Array, region: Array) -> tuple[Array, tuple[Array, Array]]:
        matrix = matrices[:, region]
        own = jnp.where(chosen == region, dy, jnp.zeros((), dy.dtype))
        product = _einsum("bpgk,bgkf->bpgf", patches, matrix, precision)
        score = (product * dy.astype(product.dtype)).sum(axis=(-1, -2))
        dmatrix = _einsum("bpgk,bpgf->bgkf", patches, own, precision).astype(matrices.dtype)
        dpatches = dpatches + _einsum("bpgf,bgkf->bpgk", own, matrix, precision)
        return dpatches, (dmatrix, score)

    start = jnp.zeros(patches.shape, accumulator(patches.dtype))
    dpatches, (dmatrices, scores) = jax.lax.scan(
        region_gradients,
        varying_like(start, patches, matrices, index, dy),
        jnp.arange(matrices.shape[1], dtype=index.dtype),
    )
    dmatrices, scores = jnp.moveaxis(dmatrices, 0, 1), jnp.moveaxis(scores, 0, -1)
    return dpatches.astype(patches.dtype), dmatrices, scores


def _einsum(equation: str, a: Array, b: Array, precision: Any) -> Array:
    wide = accumulator(a.dtype)

    def product(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=wide)

    if a.dtype == wide:
        return product(a, b)
    # XLA's CPU backend has no batched product of bfloat16 values with a float32 result.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: product(a.astype(wide), b.astype(wide)), default=product
    )
