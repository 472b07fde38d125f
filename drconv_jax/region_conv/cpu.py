"""The native CPU kernel: cpu.cc behind `jax.ffi`."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from drconv_jax.dtypes import accumulator
from drconv_jax.region_conv.fused import Statics

_FORWARD = "drconv_region_conv_forward"
_BACKWARD = "drconv_region_conv_backward"
_MIXED_FORWARD = "drconv_mixed_region_conv_forward"
_MIXED_BACKWARD = "drconv_mixed_region_conv_backward"
_MIX = "drconv_mix"
_MIX_BACKWARD = "drconv_mix_backward"
_CACHED = 4 << 20  # bytes of filters at once
_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)


@functools.cache
def available() -> bool:
    """Whether the package was built with its kernel; the first call loads it, or warns."""
    path = _library()
    if path is None:
        warnings.warn(
            "drconv_jax was installed without its native CPU kernel, for want of a C++ compiler; "
            'on CPUs it uses the slower implementation "blocked".',
            stacklevel=2,
        )
        return False
    library = ctypes.CDLL(str(path))
    for name in (_FORWARD, _BACKWARD, _MIXED_FORWARD, _MIXED_BACKWARD, _MIX, _MIX_BACKWARD):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _library() -> pathlib.Path | None:
    here = pathlib.Path(__file__).parent
    paths = (here / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def does(dtype: jnp.dtype) -> bool:
    """Whether the kernel is there and computes in `dtype`."""
    return available() and dtype in _DTYPES


def forward(statics: Statics, x: Array, filters: Array, guide_features: Array) -> Array:
    """See `fused.Kernel.forward`."""
    arguments, attributes = _prepare(statics, x, filters, guide_features)
    shape = jax.ShapeDtypeStruct((*guide_features.shape[:-1], filters.shape[-1]), x.dtype)
    y: Array = jax.ffi.ffi_call(_FORWARD, shape)(*arguments, **attributes)
    return y


def backward(
    statics: Statics, x: Array, filters: Array, guide_features: Array, y: Array, dy: Array
) -> tuple[Array, Array, Array]:
    """See `fused.Kernel.backward`."""
    arguments, attributes = _prepare(statics, x, filters, guide_features)
    scores = jax.ShapeDtypeStruct(guide_features.shape, accumulator(x.dtype))
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments[:2]]
    call = jax.ffi.ffi_call(_BACKWARD, (*like, scores))
    dx, dfilters, scores_of = call(*arguments, y, dy, **attributes)
    return dx, dfilters, scores_of


def mixed_forward(
    statics: Statics,
    features: int,
    x: Array,
    weights: Array,
    bank: Array,
    bias: Array,
    guide_features: Array,
) -> Array:
    """`forward` with the filters that `mix` makes; they have as many features."""
    shape = jax.ShapeDtypeStruct((*guide_features.shape[:-1], features), x.dtype)
    call = jax.ffi.ffi_call(_MIXED_FORWARD, shape)
    y: Array = call(x, weights, bank, bias, _wide(guide_features), **_mixed_attributes(statics))
    return y


def mixed_backward(
    statics: Statics,
    x: Array,
    weights: Array,
    bank: Array,
    bias: Array,
    guide_features: Array,
    y: Array,
    dy: Array,
) -> tuple[Array, ...]:
    """`backward` and then `mix_backward`: dx, dweights, dbank, dbias and the scores."""
    wide = accumulator(x.dtype)
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, weights, bank, bias)]
    results.append(jax.ShapeDtypeStruct(guide_features.shape, wide))
    # The filters and their gradients of as few samples as are worth reading the bank for and feed
    # all cores, that these may stay in a cache.
    batch, taps, regions, _ = weights.shape
    filters = taps * regions * bank.shape[-1]
    least = max(_CACHED // wide.itemsize, 2 * bank.size)
    several = max(2 * (os.cpu_count() or 1), -(-least // filters))
    at_once = jax.core.min_dim(batch, several)  # which takes the batch of an export too
    results.append(jax.ShapeDtypeStruct((2, at_once, filters), wide))
    call = jax.ffi.ffi_call(_MIXED_BACKWARD, results)
    arguments = x, weights, bank, bias, _wide(guide_features), y, dy
    *gradients, _ = call(*arguments, **_mixed_attributes(statics))
    return tuple(gradients)


def mix(weights: Array, bank: Array, bias: Array) -> Array:
    """See `drconv_jax.mixing.mix`."""
    batch, taps, regions, _ = weights.shape
    shape = jax.ShapeDtypeStruct((batch, regions, taps, bank.shape[-1]), weights.dtype)
    filters: Array = jax.ffi.ffi_call(_MIX, shape)(weights, bank, bias)
    return filters


def mix_backward(weights: Array, bank: Array, dfilters: Array) -> tuple[Array, Array, Array]:
    """The gradients of `mix` for its three arguments, given that of its result."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (weights, bank)]
    shapes.append(jax.ShapeDtypeStruct((bank.shape[0], bank.shape[2]), bank.dtype))
    dweights, dbank, dbias = jax.ffi.ffi_call(_MIX_BACKWARD, shapes)(weights, bank, dfilters)
    return dweights, dbank, dbias


def _prepare(
    statics: Statics, x: Array, filters: Array, guide_features: Array
) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
    """The kernel's arguments, never reshaped (XLA may copy what gains an axis); attributes."""
    if not available():
        raise NotImplementedError(
            'implementation "cpu" is not there: the package was installed without a C++ compiler.'
        )
    if not does(x.dtype):
        raise NotImplementedError(f'implementation "cpu" does not do {x.dtype}.')
    return (x, filters, _wide(guide_features)), _attributes(statics)


def _wide(guide_features: Array) -> Array:
    return guide_features.astype(accumulator(guide_features.dtype))


def _attributes(statics: Statics) -> dict[str, Any]:
    window = statics.window
    return {
        "strides": np.array(window.strides, np.int64),
        "low": np.array([low for low, _ in window.padding], np.int64),
        "dilation": np.array(window.dilation, np.int64),
        "groups": np.int64(statics.groups),
    }


def _mixed_attributes(statics: Statics) -> dict[str, Any]:
    return {"kernel": np.array(statics.window.kernel_size, np.int64), **_attributes(statics)}
