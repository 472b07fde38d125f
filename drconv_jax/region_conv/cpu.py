"""The native CPU kernel: cpu.cc behind `jax.ffi`."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import itertools
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from drconv_jax.dtypes import accumulator
from drconv_jax.region_conv.mixture import Mixture
from drconv_jax.region_conv.sharding import varying_like
from drconv_jax.region_conv.spec import ConvSpec as Statics

_FORWARD = "drconv_region_conv_forward"
_BACKWARD = "drconv_region_conv_backward"
_MIXED_FORWARD = "drconv_mixed_region_conv_forward"
_MIXED_BACKWARD = "drconv_mixed_region_conv_backward"
_MIX = "drconv_mix"
_MIX_BACKWARD = "drconv_mix_backward"
_BY_BATCH = (_FORWARD, _BACKWARD)  # all of whose arguments and results have the batch axis first
_CACHED = 4 << 20  # bytes of filters at once
_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)


def _load() -> str:
    """Makes the kernel known to JAX; returns why it cannot be, or nothing."""
    here = pathlib.Path(__file__).parent
    paths = (here / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return "drconv_jax was installed without its native CPU kernel, for want of a C++ compiler"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"drconv_jax's native CPU kernel cannot be loaded ({error}); install it again"
    for name in (_FORWARD, _BACKWARD, _MIXED_FORWARD, _MIXED_BACKWARD, _MIX, _MIX_BACKWARD):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    for name in _BY_BATCH:
        jax.ffi.register_ffi_target_as_batch_partitionable(name)
    return ""


# At import, so that a process can load an executable that another one has serialized.
_missing = _load()


@functools.cache
def available() -> bool:
    """Whether the package has its kernel; the first call warns where it has not."""
    if _missing:
        warnings.warn(
            f'{_missing}; on CPUs it uses the slower implementation "blocked".', stacklevel=2
        )
    return not _missing


def does(dtype: jnp.dtype) -> bool:
    """Whether the kernel is there and computes in `dtype`."""
    return available() and dtype in _DTYPES


def supports(spec, x, filters, guide_features) -> None:
    if not available():
        raise NotImplementedError("is not there: the package was installed without a C++ compiler")
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f"does not do {x.dtype}")


def forward(spec, x, filters, guide_features):
    if isinstance(filters, Mixture):
        return mixed_forward(spec, filters.shape[-1], x, *_old(filters), guide_features)
    shape = jax.ShapeDtypeStruct((*guide_features.shape[:-1], filters.shape[-1]), x.dtype)
    args = x, filters, _wide(guide_features)
    (y,) = _call(_FORWARD, [shape], *args, **_attributes(spec))
    return y


def backward(spec, x, filters, guide_features, y, dy):
    if isinstance(filters, Mixture):
        old, pull = jax.vjp(_old, filters)
        dx, *d, scores = mixed_backward(spec, x, *old, guide_features, y, dy)
        return dx, *pull(tuple(d)), scores
    arguments = x, filters, _wide(guide_features)
    scores = jax.ShapeDtypeStruct(guide_features.shape, accumulator(x.dtype))
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments[:2]]
    return tuple(_call(_BACKWARD, [*like, scores], *arguments, y, dy, **_attributes(spec)))


def _old(m):
    b, r, *k, n = m.weights.shape
    w = m.weights.reshape(b, r, -1, n)
    bank = m.bank.reshape(*m.bank.shape[:2], -1)
    bias = jnp.zeros_like(bank[:, 0]) if m.bias is None else m.bias.reshape(m.bias.shape[0], -1)
    if bank.shape[0] == 1:
        return w.reshape(b, r, 1, n), bank, bias
    return jnp.moveaxis(w, 1, 2), bank, bias


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
    arguments = x, weights, bank, bias, _wide(guide_features)
    (y,) = _call(_MIXED_FORWARD, [shape], *arguments, **_mixed_attributes(statics))
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
    arguments = x, weights, bank, bias, _wide(guide_features), y, dy
    *gradients, _ = _call(_MIXED_BACKWARD, results, *arguments, **_mixed_attributes(statics))
    return tuple(gradients)


def _wide(guide_features: Array) -> Array:
    return guide_features.astype(accumulator(guide_features.dtype))


def _attributes(statics: Statics) -> dict[str, Any]:
    window = statics.window
    return {
        "strides": window.strides,
        "low": tuple(low for low, _ in window.padding),
        "dilation": window.dilation,
        "groups": statics.groups,
    }


def _mixed_attributes(statics: Statics) -> dict[str, Any]:
    return {"kernel": statics.window.kernel_size, **_attributes(statics)}


def _call(
    target: str, results: Sequence[jax.ShapeDtypeStruct], *arrays: Array, **attributes: Any
) -> list[Array]:
    """Calls the kernel's function `target`, whose attributes are integers or tuples of them."""
    shapes = tuple(ShapedArray(result.shape, result.dtype) for result in results)
    called = _native.bind(*arrays, target=target, results=shapes, **attributes)
    typed: list[Array] = varying_like(called, *arrays)
    return typed


# As `jax.ffi.ffi_call`, which cannot tell XLA how a call is parted among devices.
_native = Primitive("drconv_native")
_native.multiple_results = True


def _lower(
    ctx: mlir.LoweringRuleContext, *args: Any, target: str, results: Any, **attributes: Any
) -> Any:
    del results
    shapes = [aval.shape for aval in (*ctx.avals_in, *ctx.avals_out)]
    fixed = all(isinstance(length, int) for shape in shapes for length in shape)
    extra = None
    if target in _BY_BATCH and fixed:
        extra = {
            "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": "1"}),
            "sdy.sharding_rule": mlir.ir.Attribute.parse(_rule_by_batch(shapes, len(args))),
        }
    numbers = {name: np.array(value, np.int64)[()] for name, value in attributes.items()}
    return jax.ffi.ffi_lowering(target, extra_attributes=extra)(ctx, *args, **numbers)


def _rule_by_batch(shapes: Sequence[Sequence[int]], arguments: int) -> str:
    """Shardy's rule for arrays that are parted along their first axis, all of them alike."""
    symbols = itertools.chain("jklmnopqrstuvwxyz", (f"z_{i}" for i in itertools.count(1)))
    rest = [[(next(symbols), length) for length in shape[1:]] for shape in shapes]
    sides = [f"[{', '.join(['i', *(name for name, _ in axes)])}]" for axes in rest]
    factors = list(itertools.chain(*rest))
    mapping = f"({', '.join(sides[:arguments])})->({', '.join(sides[arguments:])})"
    sizes = ", ".join(f"{name}={length}" for name, length in [("i", shapes[0][0]), *factors])
    whole = ", ".join(name for name, _ in factors)
    return f"#sdy.op_sharding_rule<{mapping} {{{sizes}}} need_replication={{{whole}}}, custom>"


_native.def_impl(lambda *args, **params: jax.jit(functools.partial(_native.bind, **params))(*args))
_native.def_abstract_eval(lambda *avals, results, **_: list(results))
mlir.register_lowering(_native, _lower, platform="cpu")
