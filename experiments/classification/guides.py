"""DRConv with regions that are not chosen as the paper has it, to compare."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from drconv_jax import DRConv
from drconv_jax.guide import grid_features

Guide = Literal["learned", "straight-through", "grid", "random"]


class Guided(nn.Module):
    """A DRConv whose guide is of another kind; called as `nn.Conv` is, for kernels of odd size.

    Attributes:
      kind: "straight-through", a learned guide whose mask passes gradients on as they are;
        "grid", the cells of a grid over the image; "random", a region drawn once for every
        position, for all samples.
      features, kernel_size, strides, padding, use_bias, dtype, regions, guide_kernel_size,
        filter_generator, experts: see `DRConv`.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: int = 0
    use_bias: bool = True
    dtype: Dtype | None = None
    kind: Guide = "straight-through"
    regions: int = 8
    guide_kernel_size: tuple[int, int] | None = None
    filter_generator: str = "mixture"
    experts: int = 8

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width in"],
        guide: Float[Array, "batch guide_height guide_width regions"] | None = None,
    ) -> Float[Array, "batch out_height out_width features"]:
        """Applies the layer.

        Args:
          x: the input.
          guide: the block's guide features, for "straight-through"; None makes the layer's own.
        """
        if self.kind == "straight-through":
            size = self.guide_kernel_size or self.kernel_size
            if guide is None:
                guide = nn.Conv(
                    self.regions,
                    size,
                    self.strides,
                    padding=size[0] // 2,
                    dtype=self.dtype,
                    name="guide",
                )(x)
            guide = straight_through(guide)
        else:
            height, width = (-(-length // self.strides) for length in x.shape[1:3])
            make = grid_features if self.kind == "grid" else _random_guide
            guide = jnp.broadcast_to(
                make(height, width, self.regions), (x.shape[0], height, width, self.regions)
            )
        layer = DRConv(
            self.features,
            self.kernel_size,
            self.strides,
            padding=self.padding,
            use_bias=self.use_bias,
            dtype=self.dtype,
            regions=self.regions,
            filter_generator=self.filter_generator,
            experts=self.experts,
            name="conv",
        )
        return layer(x, guide)


def _random_guide(height: int, width: int, regions: int) -> Float[Array, "height width regions"]:
    return jax.random.normal(jax.random.key(0), (height, width, regions))


@jax.custom_vjp
def straight_through(
    guide: Float[Array, "*positions regions"],
) -> Float[Array, "*positions regions"]:
    """Guide features of the same choices, given to DRConv for straight-through gradients.

    They are so small that DRConv's softmax gradient is s_j (g_j - sum_i s_i g_i) with all s = 1/m;
    m times that is passed on. From the straight-through gradient g_j it differs by the mean over
    regions, which moves all guide features of a position alike and so changes no choice.
    """
    return guide * _TINY


# A power of two, so that no choice changes by rounding.
_TINY = 2.0**-20

straight_through.defvjp(
    lambda guide: (straight_through(guide), None),
    lambda _, cotangent: (cotangent * cotangent.shape[-1],),
)
