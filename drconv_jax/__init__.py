"""Dynamic Region-Aware Convolution for JAX and Flax."""

from drconv_jax import nnx
from drconv_jax.guide import guide_mask, region_index
from drconv_jax.linen import DRConv
from drconv_jax.region_conv import region_conv

__all__ = ["DRConv", "guide_mask", "nnx", "region_conv", "region_index"]
