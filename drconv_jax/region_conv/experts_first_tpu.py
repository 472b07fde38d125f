"""Experts first on a TPU, in Mosaic through Pallas: one pass over the positions in each direction.

With a bank V that all regions share, and w_e[p] the weight of expert e in the region of p,

    y[p]  = sum_e w_e[p] V_e^T x[p]          z_e[p] = <V_e dy[p], x[p]>
    dx[p] = sum_e w_e[p] V_e dy[p]           dV_e   = sum_p w_e[p] x[p] dy[p]^T

and from z: the weights' gradient, its sum over each region's positions, and
scores_j[p] = sum_e alpha_{j,e} z_e[p]. What the experts give is mixed before it is stored, and the
region of a position is chosen where its weights are needed.

128 samples lie on the lanes and channels on the sublanes, which is how TPUs store images of such
batches, so that nothing is copied. A position of 128 samples is one product with all experts at
once, and its weights are rows that scale every channel by a broadcast.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from drconv_jax.region_conv.experts_first import experts_of
from drconv_jax.region_conv.mixture import Mixture
from drconv_jax.region_conv.pallas import check_dtype
from drconv_jax.region_conv.sharding import varying_like
from drconv_jax.region_conv.spec import ConvSpec

_LANES = 128
_TILE_BYTES = 2**20  # of x or y in a step of the grid
_VMEM = 48 * 2**20  # what a step may hold; the smallest current TPU has 64 MiB


def supports(spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
    """See `spec.Implementation.supports`."""
    if not isinstance(filters, Mixture):
        raise NotImplementedError("mixes outputs: it takes a Mixture, not filters")
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
    sizes = _Sizes.of(x.shape, weights.shape[1], experts, filters.shape[-1], x.dtype)
    if sizes.held_bytes > _VMEM:
        raise NotImplementedError(
            f"holds all experts in a TPU's VMEM: with a tile of positions they take "
            f"{sizes.held_bytes >> 20} MiB of the {_VMEM >> 20} there are"
        )


class _Sizes(NamedTuple):
    """Of the blocks of a step of the grid, which is over 128 samples by a tile of positions.

    Attributes:
      positions: of one sample.
      tile: positions in a step.
      channels, features: of x and y, up to a multiple of the sublanes of a register.
      regions, experts: as they are.
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
    def of(
        cls, x: tuple[int, ...], regions: int, experts: int, features: int, dtype: Any
    ) -> _Sizes:
        itemsize = jnp.dtype(dtype).itemsize
        channels, features = (_up_to(n, 8) for n in (x[-1], features))
        positions = math.prod(x[1:-1])
        most = max(1, _TILE_BYTES // (max(channels, features) * _LANES * itemsize))
        tile = pl.cdiv(positions, pl.cdiv(positions, most))
        return cls(positions, tile, channels, features, regions, experts, itemsize)

    @property
    def held_bytes(self) -> int:
        """Of what the backward kernel holds."""
        channels, experts = self.channels, self.experts
        rows, columns = experts * channels, _up_to(self.features, _LANES)
        guides = _up_to(self.regions, 8) * 4
        passing = (
            self.tile * _LANES * (self.itemsize * (2 * channels + self.features) + 2 * guides)
        )  # x, dx, dy; guide features and scores
        of_samples = 2 * self.regions * _up_to(experts, 8) * _LANES * 4  # weights and gradients
        of_experts = rows * columns * (self.itemsize + 4)  # the bank and its gradient
        products = rows * _LANES * (4 + self.itemsize)  # all experts' V_e dy and w_e x
        # The next step's blocks come in meanwhile.
        return 2 * (passing + of_samples + of_experts) + products


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
    sizes = _Sizes.of(x.shape, *weights.shape[1:], bank.shape[-1], x.dtype)
    matrices = jnp.swapaxes(bank.reshape(-1, *bank.shape[-2:]), 1, 2)
    (y,) = _call(
        functools.partial(_forward_kernel, spec.precision, sizes, x.shape[-1]),
        sizes,
        (
            (_batch_last(x), _tile(sizes, sizes.channels)),
            (_batch_last(guide_features), _tile(sizes, sizes.regions)),
            (_weights_of(weights), _per_sample(sizes)),
            (
                _stacked(matrices, sizes.features, sizes.channels),
                _whole((sizes.experts * sizes.features, sizes.channels)),
            ),
        ),
        (((sizes.positions, bank.shape[-1], x.shape[0]), x.dtype, _tile(sizes, sizes.features)),),
        interpret=interpret,
    )
    return _batch_first(y, guide_features.shape[1:-1])


def _forward_kernel(
    precision: Any,
    sizes: _Sizes,
    channels: int,
    x_ref: Any,
    guide_ref: Any,
    weights_ref: Any,
    matrices_ref: Any,
    y_ref: Any,
) -> None:
    left = _positions_left(sizes)

    def position(p: Array, _: None) -> None:
        _, weights = _choice(guide_ref[p], weights_ref)
        outputs = _dot(matrices_ref[...], _values(x_ref, p, channels, left), precision)
        y = sum(
            weights[e : e + 1] * outputs[e * sizes.features : (e + 1) * sizes.features]
            for e in range(sizes.experts)
        )
        y_ref[p] = y.astype(y_ref.dtype)

    jax.lax.fori_loop(0, sizes.tile, position, None)


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
    channels, features = bank.shape[-2:]
    sizes = _Sizes.of(x.shape, regions, experts, features, x.dtype)
    matrices = bank.reshape(experts, channels, features)
    stacked = (experts * sizes.channels, sizes.features)
    dx, dmatrices, dweights, scores = _call(
        functools.partial(_backward_kernel, spec.precision, sizes, channels, features),
        sizes,
        (
            (_batch_last(x), _tile(sizes, sizes.channels)),
            (_batch_last(dy), _tile(sizes, sizes.features)),
            (_batch_last(guide_features), _tile(sizes, regions)),
            (_weights_of(weights), _per_sample(sizes)),
            (_stacked(matrices, sizes.channels, sizes.features), _whole(stacked)),
        ),
        (
            ((sizes.positions, channels, batch), x.dtype, _tile(sizes, sizes.channels)),
            (stacked, jnp.float32, _whole(stacked)),
            ((regions, experts, batch), jnp.float32, _per_sample(sizes)),
            ((sizes.positions, regions, batch), jnp.float32, _tile(sizes, regions)),
        ),
        scratch=(pltpu.VMEM((experts, _LANES), jnp.float32),),
        interpret=interpret,
    )
    dmatrices = dmatrices.reshape(experts, sizes.channels, sizes.features)
    dbank = dmatrices[:, :channels, :features].reshape(bank.shape).astype(bank.dtype)
    dweights = jnp.moveaxis(dweights, -1, 0).astype(weights.dtype)
    (dmixture,) = to_mixture((dweights, dbank))
    spatial = x.shape[1:-1]
    return _batch_first(dx, spatial), dmixture, _batch_first(scores, spatial)


def _backward_kernel(
    precision: Any,
    sizes: _Sizes,
    channels: int,
    features: int,
    x_ref: Any,
    dy_ref: Any,
    guide_ref: Any,
    weights_ref: Any,
    matrices_ref: Any,
    dx_ref: Any,
    dmatrices_ref: Any,
    dweights_ref: Any,
    scores_ref: Any,
    through_ref: Any,
) -> None:
    left = _positions_left(sizes)
    first_tile = pl.program_id(1) == 0

    @pl.when(first_tile)
    def start_samples() -> None:
        dweights_ref[...] = jnp.zeros_like(dweights_ref)

    @pl.when(first_tile & (pl.program_id(0) == 0))
    def start() -> None:
        dmatrices_ref[...] = jnp.zeros_like(dmatrices_ref)

    def position(p: Array, _: None) -> None:
        index, weights = _choice(guide_ref[p], weights_ref)
        x = _values(x_ref, p, channels, left)
        dy = _values(dy_ref, p, features, left)
        wide_x = x.astype(jnp.float32)
        products = _dot(matrices_ref[...], dy, precision)
        dx, scaled = jnp.zeros_like(wide_x), []
        for e in range(sizes.experts):
            weight = weights[e : e + 1]
            product = products[e * sizes.channels : (e + 1) * sizes.channels]
            dx += weight * product
            scaled.append(weight * wide_x)
            through_ref[e : e + 1] = (product * wide_x).sum(axis=0, keepdims=True)
        dx_ref[p] = dx.astype(dx_ref.dtype)
        dmatrices_ref[...] += _dot(jnp.concatenate(scaled).astype(x.dtype), dy, precision, (1, 1))
        through = through_ref[...]
        for r in range(sizes.regions):
            own = jnp.broadcast_to(index == r, through.shape)
            dweights_ref[r] += jnp.where(own, through, 0.0)
            score = (weights_ref[r] * through).sum(axis=0, keepdims=True)
            scores_ref[p, r : r + 1] = score

    jax.lax.fori_loop(0, sizes.tile, position, None)


def _choice(guide: Array, weights_ref: Any) -> tuple[Array, Array]:
    """The regions that are chosen at a position and their weights, as `guide.region_index`.

    Args:
      guide: the features (regions, lanes).
      weights_ref: (regions, experts, lanes).

    Returns:
      Indices (1, lanes) and weights (experts, lanes).
    """
    regions, experts, lanes = weights_ref.shape
    guide = guide.astype(jnp.float32)
    largest, index, weights = guide[:1], jnp.zeros((1, lanes), jnp.int32), weights_ref[0]
    for r in range(1, regions):
        feature = guide[r : r + 1]
        # The first maximum, and the first NaN before any number.
        better = (feature > largest) | (jnp.isnan(feature) & ~jnp.isnan(largest))
        largest, index = jnp.where(better, feature, largest), jnp.where(better, r, index)
        weights = jnp.where(jnp.broadcast_to(better, (experts, lanes)), weights_ref[r], weights)
    return index, weights


def _positions_left(sizes: _Sizes) -> Array:
    """From the tile's first position on."""
    return sizes.positions - pl.program_id(1) * sizes.tile


def _values(ref: Any, p: Array, channels: int, left: Array) -> Array:
    """Position p of a tile; zeros for channels past the last and positions past the last.

    There a block holds anything, NaN included.
    """
    values = ref[p]
    inside = (jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < channels) & (p < left)
    return jnp.where(inside, values.astype(jnp.float32), 0.0).astype(values.dtype)


def _call(
    kernel: Any,
    sizes: _Sizes,
    inputs: tuple[tuple[Array, pl.BlockSpec], ...],
    outputs: tuple[tuple[tuple[int, ...], Any, pl.BlockSpec], ...],
    *,
    interpret: bool,
    scratch: tuple[Any, ...] = (),
) -> Any:
    """Runs the kernel for every 128 samples and every tile of their positions.

    Args:
      kernel: of the references of all inputs, all outputs and the scratch.
      sizes: of its blocks.
      inputs: arrays and their blocks.
      outputs: shapes, dtypes and blocks.
      interpret: rather than compile.
      scratch: memory of the kernel's own.
    """
    arrays = [array for array, _ in inputs]
    arrays = varying_like(arrays, *arrays)
    kind = jax.typeof(arrays[0]).manual_axis_type
    results = [
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype, _ in outputs
    ]
    batch = arrays[0].shape[-1]
    products = 1 if len(outputs) == 1 else 2
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
            bytes_accessed=sum(map(_bytes, (*arrays, *results))),  # each is moved once
            transcendentals=0,
        ),
        interpret=interpret,
    )(*arrays)


def _tile(sizes: _Sizes, rows: int) -> pl.BlockSpec:
    """The block of an array (positions, rows, batch)."""
    return pl.BlockSpec((sizes.tile, rows, _LANES), lambda samples, tile: (tile, 0, samples))


def _per_sample(sizes: _Sizes) -> pl.BlockSpec:
    """The block of an array (regions, experts, batch)."""
    shape = (sizes.regions, sizes.experts, _LANES)
    return pl.BlockSpec(shape, lambda samples, tile: (0, 0, samples))


def _whole(shape: tuple[int, int]) -> pl.BlockSpec:
    """The block of a matrix, the same for every step."""
    return pl.BlockSpec(shape, lambda samples, tile: (0, 0))


def _batch_last(
    values: Float[Array, "batch *spatial rows"],
) -> Float[Array, "positions rows batch"]:
    batch, *spatial, rows = values.shape
    order = (*range(1, values.ndim), 0)
    return jnp.transpose(values, order).reshape(math.prod(spatial), rows, batch)


def _batch_first(
    values: Float[Array, "positions rows batch"], spatial: tuple[int, ...]
) -> Float[Array, "batch *spatial rows"]:
    values = values.reshape(*spatial, *values.shape[1:])
    return jnp.moveaxis(values, -1, 0)


def _weights_of(
    weights: Float[Array, "batch regions experts"],
) -> Float[Array, "regions experts batch"]:
    return jnp.moveaxis(weights, 0, -1).astype(jnp.float32)


def _stacked(
    matrices: Float[Array, "experts rows columns"], rows: int, columns: int
) -> Float[Array, "experts*rows columns"]:
    """Matrices one under the other, each of so many rows and columns; what is added is zeros."""
    added = rows - matrices.shape[1], columns - matrices.shape[2]
    return jnp.pad(matrices, ((0, 0), (0, added[0]), (0, added[1]))).reshape(-1, columns)


def _dot(
    a: Array, b: Array, precision: Any, contracting: tuple[int, int] = (1, 0)
) -> Float[Array, "rows columns"]:
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(
        a,
        b,
        dimensions,
        precision=precision if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _bytes(array: Any) -> int:
    """Of an array in the memory of a TPU, in tiles of 8 rows by 128 lanes."""
    *leading, rows, lanes = array.shape
    return math.prod(leading) * _up_to(rows, 8) * _up_to(lanes, _LANES) * array.dtype.itemsize


def _up_to(number: int, multiple: int) -> int:
    return pl.cdiv(number, multiple) * multiple
