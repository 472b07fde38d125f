"""DRConv for flax.nnx."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import ConvGeneralDilatedT, Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float, Num

from drconv_jax import functional
from drconv_jax.filters import FilterGenerator
from drconv_jax.geometry import Padding


class DRConv(nnx.Module):
    """Dynamic region-aware convolution in place of `nnx.Conv`: `drconv_jax.DRConv` for nnx.

    Example::

      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from drconv_jax.nnx import DRConv
      >>> layer = DRConv(16, 64, regions=8, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 32, 32, 16))).shape
      (2, 32, 32, 64)

    The region index of a call is sown as `nnx.Intermediate` "region_index"; see `nnx.capture`.
    Arguments are kept as attributes of the same names, as in `nnx.Conv`.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      own_guide: whether the layer has a guide convolution; without one, every call gives a guide.
      rngs: source of the parameters' keys.
      kernel_metadata: of the variables that filters are mixed of; "out_sharding", as `nnx.Conv`'s
        kernel would have it, is for their last axes.
      bias_metadata: of the bias.
      preferred_element_type, mask, conv_general_dilated: have no meaning here; the error that
        another value than the default gives says what to do instead.
      Everything else: as in `drconv_jax.DRConv`.

    Raises:
      TypeError: an argument that counts is no integer, or a dtype is not floating point.
      ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        conv_general_dilated: ConvGeneralDilatedT = jax.lax.conv_general_dilated,
        promote_dtype: Callable[..., Any] = promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        regions: int = 8,
        guide_kernel_size: int | Sequence[int] | None = None,
        own_guide: bool = True,
        filter_generator: str | FilterGenerator = "mixture",
        experts: int = 8,
        implementation: str | Sequence[str] | None = None,
    ):
        functional.refuse_unsupported(
            mask=mask,
            conv_general_dilated=conv_general_dilated,
            preferred_element_type=preferred_element_type,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = _static(kernel_size)
        self.strides = _static(strides)
        self.padding = _static(padding)
        self.input_dilation = _static(input_dilation)
        self.kernel_dilation = _static(kernel_dilation)
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.conv_general_dilated = conv_general_dilated
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.regions = regions
        self.guide_kernel_size = _static(guide_kernel_size)
        self.filter_generator = filter_generator
        self.experts = experts
        self.implementation = _static(implementation)

        hyper = self._hyperparameters()
        self.kernel_size = hyper.kernel
        inits = functional.init(
            hyper,
            in_features,
            kernel_init=_with_metadata(kernel_init, kernel_metadata),
            bias_init=_with_metadata(bias_init, bias_metadata),
            with_guide=own_guide,
        )
        made = {name: init(rngs.params()) for name, init in inits.items()}
        # Plain dictionaries: `nnx.tabulate` and `nnx.capture` treat an `nnx.Dict` as a layer.
        self.guide = nnx.data(_variables(made["guide"]) if own_guide else None)
        self.filters = nnx.data(_variables(made["filters"]))
        self.bias = nnx.data(nnx.Param(made["bias"]) if use_bias else None)

    def __call__(
        self,
        inputs: Num[Array, ...],
        guide: Float[Array, ...] | None = None,
        *,
        out_sharding: Any = None,
    ) -> Float[Array, ...]:
        """Applies the layer; see `drconv_jax.DRConv.__call__`.

        Args:
          inputs, guide: as there.
          out_sharding: of the output, on a mesh with Explicit axes.

        Raises:
          TypeError: the input is complex, or the guide is not floating point.
          ValueError: the input or the guide does not fit in shape, or a guide is needed and not
            given.
        """
        hyper = self._hyperparameters()
        functional.check_input(hyper, inputs)
        if inputs.shape[-1] != self.in_features:
            raise ValueError(
                f"the input must have in_features={self.in_features} channels, got shape "
                f"{inputs.shape}."
            )
        params: dict[str, Any] = {"filters": _values(self.filters)}
        if guide is None:
            if self.guide is None:
                raise ValueError("guide must be given: this layer was made with own_guide=False.")
            params["guide"] = _values(self.guide)
        if self.bias is not None:
            params["bias"] = self.bias[...]
        y, index = functional.apply(hyper, params, inputs, guide)
        if hasattr(self, "__captures__"):  # outside `nnx.capture`, sowing is deprecated
            self.sow(nnx.Intermediate, "region_index", index)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def _hyperparameters(self) -> functional.Hyperparameters:
        return functional.Hyperparameters.of(self, features=self.out_features)


def _static(value: Any) -> Any:
    """The same made of tuples and Python's integers, so that the layer's graphdef is hashable."""
    if np.iterable(value) and not isinstance(value, str):
        return tuple(_static(entry) for entry in value)
    return value.item() if isinstance(value, (np.generic, np.ndarray)) else value


def _with_metadata(init: Initializer, metadata: Mapping[str, Any]) -> Initializer:
    """An initializer that says this of its variable, besides what it says itself."""
    if not metadata:
        return init

    def wrapped(*args: Any) -> nnx.VariableMetadata:
        value = init(*args)
        if not isinstance(value, nnx.VariableMetadata):
            value = nnx.VariableMetadata(value)
        return dataclasses.replace(value, metadata={**metadata, **value.metadata})

    return wrapped


def _variables(values: Mapping[str, Any]) -> dict[str, nnx.Param]:
    return {name: nnx.Param(value) for name, value in values.items()}


def _values(variables: Mapping[str, nnx.Param]) -> dict[str, Array]:
    return {name: variable[...] for name, variable in variables.items()}
