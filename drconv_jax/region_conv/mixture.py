"""Filters as mixtures of a bank: what a filter generator makes, and the product that mixes them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import Length


class Mixture(NamedTuple):
    """Filters that are not mixed yet (Section 3.3).

    With b a sample, r a region and k a tap of the kernel:

        filters[b, r, k] = bias[r, k] + sum_n weights[b, r, k, n] bank[r, n, k]

    Axes of length 1 broadcast: regions may share a bank (`bank_regions` is 1 or m), taps may share
    weights, and taps may share the filters of a bank. Each axis of the kernel has its full length
    in the weights or in the bank.

    Attributes:
      weights: how much of each of n filters is in the filter of a sample's region.
      bank: the n filters, in the dtype of the weights.
      bias: what is added to every sample's filters; None adds nothing.
    """

    weights: Float[Array, "batch regions *kernel n"]
    bank: Float[Array, "bank_regions n *kernel in_per_group features"]
    bias: Float[Array, "bank_regions *kernel in_per_group features"] | None = None

    @property
    def kernel_size(self) -> tuple[Length, ...]:
        """Taps of the filters in each spatial dimension."""
        return np.broadcast_shapes(self.weights.shape[2:-1], self.bank.shape[2:-2])

    @property
    def shape(self) -> tuple[Length, ...]:
        """Of the filters: (batch, regions, *kernel, in_per_group, features)."""
        return (*self.weights.shape[:2], *self.kernel_size, *self.bank.shape[-2:])

    @property
    def dtype(self) -> np.dtype:
        """Of the filters."""
        return self.weights.dtype


# A function of a Mixture can be exported; its file is then read where this package is imported.
jax.export.register_namedtuple_serialization(Mixture, serialized_name="drconv_jax.Mixture")


def mix(
    mixture: Mixture, precision: jax.lax.PrecisionLike = None
) -> Float[Array, "batch regions *kernel in_per_group features"]:
    """Makes the filters, with sums in float32 or wider.

    Args:
      mixture: of them.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      Every sample's filters, in the dtype of the weights.
    """
    weights, bank, bias = mixture
    wide = accumulator(weights.dtype)
    # Letters of the kernel's axes; einsum knows no axis that broadcasts, so those are left out.
    of_weights, of_bank = (
        {2 + i: axis for axis, i in zip("uvw", range(len(kernel)), strict=False) if kernel[i] != 1}
        for kernel in (weights.shape[2:-1], bank.shape[2:-2])
    )
    taps = "".join(sorted({*of_weights.values(), *of_bank.values()}))
    shared = bank.shape[0] == 1
    equation = (
        f"br{''.join(of_weights.values())}n,"
        f"{'' if shared else 'r'}n{''.join(of_bank.values())}if->br{taps}if"
    )
    kernel_axes = range(2, 2 + len(mixture.kernel_size))
    weights, bank = (
        # XLA's CPU backend cannot do every product of bfloat16 with a wider result.
        jnp.squeeze(a, [axis for axis in kernel_axes if axis not in letters]).astype(wide)
        for a, letters in ((weights, of_weights), (bank, of_bank))
    )
    bank = bank[0] if shared else bank
    filters = jnp.einsum(equation, weights, bank, precision=precision).reshape(mixture.shape)
    if bias is not None:
        filters = filters + bias.astype(wide)[None]
    return filters.astype(mixture.dtype)
