"""Native kernels for CPUs: the C++ that lies here, called through `drconv_jax.native`.

Of a mixture, a few filters at a time are mixed into memory that stays in a cache, and used at once:
the filters of a batch may be larger than anything else in a late layer, and a CPU takes longer to
write them than to use them.
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drconv_jax import native
from drconv_jax.dtypes import accumulator
from drconv_jax.region_conv.mixture import Mixture
from drconv_jax.region_conv.spec import ConvSpec, Filters

_forward = native.Kernel("drconv_region_conv_forward", by_batch=True)
_backward = native.Kernel("drconv_region_conv_backward", by_batch=True)
_mixed_forward = native.Kernel("drconv_mixed_region_conv_forward")
_mixed_backward = native.Kernel("drconv_mixed_region_conv_backward")

_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)
_CACHED = 4 << 20  # bytes of filters at once, where a gradient mixes them


def supports(spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
    """See `spec.Implementation.supports`."""
    if not native.available():
        raise NotImplementedError("is not there: the package was installed without a C++ compiler")
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f"does not compute in {x.dtype}")
    if isinstance(filters, Mixture):
        of_weights, of_bank = filters.weights.shape[2:-1], filters.bank.shape[2:-2]
        if 1 not in (math.prod(of_weights), math.prod(of_bank)):
            raise NotImplementedError(
                f"mixes whole filters or single taps, not with a kernel of {of_weights} in the "
                f"weights and of {of_bank} in the bank"
            )


def forward(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Filters,
    guide_features: Float[Array, "batch *out_spatial regions"],
) -> Float[Array, "batch *out_spatial features"]:
    """See `spec.Implementation.forward`."""
    y = jax.ShapeDtypeStruct((*guide_features.shape[:-1], filters.shape[-1]), x.dtype)
    if isinstance(filters, Mixture):
        flat: tuple[Array, ...] = _flattened(filters)
        return _mixed_forward([y], x, *flat, _wide(guide_features), **_attributes(spec))[0]
    return _forward([y], x, filters, _wide(guide_features), **_attributes(spec))[0]


def backward(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Filters,
    guide_features: Float[Array, "batch *out_spatial regions"],
    y: Float[Array, "batch *out_spatial features"],
    dy: Float[Array, "batch *out_spatial features"],
) -> tuple[Float[Array, "batch *spatial in"], Filters, Float[Array, "batch *out_spatial regions"]]:
    """See `spec.Implementation.backward`."""
    scores = jax.ShapeDtypeStruct(guide_features.shape, accumulator(x.dtype))
    rest, attributes = (_wide(guide_features), y, dy), _attributes(spec)
    if isinstance(filters, Mixture):
        flat: tuple[Array, ...] = _flattened(filters)
        results = [*map(_like, (x, *flat)), scores, _scratch(filters)]
        gradients = _mixed_backward(results, x, *flat, *rest, **attributes)
        return gradients[0], _in_shape_of(filters, *gradients[1:4]), gradients[4]
    results = [_like(x), _like(filters), scores]
    dx, dfilters, scores_of = _backward(results, x, filters, *rest, **attributes)
    return dx, dfilters, scores_of


def _flattened(
    mixture: Mixture,
) -> tuple[
    Float[Array, "batch regions taps n"],
    Float[Array, "bank_regions n size"],
    Float[Array, "bank_regions size"],
]:
    """Weights, bank and bias, the taps of the kernel and the values of a filter merged."""
    weights, bank, bias = mixture
    batch, regions, *kernel, n = weights.shape
    bank_regions, size = bank.shape[0], math.prod(bank.shape[2:])
    return (
        weights.reshape(batch, regions, math.prod(kernel), n),
        bank.reshape(bank_regions, n, size),
        jnp.zeros((bank_regions, size), bank.dtype)
        if bias is None
        else bias.reshape(bank_regions, size),
    )


def _in_shape_of(mixture: Mixture, weights: Array, bank: Array, bias: Array) -> Mixture:
    """The opposite of `_flattened`."""
    return Mixture(
        weights.reshape(mixture.weights.shape),
        bank.reshape(mixture.bank.shape),
        None if mixture.bias is None else bias.reshape(mixture.bias.shape),
    )


def _scratch(mixture: Mixture) -> jax.ShapeDtypeStruct:
    """Room for filters and their gradients of some samples at once.

    Of as few as are worth reading the bank for and feed all cores, that these may stay in a cache.
    """
    batch, *filters = mixture.shape
    size, wide = math.prod(filters), accumulator(mixture.dtype)
    least = max(_CACHED // wide.itemsize, 2 * mixture.bank.size)
    several = max(2 * (os.cpu_count() or 1), -(-least // size))
    return jax.ShapeDtypeStruct((2, min(batch, several), size), wide)


def _wide(guide_features: Array) -> Array:
    return guide_features.astype(accumulator(guide_features.dtype))


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _attributes(spec: ConvSpec) -> dict[str, Any]:
    window = spec.window
    return {
        "kernel": window.kernel_size,
        "strides": window.strides,
        "low": tuple(low for low, _ in window.padding),
        "dilation": window.dilation,
        "groups": spec.groups,
    }
