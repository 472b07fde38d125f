"""The region convolution: every position is convolved with the filter of its own region.

One door, `region_conv`, with several implementations behind it. `reference` is the definition;
the others are held to it, values and every gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drconv_jax.checks import check_count, check_guide_dtype, check_precision
from drconv_jax.geometry import Padding, window_of
from drconv_jax.region_conv import dispatch
from drconv_jax.region_conv.dispatch import IMPLEMENTATIONS
from drconv_jax.region_conv.mixture import Mixture, mix
from drconv_jax.region_conv.sharding import along_batch
from drconv_jax.region_conv.spec import ConvSpec

__all__ = ["IMPLEMENTATIONS", "Mixture", "mix", "region_conv"]


def region_conv(
    x: Float[Array, "batch *spatial in"],
    filters: Float[Array, "batch regions *kernel in_per_group features"] | Mixture,
    guide_features: Float[Array, "batch *out_spatial regions"],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "batch *out_spatial features"]:
    """y[p] = W[M[p]] applied to the window of x at p, with M = argmax F (Eq. 3-5).

    A window may reach into a neighbouring region. The gradient of the guide features is that of a
    soft mask, softmax(F) in place of the one-hot of M (Eq. 6-8); x and the filters get the
    gradient of the hard forward.

    Args:
      x: the input, channels last, with 1, 2 or 3 spatial dimensions.
      filters: m filters for every sample, in the dtype of x, or a mixture of them, which need not
        be mixed to be used.
      guide_features: one logit per region at every position of the output.
      strides, padding, input_dilation, kernel_dilation, feature_group_count, precision: as in
        `flax.linen.Conv`.
      implementation: a name, or names to try in turn (one that does not do what is asked passes
        it on to the next), or None to choose by platform (`region_conv.cost_model`).
        "reference" is the definition. "select" is products and a select, for converters to other
        formats. "blocked" is pure XLA and takes everything. "cpu" is made of native kernels.
        "experts_first" is pure XLA, for mixtures whose taps share weights;
        "experts_first_tpu" and "experts_first_gpu" are the same in kernels, for a bank that all
        regions share. "pallas_tpu" and "pallas_gpu" are kernels
        for filters that are mixed already, which a CPU interprets, slowly.

    Returns:
      The output in the dtype of x; on a mesh with Explicit axes, sharded along the batch as x is.

    Raises:
      ValueError: the shapes do not fit each other, or an argument has no meaning.
      TypeError: x and filters have different dtypes, or a dtype is not floating point.
      NotImplementedError: none of the named implementations does what is asked.
    """
    dispatch.names_of(implementation)
    if isinstance(filters, tuple) and not isinstance(filters, Mixture):
        raise TypeError("filters must be an array or a Mixture, got a tuple.")
    rank = x.ndim - 2
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != filters.dtype:
        raise TypeError(
            f"x and filters must have the same floating-point dtype, got {x.dtype} and "
            f"{filters.dtype}."
        )
    check_guide_dtype(guide_features)
    check_precision(precision)
    if rank not in (1, 2, 3):
        raise ValueError(
            "x must have shape (batch, *spatial, in) with 1, 2 or 3 spatial dimensions, got "
            f"{x.shape}."
        )
    if isinstance(filters, Mixture):
        _check_mixture(filters, rank)
    if len(filters.shape) != rank + 4 or filters.shape[0] != x.shape[0]:
        raise ValueError(
            f"filters must have shape (batch, regions, *kernel, in/groups, features) with batch "
            f"{x.shape[0]} and {rank} kernel dimensions as x has, got {filters.shape}."
        )
    groups, (in_per_group, features) = feature_group_count, filters.shape[-2:]
    check_count("feature_group_count", groups)
    if features % groups:
        raise ValueError(f"feature_group_count must divide features={features}, got {groups}.")
    if in_per_group * groups != x.shape[-1]:
        raise ValueError(
            f"filters of shape {filters.shape} read {in_per_group} channels in each of {groups} "
            f"groups, but x has {x.shape[-1]} channels, which takes {x.shape[-1] / groups:g}."
        )
    x, window = window_of(
        x,
        filters.shape[2:-2],
        strides=strides,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
    )
    regions = filters.shape[1]
    expected = (x.shape[0], *window.output_shape(x.shape[1:-1]), regions)
    if regions < 1 or guide_features.shape != expected:
        raise ValueError(
            f"guide_features must have shape (batch, *out_spatial, regions) = {expected} with at "
            f"least one region for these x and filters, got {guide_features.shape}."
        )
    if 0 in (*x.shape, *expected, *filters.shape):  # a convolution of nothing, or without output
        return jnp.zeros_like(x, shape=(*expected[:-1], features))
    spec = ConvSpec(window, groups, jax.lax.Precision(precision) if precision else None)
    convolve = functools.partial(dispatch.convolve, spec, implementation=implementation)
    y: Array = along_batch(convolve)(x, filters, guide_features)
    return y


def _check_mixture(mixture: Mixture, rank: int) -> None:
    weights, bank, bias = mixture
    kernels = zip(weights.shape[2:-1], bank.shape[2:-2], strict=False)
    if (
        weights.ndim != rank + 3
        or weights.shape[-1] < 1
        or bank.ndim != rank + 4
        or bank.shape[:2] not in ((1, weights.shape[-1]), (weights.shape[1], weights.shape[-1]))
        or any(1 not in sizes and len(set(sizes)) > 1 for sizes in kernels)
        or (bias is not None and bias.shape != (bank.shape[0], *bank.shape[2:]))
    ):
        raise ValueError(
            "a Mixture must have weights (batch, regions, *kernel, n) with n at least 1, a bank "
            "(regions or 1, n, *kernel, in/groups, features) and a bias like the bank without n, "
            f"or None, with {rank} kernel dimensions, each of which may be 1 in either; got shapes "
            f"{weights.shape}, {bank.shape} and {None if bias is None else bias.shape}."
        )
    for name, array in (("bank", bank), ("bias", bias)):
        if array is not None and array.dtype != weights.dtype:
            raise TypeError(
                f"the {name} of a Mixture must have the dtype of its weights, {weights.dtype}, got "
                f"{array.dtype}."
            )
