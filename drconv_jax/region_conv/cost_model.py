"""Which implementations to try, and in what order, where the user names none.

On a CPU it is always the native kernels, which mix a few filters at a time in a cache. GPUs and
TPUs do 200 to 300 operations in the time of a byte from memory, and there are two ways to go:

- *Experts first*: every expert of a bank is applied to every position, and the results are mixed.
  E times the arithmetic of a convolution, and the memory traffic of one.
- *Filters first*: every sample's m filters are mixed, written and read, and positions are sorted by
  their region (with one region there is nothing to sort). The arithmetic of a convolution and of
  mixing, with memory traffic for m filters a sample, and for whole windows of larger kernels.

What takes longer, arithmetic or memory traffic, is what counts (a roofline model). A forward pass
decides for the gradient too: both ways take about three times as much with it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from drconv_jax.region_conv.mixture import Mixture

OPERATIONS_PER_BYTE = 240
"""Of a TPU v5e in bfloat16, 197e12 / 819e9; an H100 has 295, an H200 206."""

PASSES_TO_SORT = 11
"""How often positions go through memory, beyond reading x and writing y, to be sorted by region and
back: of `blocked`, by the bytes that the TPU's compiler counts."""


class Cost(NamedTuple):
    """Of a forward pass.

    Attributes:
      operations: two for every multiply-add.
      bytes: read from memory or written.
    """

    operations: float
    bytes: float

    @property
    def time(self) -> float:
        """In bytes that could be read meanwhile."""
        return max(float(self.bytes), self.operations / OPERATIONS_PER_BYTE)


def defaults(platform: str, x: Any, filters: Any, guide_features: Any) -> tuple[str, ...]:
    """Names, the best first; the last does everything.

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu".
      x, filters, guide_features: see `region_conv`, or structures of their shapes and dtypes.
    """
    if platform == "cpu":
        return ("cpu", "blocked")
    one_region = guide_features.shape[-1] == 1
    filters_first = ("select",) if one_region else ("pallas_gpu", "pallas_tpu", "blocked")
    # GPUs would store what every expert gets of x, of which there are m times as many where regions
    # have banks of their own.
    if not isinstance(filters, Mixture) or (platform != "tpu" and filters.bank.shape[0] > 1):
        return filters_first
    kernels = ("experts_first_gpu", "experts_first_tpu")  # each of which declines the other's
    experts_first = (*kernels, "experts_first", *filters_first)
    if not all(isinstance(n, int) for n in (*x.shape, *guide_features.shape)):
        return experts_first  # an exported program for inputs of any size
    shapes = x, filters, guide_features
    longer = experts_first_cost(*shapes).time > filters_first_cost(*shapes).time
    return filters_first if longer else experts_first


def experts_first_cost(x: Any, mixture: Any, guide_features: Any) -> Cost:
    """Of mixing what every expert gives."""
    multiply_adds, activations, filter_size = _sizes(x, mixture, guide_features)
    experts = math.prod(mixture.bank.shape[:2])
    traffic = x.dtype.itemsize * (activations + experts * filter_size)
    return Cost(2 * experts * multiply_adds, traffic)


def filters_first_cost(x: Any, mixture: Any, guide_features: Any) -> Cost:
    """Of mixing every sample's filters, then convolving with them."""
    multiply_adds, activations, filter_size = _sizes(x, mixture, guide_features)
    batch, regions = mixture.shape[:2]
    experts, filters = mixture.bank.shape[1], batch * regions * filter_size
    passes = 1 if regions == 1 else 1 + PASSES_TO_SORT
    taps = math.prod(mixture.kernel_size)
    windows = math.prod(guide_features.shape[:-1]) * taps * x.shape[-1] if taps > 1 else 0
    traffic = x.dtype.itemsize * (passes * activations + 2 * (filters + windows))
    return Cost(2 * (multiply_adds + experts * filters), traffic)


def _sizes(x: Any, mixture: Any, guide_features: Any) -> tuple[int, int, int]:
    """Multiply-adds of one convolution, entries of x and y, entries of one filter."""
    *_, features = mixture.shape
    filter_size = math.prod(mixture.shape[2:])
    positions = math.prod(guide_features.shape[:-1])
    return positions * filter_size, math.prod(x.shape) + positions * features, filter_size
