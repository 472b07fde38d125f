"""Filter generators: from a sample to its m filters, as pure functions of (params, x).

A generator is a frozen object that knows all of itself: how its parameters start, of what it mixes
every sample's filters, what that costs. `GENERATORS` has them by name:

- "mixture", the default: the input's global average names how each region mixes one bank of
  experts that all regions share, with weights 2 sigmoid / sqrt(E).
- "pooled", the paper's (Section 3.3): the input pooled to the kernel's size names, tap by tap, how
  each region mixes a bank of its own.
- "experts", the authors' released code: as "mixture", with weights 2 sigmoid / E.

"mixture" learns as fast as `nn.Conv` at the same learning rate: a gradient step of size one on the
filters is one of size sum of the squared weights, here about 1, when it is taken on the bank; with
weights 1 / E it is 1 / E. And its mixing logits are the sum of a map that all regions share and of
one of each region's own: what a sample needs is learned from all of its positions, however many
regions there are, and what a region needs besides from its own. docs/ablation has what that is
worth.

A new generator starts well (both hold for each of them):

- The filters are those of `kernel_init`: a new DRConv's output varies as a new `nn.Conv`'s. Where
  all mixing weights are at their middle, as they are for an input of zeros and nearly for others,
  the filter is one draw of `kernel_init`, be that random, constant, orthogonal or the identity.
  ("pooled" has one bank for all taps: each of them is the middle tap of that draw.)
- All regions of a sample start with the same filter. A network therefore begins as if its guide
  did not matter, and regions part as they learn. The two-layer generator at default initial values
  has neither property: it explodes with width and hands unlike filters to neighbouring positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from drconv_jax.boxes import boxed_as, unboxed
from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import adaptive_average_pool
from drconv_jax.region_conv import Mixture

Params = Mapping[str, Array]
Initializer = Callable[..., Array]

# Logits of the mixing weights start this small for inputs of unit variance: the weights of a new
# generator are near the middle of the sigmoid, whose 1/2 the initial scale counts on.
_mixing_init = jax.nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")


@runtime_checkable
class FilterGenerator(Protocol):
    """What makes every sample's filters; `DRConv` takes any object that is one."""

    @property
    def linear(self) -> tuple[str, ...]:
        """Names of the parameters that the filters are linear in, all of them together.

        Their last axis is the features'.
        """

    def init(
        self,
        key: PRNGKeyArray,
        in_features: int,
        features: int,
        kernel_size: Sequence[int],
        regions: int,
        *,
        experts: int = 8,
        feature_group_count: int = 1,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        param_dtype: DTypeLike = jnp.float32,
    ) -> dict[str, Any]:
        """Makes the parameters, a flat dictionary of arrays or of boxes of them.

        Args:
          key: of their random values.
          in_features, features, kernel_size, feature_group_count: of the convolution.
          regions: m.
          experts: filters of the bank, for those generators that leave the choice.
          kernel_init: of the filters that a new generator makes.
          param_dtype: of the parameters.
        """

    def mixture(
        self,
        params: Params,
        x: Float[Array, "batch *spatial in"],
        kernel_size: Sequence[int],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Mixture:
        """Says of what every sample's m filters are mixed.

        Args:
          params: as `init` makes them, in the dtype to compute in.
          x: the input, in the same dtype.
          kernel_size: taps of the filters.
          precision: of the products, as in `jax.lax.dot_general`.
        """

    def guide_kernel_size(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """Taps of the guide convolution where the layer leaves them open."""

    def multiply_adds(self, params: Mapping[str, Any], kernel_size: Sequence[int]) -> int:
        """Of the filters of one sample, whose parameters have the shapes of `params`."""


@dataclasses.dataclass(frozen=True)
class PooledGenerator:
    """The paper's generator (Section 3.3 and Figure 3).

    Adaptive average pooling of x to the kernel's size, a 1x1 convolution to m x m channels,
    sigmoid (in float32 or wider), and a 1x1 convolution in m groups without activation.
    """

    linear: tuple[str, ...] = ("bank_kernel", "bank_bias")

    def init(
        self,
        key: PRNGKeyArray,
        in_features: int,
        features: int,
        kernel_size: Sequence[int],
        regions: int,
        *,
        experts: int = 8,
        feature_group_count: int = 1,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        param_dtype: DTypeLike = jnp.float32,
    ) -> dict[str, Any]:
        """See `FilterGenerator.init`; the bank of a region has m filters, whatever `experts` is.

        Returns:
          `mixing_kernel` (in, m, m) and `mixing_bias` (m, m): the 1x1 convolution from the pooled
          input to m mixing logits for each of m regions; `bank_kernel` (m, m, in/groups, features)
          and `bank_bias` (m, in/groups, features): the 1x1 convolution in m groups, from each
          region's m mixing weights to its filter.
        """
        del experts
        mixing_key, bank_key = jax.random.split(key)
        shape = (*kernel_size, in_features // feature_group_count, features)
        drawn, kernels = _draw_bank(bank_key, shape, regions, kernel_init, param_dtype)
        # One tap of whole kernels, their middle: the taps share the bank, and kernel_init must see
        # the true fan-in.
        bank = kernels[(slice(None), *((size - 1) // 2 for size in kernel_size))]
        bank = bank * (2 / regions**0.5)  # a sum of m terms, each weighed by 1/2
        mixing = _mixing_init(mixing_key, (in_features, regions), param_dtype)
        return {
            "mixing_kernel": jnp.repeat(mixing[:, None], regions, axis=1),
            "mixing_bias": jnp.zeros((regions, regions), param_dtype),
            "bank_kernel": boxed_as(drawn, jnp.repeat(bank[None], regions, axis=0), kept=2),
            "bank_bias": boxed_as(drawn, jnp.zeros((regions, *shape[-2:]), param_dtype), kept=2),
        }

    def mixture(
        self,
        params: Params,
        x: Float[Array, "batch *spatial in"],
        kernel_size: Sequence[int],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Mixture:
        """See `FilterGenerator.mixture`."""
        context = adaptive_average_pool(x, kernel_size)
        logits = _mixing_logits(params["mixing_kernel"], params["mixing_bias"], context, precision)
        weights = jnp.moveaxis(jax.nn.sigmoid(logits).astype(x.dtype), -2, 1)
        taps = range(2, 2 + len(kernel_size))  # which share the bank
        return Mixture(
            weights,
            jnp.expand_dims(params["bank_kernel"], taps),
            jnp.expand_dims(params["bank_bias"], [axis - 1 for axis in taps]),
        )

    def guide_kernel_size(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """The filters' own, as in the paper."""
        return kernel_size

    def multiply_adds(self, params: Mapping[str, Any], kernel_size: Sequence[int]) -> int:
        """See `FilterGenerator.multiply_adds`; every tap mixes the banks of all regions."""
        return math.prod(kernel_size) * (params["mixing_kernel"].size + params["bank_kernel"].size)


@dataclasses.dataclass(frozen=True)
class MixtureGenerator:
    """The default generator.

    Global average of x, linear maps to E logits that all regions share and to m x E that are
    added, 2 sigmoid / sqrt(E) (in float32 or wider), and the sum of the E shared filters with
    those weights.
    """

    linear: tuple[str, ...] = ("bank_kernel",)

    def init(
        self,
        key: PRNGKeyArray,
        in_features: int,
        features: int,
        kernel_size: Sequence[int],
        regions: int,
        *,
        experts: int = 8,
        feature_group_count: int = 1,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        param_dtype: DTypeLike = jnp.float32,
    ) -> dict[str, Any]:
        """See `FilterGenerator.init`, of a bank with E = `experts` filters.

        Returns:
          `shared_mixing_kernel` (in, E) and `shared_mixing_bias` (E,): the linear map from the
          averaged input to the E mixing logits of every region; `mixing_kernel` (in, m, E) and
          `mixing_bias` (m, E): what each region adds to it, zero at first; `bank_kernel` (E,
          *kernel, in/groups, features): the filters, shared by all regions.
        """
        mixing_key, bank_key = jax.random.split(key)
        shape = (*kernel_size, in_features // feature_group_count, features)
        drawn, bank = _draw_bank(bank_key, shape, experts, kernel_init, param_dtype)
        return {
            "shared_mixing_kernel": _mixing_init(mixing_key, (in_features, experts), param_dtype),
            "shared_mixing_bias": jnp.zeros(experts, param_dtype),
            "mixing_kernel": jnp.zeros((in_features, regions, experts), param_dtype),
            "mixing_bias": jnp.zeros((regions, experts), param_dtype),
            "bank_kernel": boxed_as(drawn, bank, kept=len(shape)),
        }

    def mixture(
        self,
        params: Params,
        x: Float[Array, "batch *spatial in"],
        kernel_size: Sequence[int],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Mixture:
        """See `FilterGenerator.mixture`."""
        del kernel_size  # the bank has it
        kernel = params["shared_mixing_kernel"][:, None] + params["mixing_kernel"]
        bias = params["shared_mixing_bias"][None] + params["mixing_bias"]
        scale = 2 / params["bank_kernel"].shape[0] ** 0.5
        return _of_shared_bank(kernel, bias, params["bank_kernel"], scale, x, precision)

    def guide_kernel_size(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """The filters' own, as in the paper."""
        return kernel_size

    def multiply_adds(self, params: Mapping[str, Any], kernel_size: Sequence[int]) -> int:
        """See `FilterGenerator.multiply_adds`; every region mixes the one bank."""
        regions = params["mixing_bias"].shape[0]
        return params["mixing_kernel"].size + regions * params["bank_kernel"].size


@dataclasses.dataclass(frozen=True)
class ExpertsGenerator(MixtureGenerator):
    """The generator of the authors' released code (megvii-research/DRConv).

    Global average of x, a linear map to m x E logits, 2 sigmoid / E (in float32 or wider), and the
    sum of the E shared filters with those weights.
    """

    def init(
        self,
        key: PRNGKeyArray,
        in_features: int,
        features: int,
        kernel_size: Sequence[int],
        regions: int,
        *,
        experts: int = 8,
        feature_group_count: int = 1,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        param_dtype: DTypeLike = jnp.float32,
    ) -> dict[str, Any]:
        """See `FilterGenerator.init`, of a bank with E = `experts` filters.

        Returns:
          `mixing_kernel` (in, m, E) and `mixing_bias` (m, E): the linear map from the averaged
          input to E mixing logits for each region; `bank_kernel`: that of `MixtureGenerator`,
          sqrt(E) times, as a mean of E filters varies 1 / E as much as each of them.
        """
        params = super().init(
            key,
            in_features,
            features,
            kernel_size,
            regions,
            experts=experts,
            feature_group_count=feature_group_count,
            kernel_init=kernel_init,
            param_dtype=param_dtype,
        )
        shared, bank = params["shared_mixing_kernel"], params["bank_kernel"]
        return {
            "mixing_kernel": jnp.repeat(shared[:, None], regions, axis=1),
            "mixing_bias": params["mixing_bias"],
            "bank_kernel": boxed_as(bank, unboxed(bank) * experts**0.5, kept=unboxed(bank).ndim),
        }

    def mixture(
        self,
        params: Params,
        x: Float[Array, "batch *spatial in"],
        kernel_size: Sequence[int],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Mixture:
        """See `FilterGenerator.mixture`."""
        del kernel_size  # the bank has it
        kernel, bias, bank = params["mixing_kernel"], params["mixing_bias"], params["bank_kernel"]
        return _of_shared_bank(kernel, bias, bank, 2 / bank.shape[0], x, precision)

    def guide_kernel_size(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """1, as in the released code."""
        return (1,) * len(kernel_size)


GENERATORS: Mapping[str, FilterGenerator] = {
    "mixture": MixtureGenerator(),
    "pooled": PooledGenerator(),
    "experts": ExpertsGenerator(),
}


def generator_of(value: Any) -> FilterGenerator:
    """The generator of that name, or the one that is given.

    Raises:
      ValueError: there is none of that name, or it is no generator.
    """
    generator = GENERATORS.get(value) if isinstance(value, str) else value
    if isinstance(generator, type) or not isinstance(generator, FilterGenerator):
        raise ValueError(
            f"filter_generator must be one of {', '.join(GENERATORS)}, or a FilterGenerator, got "
            f"{value!r}."
        )
    return generator


def _draw_bank(
    key: PRNGKeyArray,
    shape: Sequence[int],
    count: int,
    kernel_init: Initializer,
    param_dtype: DTypeLike,
) -> tuple[Any, Float[Array, "count *kernel in_per_group features"]]:
    """Filters whose sum, divided by sqrt(count), is one draw of `kernel_init`.

    They differ from one another as independent draws do. Stacked as they come, such draws would
    have a sum that varies as it should, but whose mean is sqrt(count) times that of `kernel_init`.

    Returns:
      That draw as `kernel_init` gave it, in its box if it has one, and the filters.
    """
    draws = [kernel_init(k, shape, param_dtype) for k in jax.random.split(key, 1 + count)]
    first, *others = map(unboxed, draws)
    bank = jnp.stack(others)
    deviations = bank - bank.mean(axis=0, keepdims=True)
    return draws[0], deviations + first[None] / count**0.5


def _of_shared_bank(
    kernel: Float[Array, "in regions n"],
    bias: Float[Array, "regions n"],
    bank: Float[Array, "n *kernel in_per_group features"],
    scale: float,
    x: Float[Array, "batch *spatial in"],
    precision: jax.lax.PrecisionLike,
) -> Mixture:
    wide = accumulator(x.dtype)
    context = x.mean(axis=range(1, x.ndim - 1), dtype=wide).astype(x.dtype)
    logits = _mixing_logits(kernel, bias, context, precision)
    weights = (jax.nn.sigmoid(logits) * scale).astype(x.dtype)
    taps = range(2, bank.ndim - 1)  # which share the weights
    return Mixture(jnp.expand_dims(weights, taps), bank[None])


def _mixing_logits(
    kernel: Float[Array, "in regions n"],
    bias: Float[Array, "regions n"],
    context: Float[Array, "*positions in"],
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*positions regions n"]:
    """The logits in float32 or wider."""
    wide = accumulator(context.dtype)
    flat = jnp.einsum(
        "...i,in->...n",
        context,
        kernel.reshape(kernel.shape[0], -1),
        precision=precision,
        preferred_element_type=wide,
    )
    flat = flat + jnp.expand_dims(bias.reshape(-1).astype(wide), range(flat.ndim - 1))
    return flat.reshape(*flat.shape[:-1], *bias.shape)
