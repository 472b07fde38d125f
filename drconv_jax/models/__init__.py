"""Networks whose convolutions DRConv can replace, one file a network; `registry` names them."""

from drconv_jax.models.embedding import EmbeddingNetwork
from drconv_jax.models.mobilefacenet import MobileFaceNet
from drconv_jax.models.mobilenet_v1 import MobileNetV1
from drconv_jax.models.mobilenet_v2 import MobileNetV2
from drconv_jax.models.parts import BlockGuide
from drconv_jax.models.registry import create_model, list_models
from drconv_jax.models.shufflenet_v2 import ShuffleNetV2

__all__ = [
    "BlockGuide",
    "EmbeddingNetwork",
    "MobileFaceNet",
    "MobileNetV1",
    "MobileNetV2",
    "ShuffleNetV2",
    "create_model",
    "list_models",
]
