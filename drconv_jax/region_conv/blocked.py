"""Pure XLA: the positions of a sample, sorted by region, in blocks that share one filter.

Runs everywhere, does little more than one convolution's arithmetic, and keeps nothing with a
factor m in memory beyond the filters themselves. There are always as many blocks as any guide can
need: shapes are fixed, samples stay apart, and a sharded batch stays sharded.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import Length
from drconv_jax.region_conv.products import Products, wide_einsum
from drconv_jax.region_conv.sharding import varying_like


def multiply(
    precision: Any,
    patches: Float[Array, "batch positions groups taps_in"],
    matrices: Float[Array, "batch regions groups taps_in features"],
    index: Int[Array, "batch positions"],
) -> Float[Array, "batch positions groups features"]:
    """Every position's window times the matrix of its region."""
    blocks = _blocks_of(index, matrices.shape[1])
    rows = _rows(patches, blocks.position)

    def product(_: None, block: Array) -> tuple[None, Array]:
        matrix = jax.vmap(lambda matrices, region: matrices[region])(
            matrices, blocks.region[:, block]
        )
        y = wide_einsum("btgk,bgkf->btgf", rows[:, block], matrix, precision)
        return None, y.astype(patches.dtype)

    _, y = jax.lax.scan(product, None, jnp.arange(rows.shape[1]))
    y = jnp.moveaxis(y, 0, 1)
    return _rows(y.reshape(y.shape[0], y.shape[1] * y.shape[2], *y.shape[3:]), blocks.slot)


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
    """The gradients of the windows and the matrices, and every region's score.

    A score <dy, W_j x> is taken as <W_j^T dy, x>, whose left side is the windows' gradient where
    the region is the chosen one.
    """
    chosen = index[..., None, None]

    def score(dpatches: Array, region: Array) -> tuple[Array, Array]:
        product = wide_einsum("bpgf,bgkf->bpgk", dy, matrices[:, region], precision)
        dpatches = jnp.where(chosen == region, product, dpatches)
        return dpatches, (product * patches.astype(product.dtype)).sum(axis=(-1, -2))

    wide = accumulator(patches.dtype)
    dpatches, scores = jax.lax.scan(
        score,
        varying_like(jnp.zeros(patches.shape, wide), patches, matrices, index, dy),
        jnp.arange(matrices.shape[1], dtype=index.dtype),
    )

    blocks = _blocks_of(index, matrices.shape[1])
    rows, drows = _rows(patches, blocks.position), _rows(dy, blocks.position)

    def add_block(dmatrices: Array, block: Array) -> tuple[Array, None]:
        product = wide_einsum("btgk,btgf->bgkf", rows[:, block], drows[:, block], precision)
        add = jax.vmap(lambda sums, region, product: sums.at[region].add(product))
        return add(dmatrices, blocks.region[:, block], product), None

    dmatrices, _ = jax.lax.scan(
        add_block,
        varying_like(jnp.zeros(matrices.shape, wide), patches, matrices, index, dy),
        jnp.arange(rows.shape[1]),
    )
    return (
        dpatches.astype(patches.dtype),
        dmatrices.astype(matrices.dtype),
        jnp.moveaxis(scores, 0, -1),
    )


class _Blocks(NamedTuple):
    """Where the positions of a sample stand once they are sorted into blocks of their region.

    Attributes:
      slot: of every position, among the rows of all blocks.
      position: of every row; one past the last where a row is left empty.
      region: of every block.
    """

    slot: Int[Array, "*batch positions"]
    position: Int[Array, "*batch blocks rows"]
    region: Int[Array, "*batch blocks"]


@functools.partial(jax.vmap, in_axes=(0, None))
def _blocks_of(index: Int[Array, positions], regions: int) -> _Blocks:
    positions = index.shape[0]  # of an exported program, it may be a symbol
    rows = _rows_of_a_block(positions, regions)
    blocks = (positions + regions * (rows - 1)) // rows  # no guide needs more
    own = jax.nn.one_hot(index, regions, dtype=jnp.int32)
    seen = jnp.cumsum(_never_empty(own, axis=0), axis=0)[:positions]
    end = jnp.cumsum(-(-own.sum(axis=0, dtype=jnp.int32) // rows))
    first_slot = jnp.pad(end, (1, 0))[:-1] * rows
    slot = (own * (first_slot[None] + seen - 1)).sum(axis=1, dtype=jnp.int32)
    position = jnp.full(blocks * rows, positions, jnp.int32)
    position = position.at[slot].set(jnp.arange(positions, dtype=jnp.int32), unique_indices=True)
    # jnp.searchsorted fails in `shard_map` over some of a mesh's axes (JAX 0.10).
    past = end[None] <= jnp.arange(blocks, dtype=jnp.int32)[:, None]
    region = past.sum(axis=1, dtype=jnp.int32)
    return _Blocks(slot, position.reshape(blocks, rows), jnp.minimum(region, regions - 1))


def _rows_of_a_block(positions: Length, regions: int) -> int:
    """A power of two for about four blocks a region, between 8 and 64 rows."""
    if not isinstance(positions, int):
        return 32
    for rows in (64, 32, 16):
        if positions >= 4 * rows * regions:
            return rows
    return 8


def _rows(
    values: Float[Array, "batch positions *rest"], index: Int[Array, batch * where]
) -> Float[Array, batch * where * rest]:
    """The rows of every sample that the index names, zeros where it names none."""
    values = _never_empty(values, axis=1)
    return jax.vmap(lambda v, i: v.at[i].get(mode="fill", fill_value=0))(values, index)


def _never_empty(values: Array, axis: int) -> Array:
    """With a zero behind an axis whose length is a symbol: to JAX, it might be 0 otherwise."""
    if isinstance(values.shape[axis], int):
        return values
    return jnp.pad(values, [(0, int(i == axis)) for i in range(values.ndim)])


blocked = Products(multiply, multiply_backward)
