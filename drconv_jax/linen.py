"""DRConv for flax.linen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import ConvGeneralDilatedT, Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float, Num

from drconv_jax import functional
from drconv_jax.filters import FilterGenerator
from drconv_jax.geometry import Padding


class DRConv(nn.Module):
    """Dynamic region-aware convolution (Chen et al., CVPR 2021), in place of `nn.Conv`.

    For every sample, a guide convolution assigns each output position to one of m regions, and each
    region is convolved with a filter of its own, generated from that sample. Arguments that
    `nn.Conv` has mean what they mean there and stand in the same positions.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from drconv_jax import DRConv
      >>> layer = DRConv(features=64, regions=8)
      >>> x = jnp.ones((2, 32, 32, 16))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape
      (2, 32, 32, 64)

    The region index of the last call, (*batch, *out_spatial), is sown as `region_index` into the
    collection "intermediates"; ask for it with `apply(..., mutable="intermediates")`.

    Attributes:
      features: channels of the output.
      kernel_size: taps in each of 1, 2 or 3 spatial dimensions; an integer stands for a
        1-dimensional kernel.
      regions: m, the number of regions and of filters per sample.
      strides, padding, input_dilation, kernel_dilation, feature_group_count: as in `nn.Conv`;
        names of paddings in capitals or small letters.
      use_bias: whether to add a bias per feature, shared by all regions.
      guide_kernel_size: taps of the guide convolution. None is the layer's own kernel size, as in
        the paper, and 1 with the generator "experts", as in the released code.
      filter_generator: "mixture", which moves as far as `nn.Conv` at the same learning rate;
        "pooled", the paper's (Section 3.3); "experts", the released code's; or an object that is a
        `drconv_jax.filters.FilterGenerator`.
      experts: number of filter banks that the generators "mixture" and "experts" mix.
      dtype: of the computation; None infers it from input and parameters. Whatever it is, products
        accumulate in float32 and the guide's argmax and softmax and the generator's sigmoid are in
        float32.
      param_dtype: of the parameters.
      precision: of the products, see `jax.lax.Precision`.
      kernel_init: of the filters, as in `nn.Conv`: the filter that a new layer generates for an
        input of zeros is one draw of it, and for other inputs nearly so; the parameters that
        filters are mixed of are made to suit. Where it names axes, as `nn.with_partitioning` does,
        those parameters have the names on their last axes and none on those that they have more.
      bias_init: initial bias.
      promote_dtype: brings input and parameters to one dtype, as in `nn.Conv`.
      mask, conv_general_dilated, conv_general_dilated_cls: have no meaning here; the error that
        another value than None gives says what to do instead.
      implementation: of the region convolution, see `drconv_jax.region_conv`.
    """

    features: int
    kernel_size: int | Sequence[int] = (3, 3)
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: jax.Array | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Any] = promote_dtype
    conv_general_dilated: ConvGeneralDilatedT | None = None
    conv_general_dilated_cls: Any = None
    # What nn.Conv does not have stands last, so that positions mean here what they mean there.
    regions: int = 8
    guide_kernel_size: int | Sequence[int] | None = None
    filter_generator: str | FilterGenerator = "mixture"
    experts: int = 8
    implementation: str | Sequence[str] | None = None

    @nn.compact
    def __call__(
        self, inputs: Num[Array, ...], guide: Float[Array, ...] | None = None
    ) -> Float[Array, ...]:
        """Applies the layer.

        Args:
          inputs: (*batch, *spatial, in), with any number of batch dimensions, none included.
          guide: guide features (*batch, *spatial, m) to use in place of the layer's own, which
            then has no guide convolution; of another spatial size than the output's, they are
            resized by nearest neighbour.

        Returns:
          The output, (*batch, *out_spatial, features); on a mesh with Explicit axes, sharded along
          the batch as the input is.

        Raises:
          TypeError: a field that counts is no integer, the input is complex, or the guide is not
            floating point.
          ValueError: a field is out of range, or the input or the guide does not fit in shape.
        """
        functional.refuse_unsupported(
            mask=self.mask,
            conv_general_dilated=self.conv_general_dilated,
            conv_general_dilated_cls=self.conv_general_dilated_cls,
        )
        hyper = functional.Hyperparameters.of(
            self, promote_dtype=lambda values, dtype: self.promote_dtype(*values, dtype=dtype)
        )
        functional.check_input(hyper, inputs)
        inits = functional.init(
            hyper,
            inputs.shape[-1],
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            with_guide=guide is None,
        )
        params = {name: self.param(name, init) for name, init in inits.items()}
        y, index = functional.apply(hyper, params, inputs, guide)
        self.sow("intermediates", "region_index", index)
        return y
