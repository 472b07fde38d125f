"""Pure XLA: every position convolved with a mixture of filters that the whole batch shares.

With a_e[p] the weight of expert e at position p, which is that of its sample's region,

    y[p] = sum_e a_e[p] (V_e * x)[p]

where the experts V are the same for all samples. No sample's filters are made, nothing is sorted
or gathered: these are E convolutions of arithmetic in a few dense products, with little more memory
traffic than one convolution has, which is right where arithmetic is cheap, on matrix units. Regions
that have banks of their own have m times as many experts, most of which weigh nothing.

As nothing depends on the guide but the weights, `jit` over a mesh parts it by itself, and the sum
of the bank's gradient is the only message among devices.

It is written for what TPUs fuse: what scales an operand, into the product that reads it; a sum over
an axis of a product's result, into the product.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drconv_jax.dtypes import accumulator
from drconv_jax.guide import region_index, region_index_by_comparison
from drconv_jax.region_conv.mixture import Mixture
from drconv_jax.region_conv.products import wide_einsum
from drconv_jax.region_conv.spec import ConvSpec


def supports(spec: ConvSpec, x: Any, filters: Any, guide_features: Any) -> None:
    """See `spec.Implementation.supports`."""
    del spec, x, guide_features
    taps = filters.weights.shape[2:-1]
    if math.prod(taps) != 1:
        raise NotImplementedError(
            f"takes weights that all taps share, not one for each of {taps} taps"
        )


def forward(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Mixture,
    guide_features: Float[Array, "batch *out_spatial regions"],
) -> Float[Array, "batch *out_spatial features"]:
    """See `spec.Implementation.forward`."""
    weights, experts = experts_of(filters)
    shares = _shares(weights, guide_features)
    if _is_product(spec):
        y = _product("PEC,ECF->PF", _scaled(x, shares), _matrices(experts), spec.precision)
    else:
        y = (_outputs(spec, x, experts) * shares[..., None]).astype(accumulator(x.dtype)).sum(-2)
    return y.astype(x.dtype)


def backward(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Mixture,
    guide_features: Float[Array, "batch *out_spatial regions"],
    y: Float[Array, "batch *out_spatial features"],
    dy: Float[Array, "batch *out_spatial features"],
) -> tuple[Float[Array, "batch *spatial in"], Mixture, Float[Array, "batch *out_spatial regions"]]:
    """See `spec.Implementation.backward`."""
    del y
    (weights, experts), to_mixture = jax.vjp(experts_of, filters)
    shared_dy = _scaled(dy, _shares(weights, guide_features))
    if _is_product(spec):
        matrices = _matrices(experts)
        dx = _product("PEF,ECF->PC", shared_dy, matrices, spec.precision).astype(x.dtype)
        dexperts = _product("PC,PEF->ECF", x, shared_dy, spec.precision).reshape(experts.shape)
        through = _product("PF,ECF->PEC", dy, matrices, spec.precision)
        dshares = _inner(through, x)
    else:
        outputs, to_inputs = jax.vjp(functools.partial(_outputs, spec), x, experts)
        dx, dexperts = to_inputs(shared_dy)
        dshares = _inner(outputs, dy)
    out_spatial = tuple(range(1, x.ndim - 1))
    own = jax.nn.one_hot(_region_index(guide_features), weights.shape[1], dtype=bool)[..., None]
    dweights = jnp.where(own, dshares[..., None, :], 0).sum(axis=out_spatial)
    everywhere = jnp.expand_dims(weights.astype(dshares.dtype), out_spatial)
    scores = (dshares[..., None, :] * everywhere).sum(axis=-1)
    (dmixture,) = to_mixture((dweights.astype(weights.dtype), dexperts.astype(experts.dtype)))
    return dx, dmixture, scores


def _region_index(
    guide_features: Float[Array, "batch *out_spatial regions"],
) -> Int[Array, batch * out_spatial]:
    index: Array = jax.lax.platform_dependent(
        guide_features, cpu=region_index, default=region_index_by_comparison
    )
    return index


def experts_of(
    mixture: Mixture,
) -> tuple[
    Float[Array, "batch regions experts"],
    Float[Array, "experts *kernel in_per_group features"],
]:
    """Filters that all regions share, and how each region mixes them.

    A bias is a filter whose weight is 1.
    """
    weights, bank, bias = mixture
    weights = weights.reshape(*weights.shape[:2], weights.shape[-1])
    parts = [(weights, bank)]
    if bias is not None:
        parts.append((jnp.ones_like(weights[..., :1]), bias[:, None]))
    weights_of_parts, experts = zip(*(_shared(*part) for part in parts), strict=True)
    return jnp.concatenate(weights_of_parts, axis=-1), jnp.concatenate(experts)


def _shared(
    weights: Float[Array, "batch regions n"],
    bank: Float[Array, "bank_regions n *kernel in_per_group features"],
) -> tuple[
    Float[Array, "batch regions experts"],
    Float[Array, "experts *kernel in_per_group features"],
]:
    """Regions with a bank each as regions with one bank: those of others weigh nothing."""
    if bank.shape[0] == 1:
        return weights, bank[0]
    own = jnp.eye(bank.shape[0], dtype=bool)[None, :, :, None]
    weights = jnp.where(own, weights[:, :, None], jnp.zeros((), weights.dtype))
    return weights.reshape(*weights.shape[:2], -1), bank.reshape(-1, *bank.shape[2:])


def _shares(
    weights: Float[Array, "batch regions experts"],
    guide_features: Float[Array, "batch *out_spatial regions"],
) -> Float[Array, "batch *out_spatial experts"]:
    """How much of each expert is in a position's filter: the weights of its region.

    TPUs fuse a select with what is around it; a gather, or a product with one-hots, they do not.
    """
    index = _region_index(guide_features)
    shape = (*index.shape, weights.shape[-1])
    of_region = [
        jnp.broadcast_to(jnp.expand_dims(row, range(1, index.ndim)), shape)
        for row in jnp.moveaxis(weights, 1, 0)
    ]
    return jax.lax.select_n(jnp.broadcast_to(index[..., None], shape), *of_region)


def _scaled(
    values: Float[Array, "batch *out_spatial channels"],
    shares: Float[Array, "batch *out_spatial experts"],
) -> Float[Array, "batch *out_spatial experts channels"]:
    """What every expert gets of a position's channels."""
    return shares[..., None] * values[..., None, :]


def _inner(
    outputs: Float[Array, "batch *out_spatial experts channels"],
    values: Float[Array, "batch *out_spatial channels"],
) -> Float[Array, "batch *out_spatial experts"]:
    """<outputs_e[p], values[p]>, its sum wide.

    Its terms are rounded to bfloat16 where `values` are: TPUs would store a copy of them in float32
    for terms in float32. In float16 small terms would vanish.
    """
    wide = accumulator(values.dtype)
    dtype = wide if values.dtype == jnp.float16 else values.dtype
    terms = outputs.astype(dtype) * values[..., None, :].astype(dtype)
    return terms.astype(wide).sum(axis=-1)


def _is_product(spec: ConvSpec) -> bool:
    """Whether the convolution is a product at every position."""
    return spec.window.is_pointwise and spec.groups == 1


def _matrices(
    experts: Float[Array, "experts *kernel in_per_group features"],
) -> Float[Array, "experts in_per_group features"]:
    return experts.reshape(experts.shape[0], *experts.shape[-2:])


def _product(
    equation: str, a: Array, b: Array, precision: jax.lax.Precision | None
) -> Float[Array, ...]:
    """`wide_einsum`; P are the axes of a position, which `a` has."""
    positions = "bxyz"[: a.ndim + 1 - len(equation.split(",")[0])]
    return wide_einsum(equation.replace("P", positions), a, b, precision)


def _outputs(
    spec: ConvSpec, x: Array, experts: Float[Array, "experts *kernel in_per_group features"]
) -> Float[Array, "batch *out_spatial experts features"]:
    """Every expert's convolution of x.

    TPUs fuse a sum over experts into the convolution if the experts are an axis of its windows; if
    they are a part of its features, they store what all experts give. Elsewhere, where such a
    window's zeros are multiplied, they are a part of the features.
    """
    if len(spec.window.kernel_size) == 3:  # no convolution has a fourth axis
        return _outputs_as_features(spec, x, experts)
    return jax.lax.platform_dependent(
        x,
        experts,
        tpu=functools.partial(_outputs_along_an_axis, spec),
        default=functools.partial(_outputs_as_features, spec),
    )


def _outputs_as_features(spec: ConvSpec, x: Array, experts: Array) -> Array:
    spatial = "DHW"[-len(spec.window.strides) :]
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=spec.window.strides,
        padding=spec.window.padding,
        rhs_dilation=spec.window.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=spec.groups,
        precision=spec.precision,
    )
    return jax.vmap(convolve, (None, 0), out_axes=-2)(x, experts)


def _outputs_along_an_axis(spec: ConvSpec, x: Array, experts: Array) -> Array:
    """One position of x meets one expert at each step of a window along a last spatial axis."""
    spatial, count = "DHW"[: len(spec.window.strides)], len(experts)
    return jax.lax.conv_general_dilated(
        jnp.expand_dims(x, -2),
        jnp.moveaxis(experts[::-1], 0, -3),
        (*spec.window.strides, 1),
        (*spec.window.padding, (count - 1, count - 1)),
        rhs_dilation=(*spec.window.dilation, 1),
        dimension_numbers=(f"N{spatial}EC", f"{spatial}EIO", f"N{spatial}EC"),
        feature_group_count=spec.groups,
        precision=spec.precision,
    )
