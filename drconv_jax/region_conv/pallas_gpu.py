"""The GPU's kernels (Triton): one program for every block of results."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from drconv_jax.region_conv.pallas import check_dtype, interpreted_on_cpu
from drconv_jax.region_conv.products import Products
from drconv_jax.region_conv.spec import ConvSpec
from drconv_jax.region_conv.triton_blocks import (
    block_of,
    check_triton,
    dot,
    load,
    span,
    store,
    struct,
    triton,
)

_POSITIONS = 64


def multiply(
    precision: Any,
    patches: Float[Array, "batch positions groups taps_in"],
    matrices: Float[Array, "batch regions groups taps_in features"],
    index: Int[Array, "batch positions"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch positions groups features"]:
    """y[p] = patches[p] @ matrices[index[p]] in every group."""
    batch, positions, groups, _ = patches.shape
    features = matrices.shape[-1]
    y = struct((batch, positions, groups, features), patches.dtype, patches)
    grid = (batch, groups, pl.cdiv(positions, _POSITIONS), pl.cdiv(features, block_of(features)))
    return _call(_forward_kernel, grid, (patches, matrices, index), y, precision, interpret)


def _forward_kernel(precision: Any, x: Any, matrices: Any, index: Any, y: Any) -> None:
    """A block of positions by features: x W over the regions present among the positions."""
    b, g, tile, f = (pl.program_id(axis) for axis in range(4))
    regions, _, rows, features = matrices.shape[1:]
    at, inside = span(tile, _POSITIONS, x.shape[1])
    columns, real_columns = span(f, block_of(features), features)
    chosen = triton.load(index.at[b, at], mask=inside, other=-1)

    def add_region(j: Array, total: Array) -> Array:
        own = chosen == j

        def add_rows(k: Array, total: Array) -> Array:
            channels, real = span(k, block_of(rows), rows)
            ours = load(x.at[b, at, g, channels], own, real)
            matrix = load(matrices.at[b, j, g, channels, columns], real, real_columns)
            return total + dot(ours, matrix, precision)

        def add(total: Array) -> Array:
            return jax.lax.fori_loop(0, pl.cdiv(rows, block_of(rows)), add_rows, total)

        return jax.lax.cond(_any(own), add, lambda total: total, total)

    zero = jnp.zeros((_POSITIONS, block_of(features)), jnp.float32)
    total = jax.lax.fori_loop(0, regions, add_region, zero)
    store(y.at[b, at, g, columns], total, inside, real_columns)


def multiply_backward(
    precision: Any,
    patches: Float[Array, "batch positions groups taps_in"],
    matrices: Float[Array, "batch regions groups taps_in features"],
    index: Int[Array, "batch positions"],
    dy: Float[Array, "batch positions groups features"],
    *,
    interpret: bool = False,
) -> tuple[
    Float[Array, "batch positions groups taps_in"],
    Float[Array, "batch regions groups taps_in features"],
    Float[Array, "batch positions regions"],
]:
    """The gradients of `forward`, and scores[p, j] = <dy[p], patches[p] @ matrices[j]>."""
    batch, positions = index.shape
    regions, groups, rows, features = matrices.shape[1:]
    arguments = (patches, matrices, index, dy)
    dpatches, scores = _call(
        _positions_kernel,
        (batch, pl.cdiv(positions, _POSITIONS), regions),
        arguments,
        (
            struct(patches.shape, patches.dtype, patches),
            struct((batch, regions, positions), jnp.float32, patches),
        ),
        precision,
        interpret,
    )
    blocks = (pl.cdiv(rows, block_of(rows)), pl.cdiv(features, block_of(features)))
    dmatrices = _call(
        _matrices_kernel,
        (batch, regions, groups, *blocks),
        (patches, index, dy),
        struct(matrices.shape, matrices.dtype, patches),
        precision,
        interpret,
    )
    return dpatches, dmatrices, jnp.moveaxis(scores, 1, -1)


def _positions_kernel(
    precision: Any, x: Any, matrices: Any, index: Any, dy: Any, dx: Any, scores: Any
) -> None:
    """A block of positions and one region: dy W^T, its scores, and dx where it was chosen."""
    b, tile, j = (pl.program_id(axis) for axis in range(3))
    groups, rows, features = matrices.shape[2:]
    at, inside = span(tile, _POSITIONS, x.shape[1])
    own = triton.load(index.at[b, at], mask=inside, other=-1) == j
    blocks = jnp.int32(pl.cdiv(rows, block_of(rows)))

    def add_block(block: Array, score: Array) -> Array:
        g, k = jax.lax.div(block, blocks), jax.lax.rem(block, blocks)
        channels, real = span(k, block_of(rows), rows)

        def add_columns(f: Array, total: Array) -> Array:
            columns, real_columns = span(f, block_of(features), features)
            ours = load(dy.at[b, at, g, columns], inside, real_columns)
            matrix = load(matrices.at[b, j, g, channels, columns], real, real_columns)
            return total + dot(ours, matrix.T, precision)

        product = jax.lax.fori_loop(
            0,
            pl.cdiv(features, block_of(features)),
            add_columns,
            jnp.zeros((_POSITIONS, block_of(rows)), jnp.float32),
        )
        store(dx.at[b, at, g, channels], product, own, real)
        here = load(x.at[b, at, g, channels], inside, real)
        return score + (product * here.astype(jnp.float32)).sum(axis=1)

    zero = jnp.zeros((_POSITIONS,), jnp.float32)
    score = jax.lax.fori_loop(0, groups * blocks, add_block, zero)
    triton.store(scores.at[b, j, at], score, mask=inside)


def _matrices_kernel(precision: Any, x: Any, index: Any, dy: Any, dmatrices: Any) -> None:
    """A block of one region's filter: x^T dy over the positions that chose the region."""
    b, j, g, k, f = (pl.program_id(axis) for axis in range(5))
    rows, features = dmatrices.shape[-2:]
    channels, real = span(k, block_of(rows), rows)
    columns, real_columns = span(f, block_of(features), features)

    def add_tile(tile: Array, total: Array) -> Array:
        at, inside = span(tile, _POSITIONS, x.shape[1])
        own = triton.load(index.at[b, at], mask=inside, other=-1) == j

        def add(total: Array) -> Array:
            ours = load(x.at[b, at, g, channels], own, real)
            theirs = load(dy.at[b, at, g, columns], own, real_columns)
            return total + dot(ours.T, theirs, precision)

        return jax.lax.cond(_any(own), add, lambda total: total, total)

    zero = jnp.zeros((block_of(rows), block_of(features)), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(x.shape[1], _POSITIONS), add_tile, zero)
    store(dmatrices.at[b, j, g, channels, columns], total, real, real_columns)


def _call(
    kernel: Any,
    grid: tuple[int, ...],
    arrays: tuple[Array, ...],
    results: Any,
    precision: Any,
    interpret: bool,
) -> Any:
    return pl.pallas_call(
        functools.partial(kernel, precision),
        out_shape=results,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(*arrays)


def _any(mask: Array) -> Array:
    return mask.astype(jnp.int32).max() > 0


def _check(spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
    """See `spec.Implementation.supports`."""
    check_triton()
    check_dtype(x)


pallas_gpu = Products(interpreted_on_cpu(multiply), interpreted_on_cpu(multiply_backward), _check)
