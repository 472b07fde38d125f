"""The definition: convolve everything with all m filters, then keep what the mask names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drconv_jax.dtypes import accumulator
from drconv_jax.guide import guide_mask
from drconv_jax.region_conv.spec import ConvSpec


def convolve_with_all(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Float[Array, "batch regions *kernel in_per_group features"],
) -> Float[Array, "batch regions *out_spatial features"]:
    """Every sample convolved with all of its filters, one convolution each."""
    spatial = "DHW"[-len(spec.window.strides) :]

    def convolve(sample: Array, filter: Array) -> Array:
        return jax.lax.conv_general_dilated(
            sample[None],
            filter,
            spec.window.strides,
            spec.window.padding,
            rhs_dilation=spec.window.dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=spec.groups,
            precision=spec.precision,
        )[0]

    return jax.vmap(jax.vmap(convolve, (None, 0)))(x, filters)


@dataclasses.dataclass(frozen=True)
class WithAll:
    """Eq. 3-5 word for word, m times the work and the memory of one convolution.

    Attributes:
      convolve: what is given, or computes the same in another way.
    """

    convolve: Callable[[ConvSpec, Array, Array], Array]

    def supports(self, spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
        """See `spec.Implementation`."""

    def forward(
        self,
        spec: ConvSpec,
        x: Float[Array, "batch *spatial in"],
        filters: Float[Array, "batch regions *kernel in_per_group features"],
        guide_features: Float[Array, "batch *out_spatial regions"],
    ) -> Float[Array, "batch *out_spatial features"]:
        """See `spec.Implementation`. JAX can differentiate this: the guide by Eq. 6-8."""
        everywhere = self.convolve(spec, x, filters)
        mask = jnp.moveaxis(guide_mask(guide_features).astype(everywhere.dtype), -1, 1)
        return (everywhere * mask[..., None]).sum(axis=1).astype(x.dtype)

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
        everywhere, pull = jax.vjp(lambda x, w: self.convolve(spec, x, w), x, filters)
        wide = accumulator(x.dtype)
        scores = (everywhere.astype(wide) * dy.astype(wide)[:, None]).sum(axis=-1)
        mask = jnp.moveaxis(guide_mask(guide_features).astype(everywhere.dtype), -1, 1)
        dx, dfilters = pull(mask[..., None] * dy.astype(everywhere.dtype)[:, None])
        return dx, dfilters, jnp.moveaxis(scores, 1, -1)


reference = WithAll(convolve_with_all)
