"""The fast path: what a kernel must offer, and the gradient rule that all kernels share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from drconv_jax.geometry import Window
from drconv_jax.guide import softmax_vjp
from drconv_jax.region_conv.derivatives import with_gradient
from drconv_jax.region_conv.select import select


@runtime_checkable
class RegionConv(Protocol):
    """A differentiable region convolution over arguments that `region_conv` has checked."""

    def __call__(
        self,
        x: Float[Array, "batch *spatial in"],
        filters: Float[Array, "batch regions *kernel in_per_group features"],
        guide_features: Float[Array, "batch *out_spatial regions"],
        window: Window,
        groups: int,
        precision: jax.lax.PrecisionLike,
    ) -> Float[Array, "batch *out_spatial features"]:
        """Computes y; see `drconv_jax.region_conv`."""


@dataclasses.dataclass(frozen=True)
class Statics:
    """What a kernel is compiled for, besides shapes and dtypes."""

    window: Window
    groups: int
    precision: Any


@runtime_checkable
class Kernel(Protocol):
    """A region convolution and its gradients, but for that of the guide's choice.

    Neither function is differentiated. Either raises NotImplementedError at trace time for what
    it does not do.
    """

    def forward(
        self,
        statics: Statics,
        x: Float[Array, "batch *spatial in"],
        filters: Float[Array, "batch regions *kernel in_per_group features"],
        guide_features: Float[Array, "batch *out_spatial regions"],
    ) -> Float[Array, "batch *out_spatial features"]:
        """y[p] = W[argmax F[p]] applied to the window of x at p."""

    def backward(
        self,
        statics: Statics,
        x: Float[Array, "batch *spatial in"],
        filters: Float[Array, "batch regions *kernel in_per_group features"],
        guide_features: Float[Array, "batch *out_spatial regions"],
        y: Float[Array, "batch *out_spatial features"],
        dy: Float[Array, "batch *out_spatial features"],
    ) -> tuple[
        Float[Array, "batch *spatial in"],
        Float[Array, "batch regions *kernel in_per_group features"],
        Float[Array, "batch *out_spatial regions"],
    ]:
        """dx, dfilters, and scores[p, j] = <dy[p], (W_j * x)[p]> in float32 or wider."""


def fused(kernel: Kernel) -> RegionConv:
    """The differentiable region convolution of a kernel (Eq. 3-8).

    The kernel gives every region's score; the guide's softmax gradient is made of them here.
    """

    def region_conv(
        x: Array,
        filters: Array,
        guide_features: Array,
        window: Window,
        groups: int,
        precision: jax.lax.PrecisionLike,
    ) -> Array:
        statics = Statics(window, groups, jax.lax.Precision(precision) if precision else None)
        backward = samplewise(kernel.backward, statics)

        def gradient(*args: Array) -> tuple[Array, Array, Array]:
            dx, dfilters, scores = backward(*args)
            return dx, dfilters, softmax_vjp(args[2], scores)

        convolve = with_gradient(
            samplewise(kernel.forward, statics),
            gradient,
            functools.partial(select, window=window, groups=groups, precision=precision),
        )
        return convolve(x, filters, guide_features)

    return region_conv


def samplewise(function: Callable[..., Any], statics: Statics) -> Callable[..., Any]:
    """A kernel's `function` over arrays with a batch axis, into which `vmap` folds its own."""
    return foldable(functools.partial(function, statics))


def foldable(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` over arrays with a leading batch axis, into which `vmap` folds its own."""
    function = custom_vmap(function)

    @function.def_vmap
    def fold(axis_size: int, batched: list[bool], *args: Array) -> tuple[Any, Any]:
        whole = [
            a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            for a, is_batched in zip(args, batched, strict=True)
        ]
        result = function(*(a.reshape(-1, *a.shape[2:]) for a in whole))
        parted = jax.tree.map(
            lambda r: r.reshape(axis_size, r.shape[0] // axis_size, *r.shape[1:]), result
        )
        return parted, jax.tree.map(lambda _: True, parted)

    return function
