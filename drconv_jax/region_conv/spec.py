"""What the dispatcher and the implementations of the region convolution say to each other."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from drconv_jax.geometry import Window
from drconv_jax.region_conv.mixture import Mixture

Filters = Array | Mixture
"""Given filters (batch, regions, *kernel, in_per_group, features), or a mixture of them."""


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """What an implementation is compiled for, besides shapes and dtypes.

    Attributes:
      window: where the windows lie.
      groups: of channels, as `feature_group_count`.
      precision: of the products.
    """

    window: Window
    groups: int
    precision: jax.lax.Precision | None


@runtime_checkable
class Implementation(Protocol):
    """A region convolution and its gradients, but for that of the guide's choice.

    The arguments have been checked, none of them is empty, and neither function is differentiated
    by JAX. Filters are of one of the kinds of `Filters`, as far as `supports` lets them pass; their
    gradient is of the same kind.
    """

    def supports(self, spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
        """Returns where it does what is asked, judging by shapes and dtypes alone.

        Args:
          spec: of the convolution.
          x, filters, guide_features: those of `forward`, or structures of their shapes and dtypes.

        Raises:
          NotImplementedError: it does not. The message says why and reads on from the
            implementation's name, as in "does not compute in float16".
        """

    def forward(
        self,
        spec: ConvSpec,
        x: Float[Array, "batch *spatial in"],
        filters: Any,
        guide_features: Float[Array, "batch *out_spatial regions"],
    ) -> Float[Array, "batch *out_spatial features"]:
        """y[p] = W[argmax F[p]] applied to the window of x at p, in the dtype of x."""

    def backward(
        self,
        spec: ConvSpec,
        x: Float[Array, "batch *spatial in"],
        filters: Any,
        guide_features: Float[Array, "batch *out_spatial regions"],
        y: Float[Array, "batch *out_spatial features"],
        dy: Float[Array, "batch *out_spatial features"],
    ) -> tuple[Float[Array, "batch *spatial in"], Any, Float[Array, "batch *out_spatial regions"]]:
        """dx, dfilters, and scores[p, j] = <dy[p], (W_j * x)[p]> in float32 or wider."""
