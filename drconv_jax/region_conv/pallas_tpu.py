"""The TPU's kernels (Mosaic): a grid of (sample, tile of positions).

Positions lie on the lanes and channels on the sublanes, so that the index of a tile is one row
that masks every channel by a broadcast, and scores come out as rows too. A sample's filters are
fetched once and stay in VMEM while its tiles pass by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from drconv_jax.region_conv.pallas import check_dtype, interpreted_on_cpu
from drconv_jax.region_conv.products import Products
from drconv_jax.region_conv.spec import ConvSpec

_LANES = 128
_TILE = 512  # positions in a tile of a large image
_VMEM = 48 * 2**20  # what the blocks of a step may take; the smallest current TPU has 64 MiB


def multiply(
    precision: Any,
    patches: Float[Array, "batch positions groups taps_in"],
    matrices: Float[Array, "batch regions groups taps_in features"],
    index: Int[Array, "batch positions"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch positions groups features"]:
    """y[p] = patches[p] @ matrices[index[p]] in every group."""
    batch, positions, groups, rows = patches.shape
    regions, features = matrices.shape[1], matrices.shape[-1]
    x = _positions_last(patches)
    y = jax.ShapeDtypeStruct(
        (batch, groups, features, positions),
        x.dtype,
        manual_axis_type=jax.typeof(x).manual_axis_type,
    )
    call = _call(
        functools.partial(_forward_kernel, precision),
        (index[:, None], x, matrices),
        (y,),
        flops=2 * batch * groups * positions * rows * features * regions,
        interpret=interpret,
    )
    return _positions_first(*call)


def _forward_kernel(
    precision: Any, index_ref: Any, x_ref: Any, matrices_ref: Any, y_ref: Any
) -> None:
    """One tile: for each region that is present, y = W^T x at the positions that chose it."""

    @_for_each(matrices_ref.shape[0])
    def region(j: Array) -> None:
        own = index_ref[...] == j

        @pl.when(own.any())
        def present() -> None:
            @_for_each(matrices_ref.shape[1])
            def group(g: Array) -> None:
                product = _dot(matrices_ref[j, g], x_ref[g], (0, 0), precision)
                y_ref[g] = _replace(own, product, y_ref[g])


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
    batch, positions, groups, rows = patches.shape
    regions, features = matrices.shape[1], matrices.shape[-1]
    x = _positions_last(patches)
    struct = functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(x).manual_axis_type
    )
    dx, dmatrices, scores = _call(
        functools.partial(_backward_kernel, precision, positions),
        (index[:, None], x, matrices, _positions_last(dy)),
        (
            struct(x.shape, x.dtype),
            struct(matrices.shape, matrices.dtype),
            struct((batch, regions, positions), jnp.float32),
        ),
        scratch=(matrices.shape[1:],),
        flops=4 * batch * groups * positions * rows * features * regions,
        interpret=interpret,
    )
    return _positions_first(dx), dmatrices, jnp.moveaxis(scores, 1, -1)


def _backward_kernel(
    precision: Any,
    positions: int,
    index_ref: Any,
    x_ref: Any,
    matrices_ref: Any,
    dy_ref: Any,
    dx_ref: Any,
    dmatrices_ref: Any,
    scores_ref: Any,
    sum_ref: Any,
) -> None:
    """One tile: W dy for every region, which gives its scores <W dy, x> and, where chosen, dx.

    The filters' gradient, x dy^T over the positions that chose a region, is summed over the tiles
    of a sample in float32.
    """
    tile, tiles = pl.program_id(1), pl.num_programs(1)

    @pl.when(tile == 0)
    def start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    size = index_ref.shape[-1]
    inside = tile * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) < positions

    @_for_each(matrices_ref.shape[0])
    def region(j: Array) -> None:
        own = (index_ref[...] == j) & inside

        def add_group(g: Array, score: Array) -> Array:
            product = _dot(matrices_ref[j, g], dy_ref[g], (1, 0), precision)
            dx_ref[g] = _replace(own, product, dx_ref[g])

            @pl.when(own.any())
            def present() -> None:
                # Past the last position a tile holds anything, NaN included: both sides are masked.
                x, chosen = (_replace(own, a[g], jnp.zeros_like(a[g])) for a in (x_ref, dy_ref))
                sum_ref[j, g] += _dot(x, chosen, (1, 1), precision)

            return score + (product * x_ref[g].astype(jnp.float32)).sum(axis=0, keepdims=True)

        zero = jnp.zeros((1, size), jnp.float32)
        scores_ref[pl.ds(j, 1)] = jax.lax.fori_loop(0, matrices_ref.shape[1], add_group, zero)

    @pl.when(tile == tiles - 1)
    def finish() -> None:
        dmatrices_ref[...] = sum_ref[...].astype(dmatrices_ref.dtype)


def _call(
    kernel: Any,
    inputs: tuple[Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    flops: int,
    interpret: bool,
    scratch: tuple[tuple[int, ...], ...] = (),
) -> Any:
    """Runs the kernel over every sample and tile.

    Matrices (5 axes) come whole, one sample's at a time; of everything else a tile of the last
    axis, the positions.
    """
    batch, positions = inputs[0].shape[0], inputs[0].shape[-1]
    tile = _tile(positions)
    tiles = pl.cdiv(positions, tile)
    moved = 0
    specs = []
    arrays: list[Any] = [*inputs, *outputs]
    for array in arrays:
        whole = array.ndim == 5
        block = array.shape[1:] if whole else (*array.shape[1:-1], tile)
        moved += batch * (1 if whole else tiles) * _padded_bytes(block, array.dtype.itemsize)
        specs.append(pl.BlockSpec((None, *block), functools.partial(_place, array.ndim, whole)))
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(batch, tiles),
        in_specs=specs[: len(inputs)],
        out_specs=tuple(specs[len(inputs) :]),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM + 8 * 2**20
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )(*inputs)


def _tile(positions: int) -> int:
    return positions if positions <= 2 * _TILE else _TILE


def _check(spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
    """See `spec.Implementation.supports`."""
    check_dtype(x)
    *_, features = filters.shape
    regions = filters.shape[1]
    rows = math.prod(filters.shape[2:-1])
    tile = _tile(math.prod(guide_features.shape[1:-1]))
    # What the backward kernel holds: of a tile x, dy, dx, the scores and the index; the filters of
    # a sample, their gradients, and those again in float32. The next step's come in meanwhile.
    blocks = [(spec.groups, rows, tile)] * 2 + [(features, tile), (1, tile)]
    matrices = (regions, spec.groups, rows, features // spec.groups)
    held = 2 * sum(_padded_bytes(block, x.dtype.itemsize) for block in (*blocks, *[matrices] * 2))
    held += 2 * _padded_bytes((regions, tile), 4) + _padded_bytes(matrices, 4)
    if held > _VMEM:
        raise NotImplementedError(
            f"holds all filters of a sample in a TPU's VMEM: they take {held >> 20} MiB with a "
            f"tile of positions, of the {_VMEM >> 20} there are"
        )


def _place(ndim: int, whole: bool, sample: Array, tile: Array) -> tuple[Any, ...]:
    return (sample, *(0,) * (ndim - 2), 0 if whole else tile)


def _padded_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array in the memory of a TPU, whose tiles are 128 lanes by 32 bytes."""
    *leading, rows, lanes = shape
    sublanes = 32 // itemsize
    padded = pl.cdiv(rows, sublanes) * sublanes * pl.cdiv(lanes, _LANES) * _LANES
    return math.prod(leading) * padded * itemsize


def _positions_last(values: Array) -> Array:
    return jnp.transpose(values, (0, 2, 3, 1))


def _positions_first(values: Array) -> Array:
    return jnp.transpose(values, (0, 3, 1, 2))


def _for_each(count: int) -> Callable[[Callable[[Array], None]], None]:
    """Decorates a body that is run at once for every integer below `count`."""

    def run(body: Callable[[Array], None]) -> None:
        jax.lax.fori_loop(0, count, lambda i, _: body(i), None)

    return run


def _replace(own: Array, ours: Array, others: Array) -> Array:
    """Takes `ours` where `own`; selects in float32, for which the mask has the right layout."""
    wide = jnp.where(
        jnp.broadcast_to(own, ours.shape), ours.astype(jnp.float32), others.astype(jnp.float32)
    )
    return wide.astype(others.dtype)


def _dot(a: Array, b: Array, contracting: tuple[int, int], precision: Any) -> Array:
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    if a.dtype != jnp.float32:
        precision = None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


pallas_tpu = Products(interpreted_on_cpu(multiply), interpreted_on_cpu(multiply_backward), _check)
