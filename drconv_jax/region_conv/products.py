"""A convolution as products: what every output position reads, times the matrix of its region."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import Window, tap_views
from drconv_jax.guide import region_index
from drconv_jax.region_conv.spec import ConvSpec


def patches_of(
    x: Array, window: Window, groups: int
) -> Float[Array, "batch positions groups taps_in"]:
    """Every output position's window, group by group; for a pointwise window x itself."""
    batch, *spatial, channels = x.shape
    if window.is_pointwise:
        return x.reshape(batch, math.prod(spatial), groups, channels // groups)
    taps = tap_views(x, window)
    positions = math.prod(taps[0].shape[1:-1])
    stacked = jnp.stack(taps, axis=-2).reshape(
        batch, positions, len(taps), groups, channels // groups
    )
    rows = len(taps) * channels // groups
    return jnp.moveaxis(stacked, -2, -3).reshape(batch, positions, groups, rows)


def matrices_of(
    filters: Array, groups: int
) -> Float[Array, "batch regions groups taps_in features"]:
    """The filters as matrices that multiply `patches_of`, group by group."""
    batch, regions, *kernel, in_per_group, features = filters.shape
    rows = math.prod(kernel) * in_per_group
    split = filters.reshape(batch, regions, rows, groups, features // groups)
    return jnp.moveaxis(split, -2, 2)


def flat_regions(
    guide_features: Float[Array, "batch *out_spatial regions"],
) -> Int[Array, "batch positions"]:
    """The regions of a sample's positions in one row."""
    index = region_index(guide_features)
    return index.reshape(index.shape[0], math.prod(index.shape[1:]))


def wide_einsum(
    equation: str, a: Array, b: Array, precision: jax.lax.Precision | None
) -> Float[Array, ...]:
    """An einsum whose sums and result are in float32 or wider."""
    wide = accumulator(a.dtype)
    multiply = functools.partial(
        jnp.einsum, equation, precision=precision, preferred_element_type=wide
    )
    if a.dtype == wide:
        return multiply(a, b)
    # XLA's CPU backend does not do every product of bfloat16 values with a float32 result.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: multiply(a.astype(wide), b.astype(wide)), default=multiply
    )


def _anything(spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
    del spec, x, filters, guide_features


@dataclasses.dataclass(frozen=True)
class Products:
    """An implementation made of a product of windows with the matrices of their regions.

    Attributes:
      multiply: (precision, patches, matrices, index) to (batch, positions, groups, features).
      multiply_backward: the same and dy to the gradients of patches and matrices, and the scores
        (batch, positions, regions).
      check: `spec.Implementation.supports`, of filters that are given.
    """

    multiply: Callable[..., Array]
    multiply_backward: Callable[..., tuple[Array, Array, Array]]
    check: Callable[[ConvSpec, Any, Any, Any], None] = _anything

    def supports(self, spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
        """See `spec.Implementation`."""
        self.check(spec, x, filters, guide_features)

    def forward(
        self,
        spec: ConvSpec,
        x: Float[Array, "batch *spatial in"],
        filters: Float[Array, "batch regions *kernel in_per_group features"],
        guide_features: Float[Array, "batch *out_spatial regions"],
    ) -> Float[Array, "batch *out_spatial features"]:
        """See `spec.Implementation`."""
        patches = patches_of(x, spec.window, spec.groups)
        matrices = matrices_of(filters, spec.groups)
        y = self.multiply(spec.precision, patches, matrices, flat_regions(guide_features))
        return y.reshape(*guide_features.shape[:-1], filters.shape[-1])

    def backward(
        self,
        spec: ConvSpec,
        x: Float[Array, "batch *spatial in"],
        filters: Float[Array, "batch regions *kernel in_per_group features"],
        guide_features: Float[Array, "batch *out_spatial regions"],
        y: Float[Array, "batch *out_spatial features"],
        dy: Float[Array, "batch *out_spatial features"],
    ) -> tuple[Array, Array, Array]:
        """See `spec.Implementation`."""
        del y
        patches, to_input = jax.vjp(lambda x: patches_of(x, spec.window, spec.groups), x)
        matrices, to_filters = jax.vjp(lambda w: matrices_of(w, spec.groups), filters)
        dpatches, dmatrices, scores = self.multiply_backward(
            spec.precision,
            patches,
            matrices,
            flat_regions(guide_features),
            dy.reshape(*patches.shape[:3], matrices.shape[-1]),
        )
        return *to_input(dpatches), *to_filters(dmatrices), scores.reshape(guide_features.shape)
