"""Filters as mixtures of banks: the last layer of every filter generator."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from drconv_jax.dtypes import accumulator
from drconv_jax.region_conv import cpu
from drconv_jax.region_conv.automatic import unless_exported
from drconv_jax.region_conv.sharding import per_shard, varying_like


def mix(
    weights: Float[Array, "batch taps regions n"],
    bank: Float[Array, "regions n size"],
    bias: Float[Array, "regions size"],
    *,
    guide_features: Float[Array, "batch *positions m"] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "batch regions taps size"]:
    """filters[b, r, t] = bias[r] + sum_n weights[b, t, r, n] bank[r, n].

    Sums are taken in float32 or wider. On a CPU this is a native kernel, in both directions: the
    filters of a batch are larger than anything else in a late layer, and XLA copies them around.

    Args:
      weights: how every tap of every sample mixes its region's bank.
      bank: n filters for each region.
      bias: a filter that each region adds.
      guide_features: None leaves everything to XLA. Says that the filters of regions that no
        position of a sample chooses are not needed, the m regions being those here or, where there
        is but one, the taps. Where it is not differentiated, the native kernel then leaves them
        unwritten.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      Every sample's filters, in the dtype of the weights.
    """
    by_xla = functools.partial(_mix, precision=precision)
    if guide_features is None or not cpu.does(weights.dtype):
        return by_xla(weights, bank, bias)
    batch, taps, regions, _ = weights.shape
    if guide_features.shape[-1] == 1:
        guide_features = jnp.zeros((batch, 0, regions if regions > 1 else taps))
    wide = accumulator(guide_features.dtype)
    positions = math.prod(guide_features.shape[1:-1])
    guide = guide_features.astype(wide).reshape(batch, positions, guide_features.shape[-1])
    args = (weights, bank, bias, guide)
    return _native(by_xla, *varying_like(args, *args))


def _mix(weights: Array, bank: Array, bias: Array, *, precision: Any) -> Array:
    wide = accumulator(weights.dtype)
    # XLA's CPU backend cannot do every product of bfloat16 with a wider result.
    filters = jnp.einsum(
        "btrn,rnf->brtf", weights.astype(wide), bank.astype(wide), precision=precision
    )
    return (filters + bias.astype(wide)[None, :, None]).astype(weights.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(by_xla: Any, weights: Array, bank: Array, bias: Array, guide: Array) -> Array:
    def all_by_xla(weights: Array, bank: Array, bias: Array, guide: Array) -> Array:
        del guide
        return by_xla(weights, bank, bias)

    here = per_shard(functools.partial(unless_exported, cpu.mix, all_by_xla), shared=(1, 2))
    return _by_platform(here, all_by_xla, weights, bank, bias, guide)


def _native_forward(
    by_xla: Any, weights: Array, bank: Array, bias: Array, guide: Array
) -> tuple[Array, tuple[Array, ...]]:
    # The guide's gradient needs every filter.
    return _native(by_xla, weights, bank, bias, guide[:, :0]), (weights, bank)


def _native_backward(
    by_xla: Any, args: tuple[Array, Array], dfilters: Array
) -> tuple[Array | None, ...]:
    weights, bank = args

    def gradients(weights: Array, bank: Array, dfilters: Array) -> tuple[Array, ...]:
        bias = varying_like(jnp.zeros((bank.shape[0], bank.shape[2]), bank.dtype), bank)
        dweights, dbank, dbias = jax.vjp(by_xla, weights, bank, bias)[1](dfilters)
        return dweights, dbank, dbias

    here = per_shard(
        functools.partial(unless_exported, cpu.mix_backward, gradients),
        shared=(1,),
        summed=(1, 2),
    )
    return *_by_platform(here, gradients, weights, bank, dfilters), None


_native.defvjp(_native_forward, _native_backward)


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
