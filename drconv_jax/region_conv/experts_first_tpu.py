"""Experts first on a TPU, in Mosaic through Pallas: one pass over the positions in each direction.

With a bank V that all regions share, and w_e[p] the weight of expert e in the region of p,

    y[p]  = sum_e w_e[p] V_e^T x[p]          z_e[p] = <V_e dy[p], x[p]>
    dx[p] = sum_e w_e[p] V_e dy[p]           dV_e   = sum_p w_e[p] x[p] dy[p]^T

and from z: the weights' gradient, its sum over each region's positions, and
scores_j[p] = sum_e alpha_{j,e} z_e[p]. What the experts give is mixed before it is stored, and the
region of a position is chosen where its weights are needed.

128 samples lie on the lanes and channels on the sublanes, which is how TPUs store the images of
large batches, so that nothing is copied. Of each position, 128 samples are one product with all
experts, one under the other; their weights are rows, which scale every channel by a broadcast.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from drconv_jax.region_conv.experts_first import experts_of
from drconv_jax.region_conv.mixture import Mixture
from drconv_jax.region_conv.pallas import check_dtype
from drconv_jax.region_conv.sharding import varying_like
from drconv_jax.region_conv.spec import ConvSpec

_LANES = 128
_SUBLANES = 8
_TILE_BYTES = 2**20  # of x or y in a step of the grid
_VMEM = 48 * 2**20  # what a step may hold; the smallest current TPU has 64 MiB


def supports(spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
    """See `spec.Implementation.supports`."""
    weights, bank, bias = filters
    if bank.shape[0] != 1 or (bias is not None and bias.shape[0] != 1):
        raise NotImplementedError("takes a bank and a bias that all regions share")
    if not spec.window.is_pointwise or spec.groups != 1:
        raise NotImplementedError("takes pointwise windows without groups")
    check_dtype(x)
    if guide_features.dtype == jnp.float64:
        raise NotImplementedError("compares guide features in float32, which float64 exceeds")
    if not all(isinstance(n, int) for n in (*x.shape, *guide_features.shape, *filters.shape)):
        raise NotImplementedError("is compiled for shapes that are numbers")
    if x.shape[0] % _LANES:
        raise NotImplementedError(f"takes batches of a multiple of {_LANES}, not {x.shape[0]}")
    experts = weights.shape[-1] + (bias is not None)
    held = _Sizes.of(x, weights.shape[1], experts, filters.shape[-1]).held_bytes
    if held > _VMEM:
        raise NotImplementedError(
            f"holds all experts in a TPU's VMEM: they take {held >> 20} MiB with a tile of "
            f"positions, of the {_VMEM >> 20} there are"
        )


class _Sizes(NamedTuple):
    """Of what a step of the grid is given, which is for 128 samples and a tile of positions.

    Attributes:
      positions: of a sample.
      tile: positions in a step.
      channels, features: of x and y.
      regions, experts: of the mixture.
      itemsize: bytes of an entry of x.
    """

    positions: int
    tile: int
    channels: int
    features: int
    regions: int
    experts: int
    itemsize: int

    @classmethod
    def of(cls, x: Any, regions: int, experts: int, features: int) -> _Sizes:
        channels, itemsize = x.shape[-1], x.dtype.itemsize
        positions = math.prod(x.shape[1:-1])
        most = max(1, _TILE_BYTES // (max(channels, features) * _LANES * itemsize))
        tile = pl.cdiv(positions, pl.cdiv(positions, most))
        return cls(positions, tile, channels, features, regions, experts, itemsize)

    @property
    def held_bytes(self) -> int:
        """Of what the larger kernel holds."""
        of_position = (
            2 * _padded_bytes((self.channels, _LANES), self.itemsize)  # x and dx
            + _padded_bytes((self.features, _LANES), self.itemsize)
            + 2 * _padded_bytes((self.regions, _LANES), 4)  # guide features and scores
        )
        of_samples = 2 * _padded_bytes((self.regions, self.experts, _LANES), 4)
        bank = 2 * _padded_bytes((self.experts, self.channels, self.features), self.itemsize)
        # While a step computes, blocks of the next come and those of the last go.
        passing = 2 * (self.tile * of_position + of_samples + bank)
        # The experts one under the other, their gradient, and a position's part of it; what the
        # experts give of a position, and what they get. The forward kernel has them transposed.
        own = max(
            3 * _padded_bytes((rows, columns), 4) + 2 * _padded_bytes((rows, _LANES), 4)
            for rows, columns in (
                (self.experts * _up_to(self.channels, _SUBLANES), self.features),
                (self.experts * _up_to(self.features, _SUBLANES), self.channels),
            )
        )
        return passing + own


def forward(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Mixture,
    guide_features: Float[Array, "batch *out_spatial regions"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch *out_spatial features"]:
    """See `spec.Implementation.forward`."""
    weights, bank = experts_of(filters)
    _, regions, experts = weights.shape
    sizes = _Sizes.of(x, regions, experts, bank.shape[-1])
    rows = sizes.experts * _up_to(sizes.features, _SUBLANES)
    (y,) = _call(
        functools.partial(_forward_kernel, spec.precision),
        sizes,
        1,
        (
            (_batch_last(x), _tile(sizes, sizes.channels)),
            (_batch_last(guide_features), _tile(sizes, sizes.regions)),
            (_weights_last(weights), _of_samples(sizes)),
            (_matrices(bank), _whole(sizes)),
        ),
        (((sizes.positions, sizes.features, x.shape[0]), x.dtype, _tile(sizes, sizes.features)),),
        scratch=(pltpu.VMEM((rows, sizes.channels), x.dtype),),
        interpret=interpret,
    )
    return _batch_first(y, x.shape[1:-1])


def _forward_kernel(
    precision: Any,
    x_ref: Any,
    guide_ref: Any,
    weights_ref: Any,
    matrices_ref: Any,
    y_ref: Any,
    stacked_ref: Any,
) -> None:
    """One tile: what all experts give, mixed in float32."""
    tile, features, _ = y_ref.shape

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def start() -> None:
        transposed = jnp.swapaxes(matrices_ref[...].astype(jnp.float32), 1, 2)
        stacked_ref[...] = _stacked(transposed).astype(stacked_ref.dtype)

    def position(p: Array, nothing: None) -> None:
        _, weights = _choice(guide_ref[p], weights_ref)
        outputs = _dot(stacked_ref[...], x_ref[p], (1, 0), precision)
        y = jnp.zeros(y_ref.shape[1:], jnp.float32)
        for weight, output in zip(_rows(weights), _unstacked(outputs, features), strict=True):
            y += weight * output
        y_ref[p] = y.astype(y_ref.dtype)

    jax.lax.fori_loop(0, tile, position, None)


def backward(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Mixture,
    guide_features: Float[Array, "batch *out_spatial regions"],
    y: Float[Array, "batch *out_spatial features"],
    dy: Float[Array, "batch *out_spatial features"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "batch *spatial in"], Mixture, Float[Array, "batch *out_spatial regions"]]:
    """See `spec.Implementation.backward`."""
    del y
    (weights, bank), to_mixture = jax.vjp(experts_of, filters)
    batch, regions, experts = weights.shape
    sizes = _Sizes.of(x, regions, experts, bank.shape[-1])
    matrices, spatial = _matrices(bank), x.shape[1:-1]
    rows = experts * _up_to(sizes.channels, _SUBLANES)
    dx, dmatrices, dweights, scores = _call(
        functools.partial(_backward_kernel, spec.precision, sizes.positions),
        sizes,
        2,
        (
            (_batch_last(x), _tile(sizes, sizes.channels)),
            (_batch_last(dy), _tile(sizes, sizes.features)),
            (_batch_last(guide_features), _tile(sizes, regions)),
            (_weights_last(weights), _of_samples(sizes)),
            (matrices, _whole(sizes)),
        ),
        (
            ((sizes.positions, sizes.channels, batch), x.dtype, _tile(sizes, sizes.channels)),
            (matrices.shape, bank.dtype, _whole(sizes)),
            ((regions, experts, batch), jnp.float32, _of_samples(sizes)),
            ((sizes.positions, regions, batch), jnp.float32, _tile(sizes, regions)),
        ),
        scratch=(
            pltpu.VMEM((rows, sizes.features), x.dtype),
            pltpu.VMEM((rows, sizes.features), jnp.float32),
            pltpu.VMEM((experts, _LANES), jnp.float32),
        ),
        interpret=interpret,
    )
    dweights = jnp.moveaxis(dweights, -1, 0).astype(weights.dtype)
    (dmixture,) = to_mixture((dweights, dmatrices.reshape(bank.shape)))
    return _batch_first(dx, spatial), dmixture, _batch_first(scores, spatial)


def _backward_kernel(
    precision: Any,
    positions: int,
    x_ref: Any,
    dy_ref: Any,
    guide_ref: Any,
    weights_ref: Any,
    matrices_ref: Any,
    dx_ref: Any,
    dmatrices_ref: Any,
    dweights_ref: Any,
    scores_ref: Any,
    stacked_ref: Any,
    sum_ref: Any,
    z_ref: Any,
) -> None:
    """One tile: dx and scores, and its part of the sums over positions."""
    samples, step = pl.program_id(0), pl.program_id(1)
    last_samples, last_step = pl.num_programs(0) - 1, pl.num_programs(1) - 1
    tile, channels, _ = x_ref.shape
    left = positions - step * tile

    @pl.when((samples == 0) & (step == 0))
    def start() -> None:
        matrices = matrices_ref[...].astype(jnp.float32)
        stacked_ref[...] = _stacked(matrices).astype(stacked_ref.dtype)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step == 0)
    def start_samples() -> None:
        dweights_ref[...] = jnp.zeros_like(dweights_ref)

    def position(p: Array, nothing: None) -> None:
        index, weights = _choice(guide_ref[p], weights_ref)
        # Past the last position a tile holds anything, NaN included, and sums must not.
        wide_x, dy = (jnp.where(p < left, ref[p].astype(jnp.float32), 0) for ref in (x_ref, dy_ref))
        dy = dy.astype(dy_ref.dtype)
        through = _unstacked(_dot(stacked_ref[...], dy, (1, 0), precision), channels)
        dx, scaled = jnp.zeros_like(wide_x), []
        for e, (weight, output) in enumerate(zip(_rows(weights), through, strict=True)):
            dx += weight * output
            z_ref[e : e + 1] = (output * wide_x).sum(axis=0, keepdims=True)
            scaled.append(weight * wide_x)
        dx_ref[p] = dx.astype(dx_ref.dtype)
        shared_x = _stacked(jnp.stack(scaled)).astype(x_ref.dtype)
        sum_ref[...] += _dot(shared_x, dy, (1, 1), precision)
        z = z_ref[...]
        for r in range(weights_ref.shape[0]):
            own = jnp.broadcast_to(index == r, z.shape)
            dweights_ref[r] += jnp.where(own, z, 0)
            scores_ref[p, r : r + 1] = (weights_ref[r] * z).sum(axis=0, keepdims=True)

    jax.lax.fori_loop(0, tile, position, None)

    @pl.when((samples == last_samples) & (step == last_step))
    def finish() -> None:
        for e, matrix in enumerate(_unstacked(sum_ref[...], channels)):
            dmatrices_ref[e] = matrix.astype(dmatrices_ref.dtype)


def _choice(
    guide: Float[Array, "regions lanes"], weights_ref: Any
) -> tuple[Int[Array, "1 lanes"], Float[Array, "experts lanes"]]:
    """The regions that are chosen at a position, as by `guide.region_index`, and their weights.

    Args:
      guide: features of the position.
      weights_ref: of every region (regions, experts, lanes).
    """
    regions, *shape = weights_ref.shape
    guide = guide.astype(jnp.float32)
    largest, index, weights = guide[:1], jnp.zeros((1, guide.shape[1]), jnp.int32), weights_ref[0]
    for r in range(1, regions):
        feature = guide[r : r + 1]
        # Of numbers the first maximum; a first NaN before all numbers.
        better = (feature > largest) | (jnp.isnan(feature) & ~jnp.isnan(largest))
        largest, index = jnp.where(better, feature, largest), jnp.where(better, r, index)
        weights = jnp.where(jnp.broadcast_to(better, shape), weights_ref[r], weights)
    return index, weights


def _rows(matrix: Float[Array, "rows lanes"]) -> list[Float[Array, "1 lanes"]]:
    return [matrix[i : i + 1] for i in range(matrix.shape[0])]


def _stacked(matrices: Float[Array, "n rows lanes"]) -> Float[Array, "stacked_rows lanes"]:
    """One under the other, with zeros up to whole registers."""
    rows = matrices.shape[1]
    padded = jnp.pad(matrices, ((0, 0), (0, _up_to(rows, _SUBLANES) - rows), (0, 0)))
    return padded.reshape(-1, matrices.shape[2])


def _unstacked(
    matrix: Float[Array, "stacked_rows lanes"], rows: int
) -> list[Float[Array, "rows lanes"]]:
    """What is one under the other, without what fills registers."""
    starts = range(0, matrix.shape[0], _up_to(rows, _SUBLANES))
    return [matrix[start : start + rows] for start in starts]


def _dot(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], contracting: tuple[int, int], precision: Any
) -> Float[Array, "_ _"]:
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    if a.dtype != jnp.float32:
        precision = None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _call(
    kernel: Any,
    sizes: _Sizes,
    products: int,
    inputs: tuple[tuple[Array, pl.BlockSpec], ...],
    outputs: tuple[tuple[tuple[int, ...], Any, pl.BlockSpec], ...],
    *,
    interpret: bool,
    scratch: tuple[Any, ...],
) -> Any:
    """Runs the kernel for every 128 samples and every tile of their positions.

    Args:
      kernel: of references to all inputs, outputs and scratch.
      sizes: of a step.
      products: how many the kernel makes of each position and all experts.
      inputs: arrays, and what a step is given of each.
      outputs: shapes, dtypes, and what a step gives of each.
      interpret: the kernel instead of compiling it.
      scratch: what stays from step to step.
    """
    arrays = [array for array, _ in inputs]
    arrays = varying_like(arrays, *arrays)
    kind = jax.typeof(arrays[0]).manual_axis_type
    results = [
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype, _ in outputs
    ]
    batch = arrays[0].shape[-1]
    multiply_adds = batch * sizes.positions * sizes.experts * sizes.channels * sizes.features
    return pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(batch // _LANES, pl.cdiv(sizes.positions, sizes.tile)),
        in_specs=[block for _, block in inputs],
        out_specs=[block for *_, block in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM + 8 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * multiply_adds,
            # Every block is moved once.
            bytes_accessed=sum(
                _padded_bytes(a.shape, a.dtype.itemsize) for a in (*arrays, *results)
            ),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*arrays)


def _tile(sizes: _Sizes, rows: int) -> pl.BlockSpec:
    """What a step has of an array (positions, rows, batch)."""
    return pl.BlockSpec((sizes.tile, rows, _LANES), lambda samples, tile: (tile, 0, samples))


def _of_samples(sizes: _Sizes) -> pl.BlockSpec:
    """What a step has of an array (regions, experts, batch)."""
    shape = (sizes.regions, sizes.experts, _LANES)
    return pl.BlockSpec(shape, lambda samples, tile: (0, 0, samples))


def _whole(sizes: _Sizes) -> pl.BlockSpec:
    """All of an array (experts, in, features)."""
    shape = (sizes.experts, sizes.channels, sizes.features)
    return pl.BlockSpec(shape, lambda samples, tile: (0, 0, 0))


def _batch_last(
    values: Float[Array, "batch *spatial rows"],
) -> Float[Array, "positions rows batch"]:
    batch, *spatial, rows = values.shape
    return jnp.moveaxis(values, 0, -1).reshape(math.prod(spatial), rows, batch)


def _batch_first(
    values: Float[Array, "positions rows batch"], spatial: tuple[int, ...]
) -> Float[Array, "batch *spatial rows"]:
    # XLA would move what follows, such as a conversion to float32, to before this, and store it.
    values = jnp.moveaxis(values.reshape(*spatial, *values.shape[1:]), -1, 0)
    return jax.lax.optimization_barrier(values)


def _weights_last(
    weights: Float[Array, "batch regions experts"],
) -> Float[Array, "regions experts batch"]:
    return jnp.moveaxis(weights, 0, -1).astype(jnp.float32)


def _matrices(bank: Float[Array, "n *kernel rows columns"]) -> Float[Array, "n rows columns"]:
    """The bank in main memory: XLA would bring it to VMEM first, and the kernel does so anyway."""
    matrices = bank.reshape(bank.shape[0], *bank.shape[-2:])
    return pltpu.with_memory_space_constraint(matrices, pltpu.HBM)


def _padded_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Of an array in the memory of a TPU, in tiles of 8 rows by 128 lanes."""
    *leading, rows, lanes = shape
    return math.prod(leading) * _up_to(rows, _SUBLANES) * _up_to(lanes, _LANES) * itemsize


def _up_to(number: int, multiple: int) -> int:
    return pl.cdiv(number, multiple) * multiple
