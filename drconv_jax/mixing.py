"""Filters as mixtures of banks: the last layer of every filter generator."""

from __future__ import annotations

import functools
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
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "batch regions taps size"]:
    """filters[b, r, t] = bias[r] + sum_n weights[b, t, r, n] bank[r, n].

    Sums are taken in float32 or wider. On a CPU this is a native kernel, in both directions: the
    filters of a batch are larger than anything else in a late layer, and XLA copies them around.

    Args:
      weights: how every tap of every sample mixes its region's bank.
      bank: n filters for each region.
      bias: a filter that each region adds.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      Every sample's filters, in the dtype of the weights.
    """
    by_xla = functools.partial(_mix, precision=precision)
    if not cpu.does(weights.dtype):
        return by_xla(weights, bank, bias)
    args = (weights, bank, bias)
    return _native(by_xla, *varying_like(args, *args))


def _mix(weights: Array, bank: Array, bias: Array, *, precision: Any) -> Array:
    wide = accumulator(weights.dtype)
    filters = jnp.einsum(
        "btrn,rnf->brtf", weights, bank, precision=precision, preferred_element_type=wide
    )
    return (filters + bias.astype(wide)[None, :, None]).astype(weights.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(by_xla: Any, weights: Array, bank: Array, bias: Array) -> Array:
    here = per_shard(functools.partial(unless_exported, cpu.mix, by_xla), shared=(1, 2))
    return _by_platform(here, by_xla, weights, bank, bias)


def _native_forward(by_xla: Any, *args: Array) -> tuple[Array, tuple[Array, ...]]:
    return _native(by_xla, *args), args


def _native_backward(by_xla: Any, args: tuple[Array, ...], dfilters: Array) -> tuple[Array, ...]:
    weights, bank, bias = args

    def gradients(weights: Array, bank: Array, dfilters: Array) -> tuple[Array, ...]:
        bias = varying_like(jnp.zeros((bank.shape[0], bank.shape[2]), bank.dtype), bank)
        dweights, dbank, dbias = jax.vjp(by_xla, weights, bank, bias)[1](dfilters)
        return dweights, dbank, dbias

    del bias
    here = per_shard(
        functools.partial(unless_exported, cpu.mix_backward, gradients),
        shared=(1,),
        summed=(1, 2),
    )
    result: tuple[Array, ...] = _by_platform(here, gradients, weights, bank, dfilters)
    return result


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
