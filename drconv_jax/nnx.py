"""DRConv for flax.nnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float

from drconv_jax import functional
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

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      own_guide: whether the layer has a guide convolution; without one, every call gives a guide.
      rngs: source of the parameters' keys.
      Everything else: as in `drconv_jax.DRConv`.

    Raises:
      ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        regions: int = 8,
        strides: int | Sequence[int] | None = 1,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        guide_kernel_size: int | Sequence[int] | None = None,
        own_guide: bool = True,
        filter_generator: str = "mixture",
        experts: int = 8,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        promote_dtype: Callable[..., Any] = promote_dtype,
        implementation: str | Sequence[str] | None = None,
        rngs: nnx.Rngs,
    ):
        self.hyper = functional.Hyperparameters(
            features=out_features,
            kernel_size=kernel_size,
            regions=regions,
            strides=strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            use_bias=use_bias,
            guide_kernel_size=guide_kernel_size,
            filter_generator=filter_generator,
            experts=experts,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=promote_dtype,
            implementation=implementation,
        )
        self.in_features = in_features
        inits = functional.init(self.hyper, in_features, with_guide=own_guide)
        values = {name: init(rngs.params()) for name, init in inits.items()}
        self.guide = nnx.Dict(_params(values["guide"])) if own_guide else None
        self.filters = nnx.Dict(_params(values["filters"]))
        self.bias = nnx.Param(values["bias"]) if use_bias else None

    def __call__(
        self, x: Float[Array, ...], guide: Float[Array, ...] | None = None
    ) -> Float[Array, ...]:
        """Applies the layer; see `drconv_jax.DRConv.__call__`.

        Raises:
          ValueError: x or guide has a shape that does not fit, or a guide is needed and not given.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have in_features={self.in_features} channels, got shape {x.shape}."
            )
        if guide is None and self.guide is None:
            raise ValueError("guide must be given: this layer was made with own_guide=False.")
        params: dict[str, Any] = {"filters": _values(self.filters)}
        if self.guide is not None and guide is None:
            params["guide"] = _values(self.guide)
        if self.bias is not None:
            params["bias"] = self.bias[...]
        y, index = functional.apply(self.hyper, params, x, guide)
        if hasattr(self, "__captures__"):  # outside `nnx.capture`, sowing is deprecated
            self.sow(nnx.Intermediate, "region_index", index)
        return y


def _params(values: dict[str, Array]) -> dict[str, nnx.Param]:
    return {name: nnx.Param(value) for name, value in values.items()}


def _values(variables: nnx.Dict) -> dict[str, Array]:
    # Inside `nnx.capture` the dictionary holds flax's own entry as well.
    return {
        name: variable[...]
        for name, variable in variables.items()
        if isinstance(variable, nnx.Param)
    }
