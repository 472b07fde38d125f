"""Networks whose convolutions DRConv can replace, one file a network."""

from drconv_jax.models.shufflenet_v2 import ShuffleNetV2

__all__ = ["ShuffleNetV2"]
