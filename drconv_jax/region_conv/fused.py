"""The fast path's shape: an implementation's two functions, and the one gradient rule over them."""

from __future__ import annotations

from typing import Protocol

import jax
from jaxtyping import Array, Float, Int

from drconv_jax.geometry import Window
from drconv_jax.guide import region_index, softmax_vjp


class RegionConv(Protocol):
    """A differentiable region convolution over checked arguments."""

    def __call__(
        self,
        x: Float[Array, "batch *spatial in"],
        filters: Float[Array, "batch regions *kernel in_per_group features"],
        guide_features: Float[Array, "batch *out_spatial regions"],
        window: Window,
        groups: int,
        precision: jax.lax.PrecisionLike,
    ) -> Float[Array, "batch *out_spatial features"]: ...
