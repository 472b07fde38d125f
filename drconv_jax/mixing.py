"""Filters as mixtures of banks: the last product of every filter generator.

`mix` makes them. `mixed_region_conv` convolves with them and need not: the filters of a batch are
larger than anything else in a late layer, and a CPU takes longer to write them than to use them.
Its native kernels mix a few at a time, which stay in a cache, and use them at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import Window, window_of
from drconv_jax.guide import softmax_vjp
from drconv_jax.region_conv import automatic, choose, cpu
from drconv_jax.region_conv.automatic import unless_exported_or_partitioned
from drconv_jax.region_conv.derivatives import with_gradient
from drconv_jax.region_conv.fused import Statics, samplewise
from drconv_jax.region_conv.select import select
from drconv_jax.region_conv.sharding import along_batch, varying, varying_like


class Factors(NamedTuple):
    """Filters not yet mixed: filters[b, r, t] = bias[r] + sum_n weights[b, t, r, n] bank[r, n].

    The m regions are those here or, where there is but one, the taps: regions may share a bank.

    Attributes:
      weights: how every tap of every sample mixes its region's bank.
      bank: n filters for each region.
      bias: a filter that each region adds.
    """

    weights: Float[Array, "batch taps regions n"]
    bank: Float[Array, "regions n size"]
    bias: Float[Array, "regions size"]


def mixed_region_conv(
    x: Float[Array, "batch *spatial in"],
    factors: Factors,
    guide_features: Float[Array, "batch *out_spatial m"],
    *,
    features: int,
    kernel_size: Sequence[int],
    feature_group_count: int = 1,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | Sequence[str] | None = None,
    **window_arguments: Any,
) -> Float[Array, "batch *out_spatial features"]:
    """`region_conv` with the filters that `mix` makes (Section 3.3, Eq. 3-5).

    Args:
      x, guide_features: as in `region_conv`.
      factors: of the filters, in the dtype of x.
      features, kernel_size: of the filters.
      feature_group_count, precision, implementation, window_arguments: as in `region_conv`.

    Returns:
      The output in the dtype of x. In bfloat16, filters that are never whole are not rounded.

    Raises:
      ValueError: implementation is no name, or the window has no meaning.
      NotImplementedError: none of the named implementations does what is asked.
    """
    x, window = window_of(x, kernel_size, **window_arguments)
    regions, in_per_group = guide_features.shape[-1], x.shape[-1] // feature_group_count
    filter_shape = (regions, *kernel_size, in_per_group, features)
    call = _Call(window, feature_group_count, filter_shape, precision, implementation)
    if 0 in guide_features.shape:
        return jnp.zeros((*guide_features.shape[:-1], features), x.dtype)
    native = call.is_native and cpu.does(x.dtype)
    y: Array = along_batch(call.at_once if native else call.in_turn)(x, *factors, guide_features)
    return y


@dataclasses.dataclass(frozen=True)
class _Call:
    """A region convolution with mixed filters, apart from its arrays."""

    window: Window
    groups: int
    filter_shape: tuple[int, ...]
    precision: jax.lax.PrecisionLike
    implementation: str | Sequence[str] | None

    @property
    def statics(self) -> Statics:
        """What kernels know of it."""
        precision = jax.lax.Precision(self.precision) if self.precision else None
        return Statics(self.window, self.groups, precision)

    @property
    def is_native(self) -> bool:
        """Whether native kernels may be used."""
        return self.implementation in (None, "cpu")

    def keeps_filters(self, guide_features: Array) -> bool:
        """Whether filters, once mixed, wait for the backward pass.

        Where each serves many positions, they are small, and mixing them twice is not worth it.
        """
        *spatial, regions = guide_features.shape[1:]
        positions = math.prod(spatial)  # of an exported program, it may be a symbol
        return not isinstance(positions, int) or positions > 64 * regions

    def in_turn(self, *args: Array) -> Array:
        """Mixes filters, then convolves; can be differentiated."""
        x, *factors, guide = args
        filters = self._filters(*factors)
        convolve = choose(self.implementation)
        return convolve(x, filters, guide, self.window, self.groups, self.precision)

    def at_once(self, *args: Array) -> Array:
        """Mixes filters where they are used, on a CPU; can be differentiated."""
        if self.keeps_filters(args[-1]):
            return _derived(self._forward, self.in_turn)(*args)
        return with_gradient(self._forward, self._gradient, self._definition)(*args)

    def _forward(self, *args: Array) -> Array:
        native = functools.partial(cpu.mixed_forward, self.statics, self.filter_shape[-1])
        here = functools.partial(unless_exported_or_partitioned, native, self.in_turn)
        y: Array = _by_platform(varying(here), self.in_turn, *args)
        return y

    def _gradient(self, *args: Array) -> tuple[Array, ...]:
        native = functools.partial(cpu.mixed_backward, self.statics)
        here = functools.partial(unless_exported_or_partitioned, native, self._backward_in_turn)
        *gradients, scores = _by_platform(varying(here), self._backward_in_turn, *args)
        *_, guide_features, _, _ = args
        return *gradients, softmax_vjp(guide_features, scores)

    def _definition(self, *args: Array) -> Array:
        x, *factors, guide_features = args
        filters = _mix(*factors, precision=self.precision)
        filters = filters.reshape(filters.shape[0], *self.filter_shape)
        return select(x, filters, guide_features, self.window, self.groups, self.precision)

    def _backward_in_turn(self, *args: Array) -> tuple[Array, ...]:
        """dx, the gradients of the factors, and the scores (`fused.Kernel.backward`)."""
        x, weights, bank, bias, guide, y, dy = args
        filters, pull = jax.vjp(self._filters, weights, bank, bias)
        kernel = automatic if self.implementation is None else cpu
        backward = samplewise(kernel.backward, self.statics)
        dx, dfilters, scores = backward(x, filters, guide, y, dy)
        return dx, *pull(dfilters), scores

    def _filters(self, *factors: Array) -> Array:
        filters = mix(Factors(*factors), native=self.is_native, precision=self.precision)
        return filters.reshape(filters.shape[0], *self.filter_shape)


def _derived(function: Callable[..., Array], like: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, with the derivatives of another that computes the same."""
    derived = jax.custom_jvp(function)
    derived.defjvp(lambda primals, tangents: jax.jvp(like, primals, tangents))
    return lambda *args: derived(*varying_like(args, *args))


def mix(
    factors: Factors, *, native: bool = False, precision: jax.lax.PrecisionLike = None
) -> Float[Array, "batch regions taps size"]:
    """Makes the filters. Sums are taken in float32 or wider.

    Args:
      factors: of them.
      native: whether a native kernel does it on CPUs, in both directions; XLA copies them around.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      Every sample's filters, in the dtype of the weights.
    """
    by_xla = functools.partial(_mix, precision=precision)
    if not native or not cpu.does(factors.weights.dtype):
        return by_xla(*factors)

    def forward(*factors: Array) -> Array:
        here = functools.partial(unless_exported_or_partitioned, cpu.mix, by_xla)
        filters: Array = _by_platform(varying(here), by_xla, *factors)
        return filters

    def gradient(
        weights: Array, bank: Array, bias: Array, filters: Array, dfilters: Array
    ) -> tuple[Array, ...]:
        def gradient_by_xla(weights: Array, bank: Array, dfilters: Array) -> tuple[Array, ...]:
            bias = varying_like(jnp.zeros((bank.shape[0], bank.shape[2]), bank.dtype), bank)
            dweights, dbank, dbias = jax.vjp(by_xla, weights, bank, bias)[1](dfilters)
            return dweights, dbank, dbias

        native = functools.partial(
            unless_exported_or_partitioned, cpu.mix_backward, gradient_by_xla
        )
        gradients: tuple[Array, ...] = _by_platform(
            varying(native), gradient_by_xla, weights, bank, dfilters
        )
        return gradients

    return with_gradient(forward, gradient, by_xla)(*factors)


def _mix(weights: Array, bank: Array, bias: Array, *, precision: Any) -> Array:
    wide = accumulator(weights.dtype)
    # XLA's CPU backend cannot do every product of bfloat16 with a wider result.
    filters = jnp.einsum(
        "btrn,rnf->brtf", weights.astype(wide), bank.astype(wide), precision=precision
    )
    return (filters + bias.astype(wide)[None, :, None]).astype(weights.dtype)


def _by_platform(here: Any, elsewhere: Any, *args: Array) -> Any:
    """`here(*args)` on a CPU; under `vmap` and on other platforms, `elsewhere(*args)`."""

    @custom_vmap
    def choose(*args: Array) -> Any:
        return jax.lax.platform_dependent(*args, cpu=here, default=elsewhere)

    @choose.def_vmap
    def many(axis_size: int, batched: list[bool], *args: Array) -> tuple[Any, Any]:
        del axis_size
        axes = [0 if is_batched else None for is_batched in batched]
        results = jax.vmap(elsewhere, axes)(*args)
        return results, jax.tree.map(lambda _: True, results)

    return choose(*args)
