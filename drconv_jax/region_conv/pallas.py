"""Fused kernels for TPU and GPU: one pass over the positions, nothing with a factor m stored.

Here the convolution becomes a product of windows with the filters of their regions; the kernels
of `pallas_tpu` and `pallas_gpu` compute that product and its gradients. On a CPU the TPU's kernel
is interpreted, which is slow and for tests.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from drconv_jax.region_conv import pallas_gpu, pallas_tpu
from drconv_jax.region_conv.automatic import unless_partitioned
from drconv_jax.region_conv.blocked import multiply, multiply_backward
from drconv_jax.region_conv.fused import Statics
from drconv_jax.region_conv.products import flat_regions, matrices_of, patches_of
from drconv_jax.region_conv.sharding import per_shard, varying

# JAX 0.12 deprecates Pallas' way to Triton: from there on a GPU computes region by region.
TRITON = jax.__version_info__ < (0, 12)
_XLA: dict[str, Callable[..., Any]] = {"forward": multiply, "backward": multiply_backward}
_GPU: dict[str, Callable[..., Any]] = (
    {"forward": pallas_gpu.forward, "backward": pallas_gpu.backward} if TRITON else _XLA
)


def forward(statics: Statics, x: Array, filters: Array, guide_features: Array) -> Array:
    """See `fused.Kernel.forward`."""
    _check(x)
    y: Array = per_shard(functools.partial(_forward, statics))(x, filters, guide_features)
    return y


def backward(
    statics: Statics, x: Array, filters: Array, guide_features: Array, y: Array, dy: Array
) -> tuple[Array, Array, Array]:
    """See `fused.Kernel.backward`."""
    del y
    _check(x)
    run = per_shard(functools.partial(_backward, statics))
    gradients: tuple[Array, Array, Array] = run(x, filters, guide_features, dy)
    return gradients


def _forward(statics: Statics, x: Array, filters: Array, guide_features: Array) -> Array:
    shape = (*guide_features.shape[:-1], filters.shape[-1])
    if math.prod(shape) * x.size == 0:
        return jnp.zeros(shape, x.dtype)
    patches, matrices = (
        patches_of(x, statics.window, statics.groups),
        matrices_of(filters, statics.groups),
    )
    y = _by_platform("forward", statics, patches, matrices, flat_regions(guide_features))
    return y.reshape(shape)


def _backward(
    statics: Statics, x: Array, filters: Array, guide_features: Array, dy: Array
) -> tuple[Array, Array, Array]:
    shape = guide_features.shape
    if dy.size * x.size == 0:
        return jnp.zeros_like(x), jnp.zeros_like(filters), jnp.zeros(shape, jnp.float32)
    patches, to_input = jax.vjp(lambda x: patches_of(x, statics.window, statics.groups), x)
    matrices, to_filters = jax.vjp(lambda w: matrices_of(w, statics.groups), filters)
    dy = dy.reshape(*patches.shape[:3], matrices.shape[-1])
    dpatches, dmatrices, scores = _by_platform(
        "backward", statics, patches, matrices, flat_regions(guide_features), dy
    )
    return *to_input(dpatches), *to_filters(dmatrices), scores.reshape(shape)


def _check(x: Array) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f'implementation "pallas" does not do {x.dtype}.')


def _by_platform(direction: str, statics: Statics, *arrays: Array) -> Any:
    tpu = functools.partial(getattr(pallas_tpu, direction), statics.precision)
    xla = functools.partial(_XLA[direction], statics.precision)
    gpu = functools.partial(_GPU[direction], statics.precision)
    return jax.lax.platform_dependent(
        *arrays,
        tpu=varying(functools.partial(unless_partitioned, tpu, xla)),
        cuda=gpu,
        default=functools.partial(tpu, interpret=True),
    )
