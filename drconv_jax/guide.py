"""Guide features to guide mask: a hard choice forward, its softmax backward (Section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drconv_jax.checks import check_count, check_guide_dtype
from drconv_jax.dtypes import accumulator


def region_index(guide_features: Float[Array, "*positions regions"]) -> Int[Array, "*positions"]:
    """The region of every position: the argmax of its guide features (Eq. 3).

    Ties go to the first maximum; where guide features are NaN, the first NaN counts as the
    maximum, so that the index is always a valid region.

    Args:
      guide_features: one logit per region at every position.

    Returns:
      int32 indices in [0, regions).

    Raises:
      TypeError: the guide features are not floating point.
      ValueError: there is no region to choose.
    """
    _check(guide_features)
    return jnp.argmax(guide_features, axis=-1).astype(jnp.int32)


def region_index_by_comparison(
    guide_features: Float[Array, "*positions regions"],
) -> Int[Array, "*positions"]:
    """`region_index`, which the TPU's compiler takes a quarter of argmax's time for.

    Not for CPUs, where XLA may lose NaN in a maximum.
    """
    largest = guide_features.max(axis=-1, keepdims=True)
    is_largest = (guide_features == largest) | jnp.isnan(guide_features)
    index = jax.lax.broadcasted_iota(jnp.int32, guide_features.shape, guide_features.ndim - 1)
    return jnp.where(is_largest, index, guide_features.shape[-1]).min(axis=-1)


@jax.custom_jvp
def guide_mask(
    guide_features: Float[Array, "*positions regions"],
) -> Float[Array, "*positions regions"]:
    """The guide mask as one-hot vectors, differentiable through softmax (Eq. 3 and 6-8).

    Its value is the one-hot of `region_index`; all of its derivatives are those of the softmax of
    the guide features over the last axis, computed in float32 or wider.

    Args:
      guide_features: one logit per region at every position.

    Returns:
      A mask of the same shape and dtype that is 1 at the chosen region and 0 elsewhere.

    Raises:
      TypeError: the guide features are not floating point.
      ValueError: there is no region to choose.
    """
    regions = guide_features.shape[-1] if guide_features.ndim else 0
    return jax.nn.one_hot(region_index(guide_features), regions, dtype=guide_features.dtype)


def softmax_vjp(
    guide_features: Float[Array, "*positions regions"],
    cotangent: Float[Array, "*positions regions"],
) -> Float[Array, "*positions regions"]:
    """The gradient of the guide features, given that of the mask (Eq. 7-8).

    With s = softmax(F) and g the cotangent: dL/dF_j = s_j (g_j - sum_i s_i g_i). A NaN among a
    position's guide features makes that position's gradient NaN.
    """
    wide = accumulator(guide_features.dtype)
    soft = jax.nn.softmax(guide_features.astype(wide), axis=-1)
    weighted = soft * cotangent.astype(wide)
    gradient = weighted - soft * weighted.sum(axis=-1, keepdims=True)
    return gradient.astype(guide_features.dtype)


@guide_mask.defjvp
def _derivative_of_mask(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Float[Array, "*positions regions"], Float[Array, "*positions regions"]]:
    # The softmax's Jacobian is symmetric: forward and backward are one product, and JAX makes the
    # gradient (Eq. 7-8) by transposing it.
    return guide_mask(*primals), softmax_vjp(*primals, *tangents)


def grid_features(height: int, width: int, regions: int) -> Float[Array, "height width regions"]:
    """Guide features of fixed regions: one-hots of the cells of a grid over the image.

    Args:
      height, width: positions.
      regions: m cells, in rows as square as their number allows: 2 x 4 for 8. Where there are fewer
        positions than cells, some stay empty.

    Returns:
      float32 guide features; not the paper's, which learns its regions.

    Raises:
      TypeError, ValueError: regions is no integer, or below 1.
    """
    check_count("regions", regions)
    rows = max(n for n in range(1, regions + 1) if regions % n == 0 and n * n <= regions)
    columns = regions // rows
    row, column = jnp.arange(height) * rows // height, jnp.arange(width) * columns // width
    return jax.nn.one_hot(row[:, None] * columns + column[None], regions)


def _check(guide_features: Array) -> None:
    check_guide_dtype(guide_features)
    if guide_features.ndim == 0 or guide_features.shape[-1] < 1:
        raise ValueError(
            "guide features must have shape (*positions, regions) with at least one region, got "
            f"{guide_features.shape}."
        )
