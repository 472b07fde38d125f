"""The DRConv layer as two pure functions, `init` and `apply`, over a dictionary of parameters.

The Flax layers hold these parameters and call these functions; so can anything else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from drconv_jax.dtypes import accumulator
from drconv_jax.filters import GENERATORS
from drconv_jax.geometry import Padding, canonical_tuple, resize_nearest, window_of
from drconv_jax.guide import region_index
from drconv_jax.mixing import mixed_region_conv
from drconv_jax.region_conv.sharding import along_batch

ParamInit = Callable[[PRNGKeyArray], Any]


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What a DRConv layer is, apart from its parameters.

    The fields are those of `drconv_jax.DRConv`; `promote_dtype` takes a tuple of arrays, as nnx's.

    Raises:
      TypeError: a field that counts is no integer.
      ValueError: a field is out of range.
    """

    features: int
    kernel_size: int | Sequence[int]
    regions: int
    strides: int | Sequence[int] | None
    padding: Padding
    input_dilation: int | Sequence[int] | None
    kernel_dilation: int | Sequence[int] | None
    feature_group_count: int
    use_bias: bool
    guide_kernel_size: int | Sequence[int] | None
    filter_generator: str
    experts: int
    dtype: Dtype | None
    param_dtype: Dtype
    precision: PrecisionLike
    kernel_init: Initializer
    bias_init: Initializer
    promote_dtype: Callable[..., Any]
    implementation: str | Sequence[str] | None

    def __post_init__(self) -> None:
        for name in ("features", "regions", "experts", "feature_group_count"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an integer, got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.features % self.feature_group_count:
            raise ValueError(
                f"feature_group_count must divide features={self.features}, got "
                f"{self.feature_group_count}."
            )
        if self.filter_generator not in GENERATORS:
            raise ValueError(
                f"filter_generator must be one of {', '.join(GENERATORS)}, got "
                f"{self.filter_generator!r}."
            )

    @classmethod
    def of(cls, layer: Any, **instead: Any) -> Hyperparameters:
        """Collects the fields from a layer's attributes of the same names, or from `instead`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(
            **{name: getattr(layer, name) for name in names if name not in instead}, **instead
        )

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's size; as in `flax.linen.Conv`, an integer is a 1-dimensional kernel."""
        rank = 1 if isinstance(self.kernel_size, int) else len(self.kernel_size)
        return canonical_tuple("kernel_size", self.kernel_size, rank)

    @property
    def guide_kernel(self) -> tuple[int, ...]:
        """The guide convolution's kernel size, every entry given."""
        if self.guide_kernel_size is None:
            return (1,) * len(self.kernel) if self.filter_generator == "experts" else self.kernel
        return canonical_tuple("guide_kernel_size", self.guide_kernel_size, len(self.kernel))


def init(
    hyper: Hyperparameters, in_features: int, *, with_guide: bool = True
) -> dict[str, ParamInit]:
    """How to make each entry of the parameters, as functions of a key.

    Args:
      hyper: the layer.
      in_features: channels of its input.
      with_guide: whether the layer predicts its own guide.

    Returns:
      "guide" (where it predicts its own): `kernel` (*guide_kernel, in, m) and `bias` (m,) of the
      guide convolution; "filters": the generator's parameters; "bias" (where there is one).

    Raises:
      ValueError: in_features is not a multiple of the groups.
    """
    if in_features < 1 or in_features % hyper.feature_group_count:
        raise ValueError(
            f"the input must have channels in a multiple of "
            f"feature_group_count={hyper.feature_group_count}, got {in_features}."
        )
    generator = GENERATORS[hyper.filter_generator]

    def init_guide(key: PRNGKeyArray) -> dict[str, Array]:
        shape = (*hyper.guide_kernel, in_features, hyper.regions)
        return {
            "kernel": jax.nn.initializers.lecun_normal()(key, shape, hyper.param_dtype),
            "bias": jnp.zeros(hyper.regions, hyper.param_dtype),
        }

    def init_filters(key: PRNGKeyArray) -> dict[str, Array]:
        extra = {} if hyper.filter_generator == "pooled" else {"experts": hyper.experts}
        return generator.init(
            key,
            in_features,
            hyper.features,
            hyper.kernel,
            hyper.regions,
            feature_group_count=hyper.feature_group_count,
            kernel_init=hyper.kernel_init,
            param_dtype=hyper.param_dtype,
            **extra,
        )

    inits: dict[str, ParamInit] = {"guide": init_guide} if with_guide else {}
    inits["filters"] = init_filters
    if hyper.use_bias:
        inits["bias"] = lambda key: hyper.bias_init(key, (hyper.features,), hyper.param_dtype)
    return inits


def apply(
    hyper: Hyperparameters,
    params: Mapping[str, Any],
    x: Float[Array, ...],
    guide: Float[Array, ...] | None = None,
) -> tuple[Float[Array, ...], Int[Array, ...]]:
    """The layer: guide, filters, region convolution, bias (Figure 2).

    Args:
      hyper: the layer.
      params: as `init` names them.
      x: (*batch, *spatial, in), with any number of batch dimensions, none included.
      guide: guide features (*batch, *spatial, m) to use in place of the layer's own; of another
        spatial size than the output's, they are resized by nearest neighbour.

    Returns:
      The output (*batch, *out_spatial, features) and the region index (*batch, *out_spatial); on a
      mesh with Explicit axes, sharded along the batch as x is.

    Raises:
      TypeError: guide is not floating point.
      ValueError: x or guide has a shape that does not fit.
    """
    rank = len(hyper.kernel)
    if x.ndim < rank + 1:
        raise ValueError(
            f"x must have shape (*batch, *spatial, in) with {rank} spatial dimensions for "
            f"kernel_size={hyper.kernel_size}, got {x.shape}."
        )
    batch = x.shape[: -rank - 1]
    if guide is not None and not jnp.issubdtype(guide.dtype, jnp.floating):
        raise TypeError(f"guide must be floating point, got {guide.dtype}.")
    if guide is not None and (
        guide.ndim != x.ndim
        or guide.shape[-1] != hyper.regions
        or guide.shape[: len(batch)] != batch
    ):
        raise ValueError(
            f"guide must have shape (*batch, *spatial, regions) with batch {batch} and "
            f"regions={hyper.regions}, got {guide.shape}."
        )
    return along_batch(functools.partial(_apply, hyper), batch_dims=len(batch))(
        x, dict(params), guide
    )


def _apply(
    hyper: Hyperparameters, x: Array, params: Mapping[str, Any], guide: Array | None
) -> tuple[Array, Array]:
    rank = len(hyper.kernel)
    batch = x.shape[: -rank - 1]
    leaves, tree = jax.tree.flatten(params)
    x, *leaves = hyper.promote_dtype((x, *leaves), dtype=hyper.dtype)
    params = jax.tree.unflatten(tree, leaves)
    x = _one_batch_axis(x, rank)
    window: dict[str, Any] = {
        "strides": hyper.strides,
        "padding": hyper.padding,
        "input_dilation": hyper.input_dilation,
        "kernel_dilation": hyper.kernel_dilation,
    }
    if guide is None:
        guide = _guide_convolution(hyper, params["guide"], x, window)
    else:
        padded, main = window_of(x, hyper.kernel, **window)
        guide = _one_batch_axis(guide, rank)
        guide = resize_nearest(guide, main.output_shape(padded.shape[1:-1]))
    guide = guide.astype(accumulator(guide.dtype))

    factors = GENERATORS[hyper.filter_generator].factors(
        params["filters"], x, hyper.kernel, precision=hyper.precision
    )
    y = mixed_region_conv(
        x,
        factors,
        guide,
        features=hyper.features,
        kernel_size=hyper.kernel,
        feature_group_count=hyper.feature_group_count,
        precision=hyper.precision,
        implementation=hyper.implementation,
        **window,
    )
    if hyper.use_bias:
        y = y + jnp.expand_dims(params["bias"], range(y.ndim - 1))
    if len(batch) != 1:
        y, guide = (value.reshape(*batch, *value.shape[1:]) for value in (y, guide))
    return y, region_index(guide)


def _one_batch_axis(values: Array, rank: int) -> Array:
    if values.ndim == rank + 2:
        return values
    return values.reshape(-1, *values.shape[-rank - 1 :])


def _guide_convolution(
    hyper: Hyperparameters, params: Mapping[str, Array], x: Array, window_arguments: Any
) -> Float[Array, "batch *out_spatial regions"]:
    x, window = window_of(x, hyper.guide_kernel, centred_on=hyper.kernel, **window_arguments)
    if window.is_pointwise:
        # XLA's CPU backend is several times faster at a product than at the convolution, and at
        # the one for the kernel's gradient where its result is (m, in). Without the barrier it
        # would put the transposition back into that product.
        kernel = params["kernel"].reshape(params["kernel"].shape[-2:])
        kernel = jax.lax.optimization_barrier(kernel.T)
        features = jnp.einsum("...i,mi->...m", x, kernel, precision=hyper.precision)
    else:
        spatial = "DHW"[-len(window.strides) :]
        features = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            window.strides,
            window.padding,
            rhs_dilation=window.dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            precision=hyper.precision,
        )
    return features + jnp.expand_dims(params["bias"], range(features.ndim - 1))
