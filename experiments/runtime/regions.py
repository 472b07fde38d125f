"""How the regions of DRConv layers are used: a collapsed guide is what goes wrong in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from drconv_jax import viz

# A region is in use if it holds at least this share of all positions.
_IN_USE = 0.01


def positions_in_regions(
    params: Mapping[str, Any], intermediates: Mapping[str, Any], counted: Bool[Array, batch]
) -> dict[str, Int[Array, regions]]:
    """For every DRConv layer, how many positions are in each of its regions.

    Args:
      params: of the network.
      intermediates: what its layers have sown.
      counted: the samples whose positions count.
    """

    def count(layer: str, index: Int[Array, batch * out]) -> Int[Array, regions]:
        parameters = params
        for name in layer.split("/"):
            parameters = parameters[name]
        regions = parameters["filters"]["mixing_bias"].shape[0]
        in_region = jax.nn.one_hot(index, regions, dtype=jnp.int32)
        positions = in_region.sum(axis=range(1, index.ndim))
        return jnp.where(counted[:, None], positions, 0).sum(axis=0)

    return {
        layer: count(layer, index) for layer, index in viz.region_indices(intermediates).items()
    }


def use(positions: Int[np.ndarray, regions]) -> dict[str, float]:
    """How many of the regions are in use, and the entropy of their use.

    Returns:
      "used": regions that hold at least a hundredth of the positions; "of": all regions;
      "entropy": of the share of positions in each, in bits, at most log2 of the regions.
    """
    share: Float[np.ndarray, regions] = positions / positions.sum()
    present = share[share > 0]
    return {
        "used": int((share >= _IN_USE).sum()),
        "of": len(share),
        "entropy": abs(float((present * np.log2(present)).sum())),
    }


def collapsed(uses: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    """The layers that have several regions of which one only is in use."""
    return [layer for layer, use in uses.items() if use["used"] <= 1 < use["of"]]
