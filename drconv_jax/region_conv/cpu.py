"""The native CPU kernel: cpu.cc behind `jax.ffi`."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
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
_MIX = "drconv_mix"
_MIX_BACKWARD = "drconv_mix_backward"
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
    for name in (_FORWARD, _BACKWARD, _MIX, _MIX_BACKWARD):
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


def mix(weights: Array, bank: Array, bias: Array, guide_features: Array) -> Array:
    """See `drconv_jax.mixing.mix`; a guide without positions needs every filter."""
    batch, taps, regions, _ = weights.shape
    shape = jax.ShapeDtypeStruct((batch, regions, taps, bank.shape[-1]), weights.dtype)
    filters: Array = jax.ffi.ffi_call(_MIX, shape)(weights, bank, bias, guide_features)
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
    window = statics.window
    attributes = {
        "strides": np.array(window.strides, np.int64),
        "low": np.array([low for low, _ in window.padding], np.int64),
        "dilation": np.array(window.dilation, np.int64),
        "groups": np.int64(statics.groups),
    }
    guide = guide_features.astype(accumulator(guide_features.dtype))
    return (x, filters, guide), attributes
