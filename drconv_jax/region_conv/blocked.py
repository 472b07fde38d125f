"""Pure XLA: region by region, one product of one convolution's size at a time.

Runs everywhere and keeps nothing with a factor m in memory beyond the filters themselves.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from drconv_jax.dtypes import accumulator
from drconv_jax.region_conv.fused import Statics
from drconv_jax.region_conv.products import matrices_of, patches_of
from drconv_jax.region_conv.sharding import varying_like


def forward(statics: Statics, x: Array, filters: Array, index: Array) -> Array:
    """See `fused.Kernel.forward`."""
    patches = patches_of(x, statics)
    matrices = matrices_of(filters, statics.groups)
    chosen = index.reshape(index.shape[0], math.prod(index.shape[1:]))

    def add_region(region: Array, y: Array) -> Array:
        product = _multiply(patches, matrices[:, region], statics)
        return jnp.where((chosen == region.astype(chosen.dtype))[..., None, None], product, y)

    features_per_group = matrices.shape[-1]
    y = jnp.zeros((*chosen.shape, statics.groups, features_per_group), _wide(x))
    y = varying_like(y, x, filters, index)
    y = jax.lax.fori_loop(0, filters.shape[1], add_region, y)
    return y.astype(x.dtype).reshape(*index.shape, filters.shape[-1])


def backward(
    statics: Statics, x: Array, filters: Array, index: Array, y: Array, dy: Array
) -> tuple[Array, Array, Array]:
    """See `fused.Kernel.backward`."""
    patches, to_input = jax.vjp(lambda x: patches_of(x, statics), x)
    matrices, to_filters = jax.vjp(lambda w: matrices_of(w, statics.groups), filters)
    chosen = index.reshape(index.shape[0], math.prod(index.shape[1:]))
    dy = dy.reshape(*chosen.shape, statics.groups, dy.shape[-1] // statics.groups)

    def region_gradients(dpatches: Array, region: Array) -> tuple[Array, tuple[Array, Array]]:
        matrix = matrices[:, region]
        own = jnp.where(
            (chosen == region.astype(chosen.dtype))[..., None, None], dy, jnp.zeros((), dy.dtype)
        )
        product = _multiply(patches, matrix, statics)
        score = (product * dy.astype(product.dtype)).sum(axis=(-1, -2))
        dmatrix = _einsum("bpgk,bpgf->bgkf", patches, own, statics).astype(filters.dtype)
        dpatches = dpatches + _einsum("bpgf,bgkf->bpgk", own, matrix, statics)
        return dpatches, (dmatrix, score)

    dpatches, (dmatrices, scores) = jax.lax.scan(
        region_gradients,
        varying_like(jnp.zeros(patches.shape, _wide(x)), x, filters, index, dy),
        jnp.arange(filters.shape[1], dtype=index.dtype),
    )
    (dx,) = to_input(dpatches.astype(x.dtype))
    (dfilters,) = to_filters(jnp.moveaxis(dmatrices, 0, 1))
    return dx, dfilters, jnp.moveaxis(scores, 0, -1).reshape(*index.shape, filters.shape[1])


def _multiply(patches: Array, matrix: Array, statics: Statics) -> Array:
    return _einsum("bpgk,bgkf->bpgf", patches, matrix, statics)


def _einsum(equation: str, a: Array, b: Array, statics: Statics) -> Array:
    wide = _wide(a)

    def product(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=statics.precision, preferred_element_type=wide)

    if a.dtype == wide:
        return product(a, b)
    # XLA's CPU backend has no batched product of bfloat16 values with a float32 result.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: product(a.astype(wide), b.astype(wide)), default=product
    )


def _wide(values: Array) -> jnp.dtype:
    return accumulator(values.dtype)
