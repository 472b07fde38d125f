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

from drconv_jax.checks import check_count, check_guide_dtype, check_precision
from drconv_jax.dtypes import accumulator
from drconv_jax.filters import FilterGenerator, generator_of
from drconv_jax.geometry import Padding, canonical_tuple, resize_nearest, window_of
from drconv_jax.guide import region_index
from drconv_jax.region_conv import region_conv
from drconv_jax.region_conv.sharding import along_batch

ParamInit = Callable[[PRNGKeyArray], Any]


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What a DRConv layer is, apart from its parameters and how they start.

    The fields are those of `drconv_jax.DRConv`; `promote_dtype` takes a tuple of arrays, as nnx's.

    Raises:
      TypeError: a field that counts is no integer, or a dtype is not floating point.
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
    filter_generator: str | FilterGenerator
    experts: int
    dtype: Dtype | None
    param_dtype: Dtype
    precision: PrecisionLike
    promote_dtype: Callable[..., Any]
    implementation: str | Sequence[str] | None

    def __post_init__(self) -> None:
        for name in ("features", "regions", "experts", "feature_group_count"):
            check_count(name, getattr(self, name))
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            if value is not None and not jnp.issubdtype(value, jnp.floating):
                raise TypeError(
                    f"{name} must be a floating-point type such as float32, got "
                    f"{jnp.dtype(value).name}."
                )
        check_precision(self.precision)
        if self.kernel_size is None or len(self.kernel) not in (1, 2, 3):
            raise ValueError(
                f"kernel_size must have 1, 2 or 3 entries, one for each spatial dimension, got "
                f"{self.kernel_size!r}."
            )
        if self.features % self.feature_group_count:
            raise ValueError(
                f"feature_group_count must divide features={self.features}, got "
                f"{self.feature_group_count}."
            )
        generator_of(self.filter_generator)

    @classmethod
    def of(cls, layer: Any, **instead: Any) -> Hyperparameters:
        """Collects the fields from a layer's attributes of the same names, or from `instead`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(
            **{name: getattr(layer, name) for name in names if name not in instead}, **instead
        )

    @property
    def generator(self) -> FilterGenerator:
        """The filter generator itself, where it is given by name."""
        return generator_of(self.filter_generator)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's size; as in `flax.linen.Conv`, an integer is a 1-dimensional kernel."""
        rank = len(self.kernel_size) if np.iterable(self.kernel_size) else 1
        return canonical_tuple("kernel_size", self.kernel_size, rank)

    @property
    def guide_kernel(self) -> tuple[int, ...]:
        """The guide convolution's kernel size, every entry given."""
        if self.guide_kernel_size is None:
            return self.generator.guide_kernel_size(self.kernel)
        return canonical_tuple("guide_kernel_size", self.guide_kernel_size, len(self.kernel))


def refuse_unsupported(**arguments: Any) -> None:
    """Raises where an argument that `nn.Conv` or `nnx.Conv` has, and DRConv cannot have, is given.

    Raises:
      ValueError: one is neither None nor, for a convolution, `jax.lax.conv_general_dilated`.
    """
    for name, value in arguments.items():
        if value is not None and value is not jax.lax.conv_general_dilated:
            raise ValueError(f"{name} must be left out of a DRConv: {_UNSUPPORTED[name]}")


_OTHER_CONVOLUTION = (
    "its filters differ from position to position, which no other convolution computes; "
    "implementation chooses among those that do."
)
_UNSUPPORTED = {
    "mask": (
        "its filters are generated. To mask them, multiply the parameters they are mixed of by "
        'the mask, ["filters"]["bank_kernel"] with the generators "mixture" and "experts".'
    ),
    "conv_general_dilated": _OTHER_CONVOLUTION,
    "conv_general_dilated_cls": _OTHER_CONVOLUTION,
    "preferred_element_type": (
        "it sums in float32 whatever the dtype, and its output has the dtype of the computation. "
        "Set dtype, or cast the output."
    ),
}


def init(
    hyper: Hyperparameters,
    in_features: int,
    *,
    kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
    bias_init: Initializer = jax.nn.initializers.zeros,
    with_guide: bool = True,
) -> dict[str, ParamInit]:
    """How to make each entry of the parameters, as functions of a key.

    Args:
      hyper: the layer.
      in_features: channels of its input.
      kernel_init, bias_init: see `drconv_jax.DRConv`.
      with_guide: whether the layer predicts its own guide.

    Returns:
      "guide" (where it predicts its own): `kernel` (*guide_kernel, in, m) and `bias` (m,) of the
      guide convolution; "filters": the generator's parameters; "bias" (where there is one).

    Raises:
      TypeError: in_features is no integer.
      ValueError: in_features is not a multiple of the groups.
    """
    check_count("in_features", in_features, least=0)
    if in_features < 1 or in_features % hyper.feature_group_count:
        raise ValueError(
            f"the input must have channels in a multiple of "
            f"feature_group_count={hyper.feature_group_count}, got {in_features}."
        )

    def init_guide(key: PRNGKeyArray) -> dict[str, Array]:
        shape = (*hyper.guide_kernel, in_features, hyper.regions)
        return {
            "kernel": jax.nn.initializers.lecun_normal()(key, shape, hyper.param_dtype),
            "bias": jnp.zeros(hyper.regions, hyper.param_dtype),
        }

    def init_filters(key: PRNGKeyArray) -> dict[str, Array]:
        return hyper.generator.init(
            key,
            in_features,
            hyper.features,
            hyper.kernel,
            hyper.regions,
            experts=hyper.experts,
            feature_group_count=hyper.feature_group_count,
            kernel_init=kernel_init,
            param_dtype=hyper.param_dtype,
        )

    inits: dict[str, ParamInit] = {"guide": init_guide} if with_guide else {}
    inits["filters"] = init_filters
    if hyper.use_bias:
        inits["bias"] = lambda key: bias_init(key, (hyper.features,), hyper.param_dtype)
    return inits


def check_input(hyper: Hyperparameters, x: Array) -> None:
    """Raises ValueError where x has too few dimensions, and TypeError where it is complex."""
    rank = len(hyper.kernel)
    if x.ndim < rank + 1:
        raise ValueError(
            f"x must have shape (*batch, *spatial, in) with {rank} spatial dimensions for "
            f"kernel_size={hyper.kernel_size}, got {x.shape}."
        )
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"the input must be real, got {x.dtype}: give its real and its imaginary part as "
            "channels."
        )


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
      TypeError: x is complex, or guide is not floating point.
      ValueError: x or guide has a shape that does not fit.
    """
    check_input(hyper, x)
    batch = x.shape[: -len(hyper.kernel) - 1]
    if guide is not None:
        check_guide_dtype(guide)
        if (
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
        out = main.output_shape(padded.shape[1:-1])
        if 0 in guide.shape[1:-1] and 0 not in out:
            raise ValueError(
                f"guide must have at least one position in every spatial dimension, got shape "
                f"{guide.shape}."
            )
        guide = resize_nearest(guide, out)
    guide = guide.astype(accumulator(guide.dtype))

    if 0 in (*x.shape, *guide.shape):  # a convolution of nothing, or without any output
        y = jnp.zeros_like(x, shape=(*guide.shape[:-1], hyper.features))
    else:
        filters = hyper.generator.mixture(
            params["filters"], x, hyper.kernel, precision=hyper.precision
        )
        y = region_conv(
            x,
            filters,
            guide,
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
