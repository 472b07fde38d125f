"""Experts first on a GPU, in Triton through Pallas: no sample's filter is ever made.

With a bank V that all regions share, and a_e[p] the weight of expert e in the region of p,

    y[p]  = sum_e a_e[p] (V_e * x)[p]        z_e[p] = <dy[p], (V_e * x)[p]>
    dx    = sum_e V_e^T * (a_e dy)           dV_e   = sum_p a_e[p] (window of x at p) dy[p]^T

and from z, which is small: the weights' gradient, its sum over each region's positions, and
scores_j[p] = sum_e alpha_{j,e} z_e[p]. Each is one pass over the positions of all samples, in one
row, with tensor cores; windows are gathered tap by tap, and expert outputs never leave registers.
For a pointwise window dx and z are one pass, since there z_e[p] = <V_e^T dy[p], x[p]>.

Sums are float32. Products of float32 values are taken in TF32, as XLA takes them on a GPU, unless
the precision is HIGHEST.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from drconv_jax.geometry import Window
from drconv_jax.guide import region_index
from drconv_jax.region_conv.mixture import Mixture
from drconv_jax.region_conv.spec import ConvSpec
from drconv_jax.region_conv.triton_blocks import (
    block_of,
    check_triton,
    dot,
    load,
    store,
    struct,
    triton,
)

# Shared memory that a program can have on every GPU since Ampere. Of programs that use all of it, a
# multiprocessor of an H100 runs two at a time (228 KiB), and of programs whose 128 threads have 255
# registers as well (65536).
_HELD_BYTES = 99 * 1024
_PROGRAMS = 264  # an H100's 132 multiprocessors run at a time


class _Tile(NamedTuple):
    """Of how much a program of `_multiply` computes products at once.

    Attributes:
      rows: positions.
      deep, wide: channels of the source and of the results, in one group.
      held: the program reads its matrices once, into shared memory, and then all of its positions;
        otherwise it has `rows` positions and reads the matrices for them.
    """

    rows: int
    deep: int
    wide: int
    held: bool


def _tile_of(dtype: Any, precision: Any, shape: tuple[int, ...], other: bool) -> _Tile:
    """The tile for matrices of this shape (n, taps, groups, depth, width), with `other` or not."""
    experts, taps, groups, depth, width = shape
    size, exact = jnp.dtype(dtype).itemsize, _is_exact(dtype, precision)
    # Without tensor cores all operands are kept in registers.
    most = 32 if exact else 64
    deep, wide = block_of(depth, most), block_of(width, most)
    steps = taps * pl.cdiv(depth, deep)
    if groups == 1 and experts * steps <= 32 and not exact:
        rows = 64
        for narrower in (wide, min(wide, 32)):
            held = experts * steps * deep * narrower
            # Of positions there are two tiles: the next is read during the products of one.
            passing = 2 * rows * (steps * deep + (narrower if other else 0))
            if (held + passing) * size <= _HELD_BYTES:
                return _Tile(rows, deep, narrower, held=True)
    # 128x64 sums and a product of that size take 128 registers of each of the 128 threads, which
    # leaves as many for operands of 16 bits.
    return _Tile(128 if size < 4 else 64, deep, wide, held=False)


def _is_exact(dtype: Any, precision: Any) -> bool:
    """Whether products are those of whole float32 values, which tensor cores cannot do."""
    if (
        precision is None
    ):  # of the products that follow, which JAX then takes from its configuration
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    exact = precision in (jax.lax.Precision.HIGHEST, "highest", "float32")
    return exact and jnp.dtype(dtype).itemsize == 4


def supports(spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
    """See `Implementation.supports`."""
    check_triton()
    weights, bank, bias = filters
    if bank.shape[0] != 1 or (bias is not None and bias.shape[0] != 1):
        raise NotImplementedError("takes a bank and a bias that all regions share")
    if any(length != 1 for length in weights.shape[2:-1]):
        raise NotImplementedError("takes weights that all taps of the kernel share")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"does float32, bfloat16 and float16, not {x.dtype}")
    if guide_features.dtype == jnp.float64:
        raise NotImplementedError("compares guide features in float32, which float64 exceeds")
    if not all(isinstance(n, int) for n in (*x.shape, *guide_features.shape, *filters.shape)):
        raise NotImplementedError("is compiled for shapes that are numbers")
    if max(math.prod(x.shape[:-1]), math.prod(guide_features.shape[:-1])) >= 2**30:
        raise NotImplementedError("numbers the positions of the batch in 32 bits, fewer than 2^30")


def forward(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Mixture,
    guide_features: Float[Array, "batch *out_spatial regions"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch *out_spatial features"]:
    """See `Implementation.forward`."""
    weights, matrices = _experts(filters, spec.groups)
    reads = _Reads(spec.window, x.shape[1:-1], guide_features.shape[1:-1], transposed=False)
    choice = _Choice(_rows_of(guide_features), weights)
    y, _ = _multiply(spec.precision, interpret, reads, _rows_of(x), matrices, choice=choice)
    return y.reshape(*guide_features.shape[:-1], -1)


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
    """See `Implementation.backward`."""
    del y
    (weights, matrices), to_mixture = jax.vjp(lambda m: _experts(m, spec.groups), filters)
    choice = _Choice(_rows_of(guide_features), weights)
    reads = _Reads(spec.window, x.shape[1:-1], guide_features.shape[1:-1], transposed=False)
    rows, drows = _rows_of(x), _rows_of(dy)

    multiply = functools.partial(_multiply, spec.precision, interpret)
    to_input = reads._replace(transposed=True), drows, jnp.swapaxes(matrices, -1, -2)
    if spec.window.is_pointwise:
        dx, z = multiply(*to_input, choice=choice, other=rows)
    else:
        dx, _ = multiply(*to_input, choice=choice)
        _, z = multiply(reads, rows, matrices, other=drows)

    batch, *out, regions = guide_features.shape
    z = z.reshape(batch, math.prod(out), -1)
    weights = weights.reshape(batch, regions, -1).astype(z.dtype)
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = einsum("bpe,bme->bpm", z, weights)
    own = jax.nn.one_hot(region_index(guide_features), regions, dtype=z.dtype)
    dweights = einsum("bpm,bpe->bme", own.reshape(batch, -1, regions), z)

    dmatrices = _bank_gradient(spec.precision, interpret, reads, rows, drows, matrices, choice)
    dweights = dweights.reshape(batch * regions, -1).astype(filters.dtype)
    (dfilters,) = to_mixture((dweights, dmatrices))
    return dx.reshape(x.shape), dfilters, scores.reshape(guide_features.shape)


def _experts(
    mixture: Mixture, groups: int
) -> tuple[Float[Array, "rows_of_weights n"], Float[Array, "n taps groups in_per_group width"]]:
    """Every region's weights and each tap of each expert; a bias is one more expert."""
    weights, bank, bias = mixture
    bank = bank[0]
    weights = weights.reshape(-1, weights.shape[-1])
    if bias is not None:
        bank = jnp.concatenate([bank, jnp.broadcast_to(bias, (1, *bank.shape[1:]))])
        weights = jnp.concatenate([weights, jnp.ones_like(weights, shape=(len(weights), 1))], 1)
    experts, *kernel, rows, features = bank.shape
    bank = bank.reshape(experts, math.prod(kernel), rows, groups, features // groups)
    return weights, jnp.moveaxis(bank, -2, 2)


def _rows_of(values: Array) -> Float[Array, "rows channels"]:
    """The positions of all samples in one row."""
    return values.reshape(-1, values.shape[-1])


class _Choice(NamedTuple):
    """What names the row of weights that a position of the output has.

    Attributes:
      guide: every output position's guide features.
      weights: the rows of all regions of all samples.
    """

    guide: Float[Array, "rows regions"]
    weights: Float[Array, "rows_of_weights n"]


class _Reads(NamedTuple):
    """Which position of a source every position of the results reads under each tap.

    Attributes:
      window: of the convolution.
      inputs, outputs: the spatial shapes of its input and its output.
      transposed: the source is the output, and the results are positions of the input.
    """

    window: Window
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    transposed: bool

    @property
    def source(self) -> tuple[int, ...]:
        return self.outputs if self.transposed else self.inputs

    @property
    def results(self) -> tuple[int, ...]:
        return self.inputs if self.transposed else self.outputs

    def rows(self, rows: Array, tap: Any) -> tuple[Array, Array]:
        """The source's rows that these rows of the results read, and which of them exist."""
        exist = jnp.ones_like(rows, dtype=bool)
        window = self.window
        if window.is_pointwise:
            return rows, exist
        sample = jax.lax.div(rows, math.prod(self.results))
        position = _unravel(rows, self.results)
        taps = _unravel(tap, window.kernel_size)
        read = sample
        for axis, here in enumerate(position):
            stride = window.strides[axis]
            offset = taps[axis] * window.dilation[axis] - window.padding[axis][0]
            if self.transposed:
                there = jax.lax.div(here - offset, stride)
                exist &= (here >= offset) & (jax.lax.rem(here - offset, stride) == 0)
            else:
                there = here * stride + offset
                exist &= there >= 0
            exist &= there < self.source[axis]
            read = read * self.source[axis] + there
        return read, exist


def _multiply(
    precision: Any,
    interpret: bool,
    reads: _Reads,
    source: Float[Array, "source_rows depths"],
    matrices: Float[Array, "n taps groups depth width"],
    *,
    choice: _Choice | None = None,
    other: Float[Array, "rows widths"] | None = None,
) -> tuple[Any, Any]:
    """With P_e = V_e * source: sum_e a_e P_e of a choice, and all <P_e, other> in float32.

    None stands for either where what it is taken with is not given.

    A program has positions of a tile, or many tiles where it holds its matrices, and a share of the
    channels of the results: a block of them, or several groups where groups are narrow.
    """
    experts, _, groups, _, width = matrices.shape
    tile = _tile_of(source.dtype, precision, matrices.shape, other is not None)
    samples = source.shape[0] // math.prod(reads.source)
    rows = samples * math.prod(reads.results)
    shares = pl.cdiv(groups * width, tile.wide if groups == 1 else 64)
    tiles = pl.cdiv(rows, tile.rows)
    total = None if choice is None else struct((rows, groups * width), source.dtype, source)
    inner = None if other is None else struct((shares, rows, experts), jnp.float32, source)
    total, inner = _call(
        functools.partial(_experts_multiply_kernel, precision, reads, matrices.shape),
        # Programs of the same positions are neighbours: they find those in the cache. Twice as many
        # as run at a time even out how many tiles each has.
        (shares, min(tiles, pl.cdiv(2 * _PROGRAMS, shares)) if tile.held else tiles),
        (source, _padded(matrices, tile.deep, tile.wide), choice, other),
        (total, inner),
        2 if tile.held else 3,
        interpret,
    )
    return total, None if inner is None else inner.sum(axis=0)


def _experts_multiply_kernel(
    precision: Any,
    reads: _Reads,
    shape: tuple[int, ...],
    source: Any,
    matrices: Any,
    choice: Any,
    other: Any,
    total: Any,
    inner: Any,
) -> None:
    """See `_multiply`: positions, blocks of the results' channels, steps of the sum, experts."""
    experts, taps, groups, depth, width = shape
    tile = _tile_of(source.dtype, precision, shape, other is not None)
    chunks, blocks = pl.cdiv(depth, tile.deep), pl.cdiv(width, tile.wide)
    steps = taps * chunks
    all_rows = (other if total is None else total).shape[0]
    share, program = pl.program_id(0), pl.program_id(1)
    shares, programs = pl.num_programs(0), pl.num_programs(1)
    of_share = pl.cdiv(groups * blocks, shares)
    first, end = share * of_share, jnp.minimum((share + 1) * of_share, groups * blocks)
    loop: Any = _unrolled if tile.held else jax.lax.fori_loop

    def read_matrix(e: Any, step: Any, block: Any) -> Array:
        (tap, k), (g, f) = _unravel(step, (taps, chunks)), _unravel(block, (groups, blocks))
        rows, columns = (pl.ds(i * n, n) for i, n in ((k, tile.deep), (f, tile.wide)))
        return matrices[e, tap, g, rows, columns]

    matrix_of: Any = read_matrix
    if tile.held:
        held = [[read_matrix(e, step, first) for e in range(experts)] for step in range(steps)]
        matrix_of = lambda e, step, _: held[step][e]  # noqa: E731

    def multiply_rows(i: Any, _: None) -> None:
        """The results of the program's i-th tile of positions."""
        rows = _range(i * programs + program, tile.rows)
        inside = rows < all_rows
        chosen_here = None
        if choice is not None and not reads.transposed:
            chosen_here = _row_of_weights(choice, reads, rows, inside)

        def add_block(block: Any, z: Any) -> Any:
            """The products of some channels of a group."""
            g, f = _unravel(block, (groups, blocks))
            real = _range(f, tile.wide) < width
            columns = g * width + _range(f, tile.wide)
            theirs: Any = None
            if inner is not None:
                theirs = load(other.at[rows[:, None], columns[None]], inside, real)

            def add_step(step: Any, sums: Any) -> Any:
                """What some channels of the source give under a tap."""
                tap, k = _unravel(step, (taps, chunks))
                read, exist = reads.rows(rows, tap)
                exist &= inside
                channels, here = _range(k, tile.deep), g * depth + _range(k, tile.deep)
                ours = load(source.at[read[:, None], here[None]], exist, channels < depth)
                chosen = chosen_here
                if choice is not None and reads.transposed:
                    chosen = _row_of_weights(choice, reads, read, exist)

                def add_expert(e: Any, sums: Any) -> Any:
                    total_of_block, z = sums
                    matrix = matrix_of(e, step, block)

                    def weighted(values: Any) -> Array:
                        weight = triton.load(choice.weights.at[chosen, e], mask=exist, other=0)
                        return weight.astype(values.dtype)[:, None] * values

                    if inner is None:  # then what is weighted is read by the product from registers
                        return total_of_block + dot(weighted(ours), matrix, precision), z
                    product: Any = dot(ours, matrix, precision)
                    if total is not None:
                        total_of_block += weighted(product)
                    z_e = (product * theirs.astype(product.dtype)).sum(axis=1)
                    z += jnp.where(_columns(z) == e, z_e[:, None], 0)
                    return total_of_block, z

                return loop(0, experts, add_expert, sums)

            zero = None if total is None else jnp.zeros((tile.rows, tile.wide), jnp.float32)
            total_of_block, z = loop(0, steps, add_step, (zero, z))
            if total is not None:
                store(total.at[rows[:, None], columns[None]], total_of_block, inside, real)
            return z

        zero = None
        if inner is not None:
            zero = jnp.zeros((tile.rows, pl.next_power_of_2(experts)), jnp.float32)
        # A program that holds its matrices has one block; its loop over positions, with no other
        # inside, is one that Triton reads ahead for.
        z = add_block(first, zero) if tile.held else jax.lax.fori_loop(first, end, add_block, zero)
        if inner is not None:
            real = jnp.arange(z.shape[1], dtype=jnp.int32) < experts
            store(inner.at[share, rows[:, None], _columns(z)], z, inside, real)

    if tile.held:
        tiles = pl.cdiv(pl.cdiv(all_rows, tile.rows), programs)
        jax.lax.fori_loop(0, tiles, multiply_rows, None)
    else:
        multiply_rows(0, None)


def _bank_gradient(
    precision: Any,
    interpret: bool,
    reads: _Reads,
    x: Float[Array, "input_rows depths"],
    dy: Float[Array, "rows widths"],
    matrices: Float[Array, "n taps groups depth width"],
    choice: _Choice,
) -> Float[Array, "n taps groups depth width"]:
    """dV_e = sum_p a_e[p] (window of x at p) dy[p]^T.

    A program has a block of the matrices of one tap and some experts, and a part of the positions;
    there are so many parts that there are `_PROGRAMS` programs. The parts' sums are added here.
    """
    experts, taps, groups, depth, width = matrices.shape
    rows, channels = _tile_of_bank(x.dtype, precision)
    blocks = (
        pl.cdiv(experts, 4),  # four sums of 64x64 take 128 registers of each of 128 threads
        taps,
        groups,
        pl.cdiv(depth, block_of(depth, channels)),
        pl.cdiv(width, block_of(width, channels)),
    )
    parts = min(pl.cdiv(_PROGRAMS, math.prod(blocks)), pl.cdiv(len(dy), rows))
    sums = _call(
        functools.partial(_experts_bank_gradient_kernel, precision, reads, blocks),
        (math.prod(blocks), parts),
        (x, dy, choice),
        struct((parts, *matrices.shape), jnp.float32, x),
        3,
        interpret,
    )
    return sums.sum(axis=0).astype(matrices.dtype)


def _experts_bank_gradient_kernel(
    precision: Any,
    reads: _Reads,
    blocks: tuple[int, ...],
    x: Any,
    dy: Any,
    choice: Any,
    sums: Any,
) -> None:
    """See `_bank_gradient`: a part of the positions, for a block of some experts' matrices."""
    experts, _, _, depth, width = sums.shape[1:]
    rows_of_tile, most = _tile_of_bank(x.dtype, precision)
    deep, wide = block_of(depth, most), block_of(width, most)
    (some, tap, g, k, f), part = _unravel(pl.program_id(0), blocks), pl.program_id(1)
    channels, columns = _range(k, deep), _range(f, wide)
    of_program = pl.cdiv(experts, blocks[0])
    ours = [some * of_program + i for i in range(of_program)]

    def add_rows(i: Array, totals: list[Array]) -> list[Array]:
        rows = _range(i, rows_of_tile)
        inside = rows < dy.shape[0]
        read, exist = reads.rows(rows, tap)
        exist &= inside
        chosen = _row_of_weights(choice, reads, rows, exist)
        window = load(x.at[read[:, None], (g * depth + channels)[None]], exist, channels < depth)
        results = load(dy.at[rows[:, None], (g * width + columns)[None]], exist, columns < width)

        def add(total: Array, e: Array) -> Array:
            weight = triton.load(choice.weights.at[chosen, e], mask=exist & (e < experts), other=0)
            return total + dot(weight[None] * window.T, results, precision)

        return [add(total, e) for total, e in zip(totals, ours, strict=True)]

    zeros = [jnp.zeros((deep, wide), jnp.float32) for _ in ours]
    of_part = pl.cdiv(pl.cdiv(dy.shape[0], rows_of_tile), sums.shape[0])
    totals = jax.lax.fori_loop(part * of_part, (part + 1) * of_part, add_rows, zeros)
    for total, e in zip(totals, ours, strict=True):
        real = (channels < depth) & (e < experts)
        block = sums.at[part, e, tap, g, channels[:, None], columns[None]]
        store(block, total, real, columns < width)


def _tile_of_bank(dtype: Any, precision: Any) -> tuple[int, int]:
    """Positions and channels of which the bank's gradient sums products at once."""
    return (32, 32) if _is_exact(dtype, precision) else (64, 64)


def _row_of_weights(choice: Any, reads: _Reads, rows: Array, inside: Array) -> Array:
    """The row of weights of these positions of the output: that of their largest guide feature.

    As `guide.region_index`: of equals the first, and the first NaN before everything else.
    """
    regions = choice.guide.shape[1]
    columns = jnp.arange(pl.next_power_of_2(regions), dtype=jnp.int32)
    block = choice.guide.at[rows[:, None], columns[None]]
    features = load(block, inside, columns < regions).astype(jnp.float32)
    unknown = features != features
    ordered = jnp.where(unknown | (columns >= regions)[None], -jnp.inf, features)
    largest = ordered == ordered.max(axis=1)[:, None]
    first = jnp.where(unknown.astype(jnp.int32).max(axis=1)[:, None] > 0, unknown, largest)
    index = jnp.where(first, columns[None], regions).min(axis=1)
    return jax.lax.div(rows, math.prod(reads.outputs)) * regions + index


def _padded(
    matrices: Float[Array, "n taps groups depth width"], deep: int, wide: int
) -> Float[Array, "n taps groups padded_depth padded_width"]:
    """With zeros up to whole blocks, which are read without masks: a bank is small."""
    ends = [(0, -n % block) for n, block in zip(matrices.shape[-2:], (deep, wide), strict=True)]
    return jnp.pad(matrices, [(0, 0)] * 3 + ends)


def _call(
    kernel: Any, grid: tuple[int, ...], arrays: Any, results: Any, stages: int, interpret: bool
) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=results,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=stages),
        interpret=interpret,
    )(*arrays)


def _range(block: Any, size: int) -> Array:
    return block * size + jnp.arange(size, dtype=jnp.int32)


def _columns(values: Array) -> Array:
    return jnp.arange(values.shape[1], dtype=jnp.int32)[None]


def _unravel(number: Any, shape: tuple[int, ...]) -> list[Any]:
    """The index of an entry, in row-major order."""
    index: list[Any] = []
    for length in reversed(shape):
        known = isinstance(number, int)  # in a loop that is unrolled
        index.insert(0, number % length if known else jax.lax.rem(number, length))
        number = number // length if known else jax.lax.div(number, length)
    return index


def _unrolled(start: int, stop: int, body: Any, carry: Any) -> Any:
    """As `jax.lax.fori_loop`, with a copy of the body for every number."""
    for i in range(start, stop):
        carry = body(i, carry)
    return carry
