"""RoIAlign (He et al., Mask R-CNN, ICCV 2017, Section 3) over one or several feature maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from drconv_jax.detection.boxes import area
from drconv_jax.dtypes import accumulator
from drconv_jax.region_conv.sharding import varying_like


def roi_align(
    features: Float[Array, "height width channels"],
    boxes: Float[Array, "n 4"],
    output_size: tuple[int, int],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Float[Array, "n out_height out_width channels"]:
    """Features of boxes, each resampled to the same size.

    A box is cut into bins; a bin's value is the mean of samples of the features, interpolated
    bilinearly, at points that are spread evenly over it. A point more than one cell outside the map
    counts as 0. Boxes get no gradient.

    Args:
      features: a feature map.
      boxes: in pixels of the image.
      output_size: bins in height and in width.
      spatial_scale: cells of the map in a pixel of the image.
      sampling_ratio: points a side in a bin; -1 takes as many as a bin has cells, rounded up.
      aligned: whether the centre of the first cell is at half a pixel, as it is for images; a box
        of no size then gives 0. Otherwise it is at 0, as in Mask R-CNN, and a box is at least one
        cell high and wide.

    Returns:
      In the dtype of the features; sums are taken in float32 or wider.
    """
    y = multilevel_roi_align(
        [features[None]],
        boxes[None],
        jnp.zeros((1, boxes.shape[0]), jnp.int32),
        output_size,
        spatial_scales=[spatial_scale],
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    return y[0]


def multilevel_roi_align(
    features: Sequence[Float[Array, "batch _ _ channels"]],
    boxes: Float[Array, "batch n 4"],
    levels: Int[Array, "batch n"],
    output_size: tuple[int, int],
    *,
    spatial_scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> Float[Array, "batch n out_height out_width channels"]:
    """`roi_align` of every box of a batch, on the feature map of its own level.

    Nothing is computed for the other levels.

    Args:
      features: the feature maps.
      boxes: in pixels of their images.
      levels: which of the maps each box is read from.
      output_size, sampling_ratio, aligned: see `roi_align`.
      spatial_scales: of every map.
    """
    boxes = jax.lax.stop_gradient(boxes)
    scale = jnp.asarray(spatial_scales, boxes.dtype)[levels]
    offset = 0.5 if aligned else 0.0
    corners = boxes * scale[..., None] - offset
    start, sides = corners[..., 1::-1], (corners[..., 2:] - corners[..., :2])[..., ::-1]
    if not aligned:
        sides = jnp.maximum(sides, 1)
    bins = sides / jnp.asarray(output_size, boxes.dtype)[None, None]
    if sampling_ratio < 1:
        adaptively = functools.partial(_adaptively, output_size=output_size)
        y: Array = jax.vmap(adaptively)(features, levels, start, bins)
        return y
    shapes = np.array([f.shape[1:3] for f in features])
    table = jnp.concatenate([f.reshape(f.shape[0], -1, f.shape[-1]) for f in features], axis=1)
    first = jnp.asarray(np.concatenate([[0], np.cumsum(shapes.prod(axis=1))[:-1]]), jnp.int32)
    size = jnp.asarray(shapes, jnp.int32)[levels]
    (row, of_row), (column, of_column) = (
        _taps(
            _points(start[..., axis], bins[..., axis], output_size[axis], sampling_ratio),
            size[..., axis, None, None],
        )
        for axis in (0, 1)
    )
    row = first[levels][..., None, None] + row * size[..., 1, None, None]
    return _interpolated(table, _Taps(row, column), _Taps(of_row, of_column))


class _Taps(NamedTuple):
    """What is read for every bin: along each axis, the same number of cells.

    The cell of a row and a column is at the sum of their indices in a table of cells, and has the
    product of their weights.
    """

    row: Shaped[Array, "*batch n out_height taps"]
    column: Shaped[Array, "*batch n out_width taps"]

    @property
    def each(self) -> Iterator[tuple[Shaped[Array, "*batch n _ 1"], Shaped[Array, "*batch n 1 _"]]]:
        """The cells of every bin, one after another, by row and by column."""
        for a in range(self.row.shape[-1]):
            for b in range(self.column.shape[-1]):
                yield self.row[..., None, a], self.column[..., None, :, b]


@jax.custom_vjp
def _interpolated(
    table: Float[Array, "batch cells channels"], index: _Taps, weight: _Taps
) -> Float[Array, "batch n out_height out_width channels"]:
    """The sum over taps of weight times cell."""
    # XLA for CPUs reads a batch of tables in many passes, and once more for every use of the sum,
    # but for what is computed in a loop. On a mesh a loop over images would be one over devices.
    return jax.lax.platform_dependent(
        table,
        index,
        weight,
        cpu=lambda *images: jax.lax.map(lambda image: _in_one_pass(*image), images),
        default=jax.vmap(_gathered),
    )


def _in_one_pass(
    table: Float[Array, "cells channels"], index: _Taps, weight: _Taps
) -> Float[Array, "n out_height out_width channels"]:
    """Reads each cell where it is added; XLA for CPUs makes one loop of it."""
    total: Any = 0
    for (y, x), (wy, wx) in zip(index.each, weight.each, strict=True):
        values = table[y + x].astype(accumulator(table.dtype))
        total += (wy * wx)[..., None].astype(values.dtype) * values
    return total.astype(table.dtype)


def _gathered(
    table: Float[Array, "cells channels"], index: _Taps, weight: _Taps
) -> Float[Array, "n out_height out_width channels"]:
    """Reads all cells, then adds; positions are one axis, as tiles of a TPU waste least on it."""
    cells, weights = _all(index, jnp.add), _all(weight, jnp.multiply)
    wide = accumulator(table.dtype)
    values = table[cells.reshape(-1, cells.shape[-1])].astype(wide)
    weights = weights.reshape(-1, weights.shape[-1]).astype(wide)
    total = (weights[..., None] * values).sum(axis=1).astype(table.dtype)
    return total.reshape(*cells.shape[:-1], -1)


def _all(
    taps: _Taps, combine: Callable[[Array, Array], Array]
) -> Shaped[Array, "*batch n out_height out_width taps"]:
    return jnp.stack([combine(y, x) for y, x in taps.each], axis=-1)


def _interpolated_forward(table: Array, index: _Taps, weight: _Taps) -> tuple[Array, Any]:
    return _interpolated(table, index, weight), (table, index, weight)


def _interpolated_backward(residuals: Any, dy: Array) -> tuple[Array, None, None]:
    table, index, weight = residuals
    wide = accumulator(table.dtype)
    cells, weights = (
        jnp.moveaxis(_all(taps, combine), -1, 0)
        for taps, combine in ((index, jnp.add), (weight, jnp.multiply))
    )
    dy = dy.astype(wide)

    # One tap after another: together they are many times as large as dy.
    def add(dtable: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        cell, weight = tap
        values = weight[..., None].astype(wide) * dy
        return jax.vmap(lambda own, i, values: own.at[i].add(values))(dtable, cell, values), None

    zeros = varying_like(jnp.zeros(table.shape, wide), table, cells, dy)
    dtable, _ = jax.lax.scan(add, zeros, (cells, weights))
    return dtable.astype(table.dtype), None, None


_interpolated.defvjp(_interpolated_forward, _interpolated_backward)


def _adaptively(
    features: Sequence[Float[Array, "_ _ channels"]],
    levels: Int[Array, " n"],
    start: Float[Array, "n 2"],
    bins: Float[Array, "n 2"],
    output_size: tuple[int, int],
) -> Float[Array, "n out_height out_width channels"]:
    """With as many points in a bin as it has cells, which differ from box to box: as products."""
    total: Any = 0
    for level, values in enumerate(features):
        wide = accumulator(values.dtype)
        rows, columns = (
            _mean_of_points(start[:, axis], bins[:, axis], output_size[axis], values.shape[axis])
            for axis in (0, 1)
        )
        rows = jnp.where((levels == level)[:, None, None], rows, 0)
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        y = product("nyh,hwc->nywc", rows.astype(wide), values.astype(wide))
        total += product("nxw,nywc->nyxc", columns.astype(wide), y)
    return total.astype(features[0].dtype)


def _mean_of_points(
    start: Float[Array, " n"], bins: Float[Array, " n"], count: int, size: int
) -> Float[Array, "n bins size"]:
    """How much of each cell of an axis is in each bin, points as dense as cells."""
    points = jnp.ceil(bins)  # a side; a box of no size has none
    cells = jnp.arange(size, dtype=bins.dtype)[None, None]
    at = start[:, None] + jnp.arange(count, dtype=bins.dtype)[None] * bins[:, None]

    def add(i: Array, total: Array) -> Array:
        step = (i.astype(bins.dtype) + 0.5) * bins / jnp.maximum(points, 1)
        point = (at + step[:, None])[..., None]
        counts = (point >= -1) & (point <= size) & (i < points)[:, None, None]
        near = jnp.maximum(1 - jnp.abs(cells - jnp.clip(point, 0, size - 1)), 0)
        return total + jnp.where(counts, near, 0)

    zeros = varying_like(jnp.zeros((*at.shape, size), bins.dtype), at)
    total = jax.lax.fori_loop(0, points.max(initial=0).astype(jnp.int32), add, zeros)
    return total / jnp.maximum(points, 1)[:, None, None]


def levels_of(
    boxes: Float[Array, "*n 4"],
    count: int,
    *,
    finest: int = 2,
    canonical_level: int = 4,
    canonical_size: float = 224.0,
) -> Int[Array, "*n"]:
    """The level of a pyramid that a box's features are read from (FPN, Section 4.2, Eq. 1).

    Args:
      boxes: in pixels.
      count: levels of the pyramid.
      finest: binary logarithm of the first level's stride.
      canonical_level, canonical_size: a box of this size, in pixels, is on this level.

    Returns:
      From 0 to count - 1.
    """
    size = jnp.sqrt(area(boxes))
    level = jnp.floor(canonical_level + jnp.log2(size / canonical_size) + 1e-6)
    return (jnp.clip(level, finest, finest + count - 1) - finest).astype(jnp.int32)


def _points(
    start: Float[Array, "batch n"], bins: Float[Array, "batch n"], count: int, ratio: int
) -> Float[Array, "batch n bins points"]:
    """Coordinates of the points in every bin, on one axis."""
    at = jnp.arange(count, dtype=start.dtype)[None, None, :, None]
    inside = (jnp.arange(ratio, dtype=start.dtype) + 0.5)[None, None, None]
    start, bins = start[..., None, None], bins[..., None, None]
    return start + at * bins + inside * bins / ratio


def _taps(
    points: Float[Array, "batch n bins points"], size: Int[Array, "batch n 1 1"]
) -> tuple[Int[Array, "batch n bins taps"], Float[Array, "batch n bins taps"]]:
    """The two cells that each point is interpolated of, on one axis, and their weights."""
    inside = (points >= -1) & (points <= size.astype(points.dtype))
    point = jnp.clip(points, 0, (size - 1).astype(points.dtype))
    low = jnp.floor(point)
    beyond = point - low
    cells = jnp.stack([low, jnp.minimum(low + 1, (size - 1).astype(low.dtype))], axis=-1)
    weights = jnp.stack([1 - beyond, beyond], axis=-1) / points.shape[-1]
    weights = jnp.where(inside[..., None], weights, 0)
    cells, weights = (value.reshape(*value.shape[:3], -1) for value in (cells, weights))
    return cells.astype(jnp.int32), weights
