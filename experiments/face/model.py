"""Which network makes embeddings of faces."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.models import BlockGuide, EmbeddingNetwork, MobileFaceNet, create_model, list_models
from experiments.runtime.configs import check_options
from experiments.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    """Which network."""

    name: str = "dr_mobilefacenet_all"
    """Any name of drconv_jax.models.list_models("faces"), such as mobilefacenet or
    dr_shufflenet_v2_x0_5_face."""
    conv: Literal["drconv", "standard", "local", "dynamic"] | None = None
    """What stands where DRConv replaces a convolution: DRConv, nn.Conv, DeepFace's locally
    connected convolution, or a dynamic convolution (DRConv with one region); default: as the name
    says."""
    placement: Literal["all", "last"] | None = None
    """Which 1x1 convolutions of a block it replaces; default: as the name says."""
    width: float | None = None
    """Width multiplier; default: as the name says."""
    blocks: tuple[int, ...] | None = None
    """Blocks of a MobileFaceNet's stem and stages; default: as the name says."""
    regions: int = 8
    """m, the regions of a DRConv."""
    filter_generator: Literal["mixture", "pooled", "experts"] = "mixture"
    """DRConv's own filter generator, the paper's or the released code's."""
    shared_guide: bool = True
    """Whether the convolutions of a block share one guide, as in the released code."""
    embedding_size: int = 128
    """Numbers in an embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the margin softmax is float32."""

    def __post_init__(self) -> None:
        check_options(
            self,
            "model",
            ("width", self.width is None or 0 < self.width < math.inf, "positive and finite"),
            ("blocks", self.blocks is None or len(self.blocks) == 4, "four numbers"),
            ("regions", self.regions >= 1, "at least 1"),
            ("embedding_size", self.embedding_size >= 1, "at least 1"),
        )
        self.build()

    @property
    def has_guide(self) -> bool:
        """Whether the network has guide masks to look at."""
        return self._conv == "drconv"

    @property
    def _conv(self) -> str:
        return self.conv or ("drconv" if self.name.startswith("dr_") else "standard")

    def build(self) -> MobileFaceNet | EmbeddingNetwork:
        """The network.

        Raises:
          UserError: the name is unknown, or the network has no such option.
        """
        if self.name not in (names := list_models("faces")):
            raise UserError(
                f'--model.name must be one of list_models("faces"), such as {names[0]}, got '
                f'"{self.name}".'
            )
        if self.blocks is not None and "mobilefacenet" not in self.name:
            raise UserError(f"--model.blocks is for a mobilefacenet, not for {self.name}.")
        dynamic = functools.partial(
            DRConv,
            regions=1 if self._conv == "dynamic" else self.regions,
            filter_generator=self.filter_generator,
        )
        makers: dict[str, Any] = {
            "drconv": dynamic,
            "standard": nn.Conv,
            "local": nn.ConvLocal,
            "dynamic": dynamic,
        }
        fields: dict[str, Any] = {
            "embedding_size": self.embedding_size,
            "conv": makers[self._conv],
            "guide": BlockGuide() if self.has_guide and self.shared_guide else None,
            "dtype": jnp.dtype(self.dtype),
        }
        for option in ("placement", "width", "blocks"):
            if getattr(self, option) is not None:
                fields[option] = getattr(self, option)
        network = create_model(self.name, **fields)
        assert isinstance(network, MobileFaceNet | EmbeddingNetwork)
        return network
