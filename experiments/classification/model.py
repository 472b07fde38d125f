"""Which network an experiment trains."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.models import (
    BlockGuide,
    MobileFaceNet,
    MobileNetV1,
    MobileNetV2,
    ShuffleNetV2,
    create_model,
)
from experiments.classification.guides import Guide, Guided
from experiments.runtime.configs import check_options
from experiments.runtime.errors import UserError

_SMALL = "small"
# How many numbers an option takes.
_COUNTS: Mapping[type[nn.Module], Mapping[str, int]] = {
    ShuffleNetV2: {"channels": 5, "blocks": 3, "stem_strides": 2},
    MobileNetV1: {"stem_strides": 1},
    MobileNetV2: {"stem_strides": 1},
    MobileFaceNet: {"blocks": 4},
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    name: str = _SMALL
    """"small", a ShuffleNetV2 0.5 with 2 blocks in a stage for small images, or any name of
    drconv_jax.models.list_models(), such as dr_shufflenet_v2_x0_5 or mobilenet_v2_x1_0."""
    conv: Literal["drconv", "standard", "local", "dynamic"] | None = None
    """What stands where DRConv replaces a convolution: DRConv, nn.Conv, DeepFace's locally
    connected convolution, or a dynamic convolution (DRConv with one region); default: as the name
    says, DRConv in "small"."""
    placement: Literal["all", "last"] | None = None
    """Which 1x1 convolutions of a block it replaces; default: as the name says."""
    width: float | None = None
    """Width multiplier; default: as the name says."""
    channels: tuple[int, ...] | None = None
    """Channels of a ShuffleNetV2's stem, stages 2, 3 and 4 and last convolution, in place of the
    width's."""
    blocks: tuple[int, ...] | None = None
    """Blocks in the stages of a ShuffleNetV2 or MobileFaceNet; default: as the name says."""
    stem_strides: tuple[int, ...] | None = None
    """Strides of a ShuffleNetV2's first convolution and of the pooling behind it, or of a
    MobileNet's first convolution; small ones keep small images large. Default: as the name says."""
    regions: int = 8
    """m, the regions of a DRConv."""
    filter_generator: Literal["mixture", "pooled", "experts"] = "mixture"
    """DRConv's own filter generator, the paper's or the released code's."""
    experts: int = 8
    """Filter banks that the generators "mixture" and "experts" mix."""
    guide: Guide = "learned"
    """How positions get their regions: learned with the softmax backward or, to compare, with a
    straight-through one, in the cells of a fixed grid, or at random."""
    guide_kernel_size: int | None = None
    """Of the guide convolution; default: DRConv's."""
    shared_guide: bool | None = None
    """Whether the convolutions of a block share one guide, as in the released code; default: as the
    name says, no in "small"."""
    guide_pool: int = 1
    """Size of the squares of positions that a block's guide gives one region; 1 is the released
    code's."""
    guide_start: Literal["random", "grid"] = "random"
    """Regions that a block's guide starts with: at random, as in the released code, or the cells of
    a grid, which then learn."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""

    def __post_init__(self) -> None:
        check_options(
            self,
            "model",
            ("width", self.width is None or 0 < self.width < math.inf, "positive and finite"),
            ("channels", min(self.channels or (1,)) >= 1, "at least 1 each"),
            ("blocks", min(self.blocks or (1,)) >= 1, "at least 1 each"),
            ("stem_strides", min(self.stem_strides or (1,)) >= 1, "at least 1 each"),
            ("regions", self.regions >= 1, "at least 1"),
            ("experts", self.experts >= 1, "at least 1"),
            ("guide_pool", self.guide_pool >= 1, "at least 1"),
            (
                "guide_kernel_size",
                self.guide_kernel_size is None or self.guide_kernel_size >= 1,
                "at least 1",
            ),
        )
        self.build(2)

    @property
    def has_guide(self) -> bool:
        """Whether the network has guide masks to look at."""
        return self._conv == "drconv"

    @property
    def _conv(self) -> str:
        named = "drconv" if self.name == _SMALL or self.name.startswith("dr_") else "standard"
        return self.conv or named

    def build(self, num_classes: int) -> nn.Module:
        """The network for this many classes.

        Raises:
          UserError: the name is unknown, or the network has no such option.
        """
        shared = self.name.startswith("dr_") if self.shared_guide is None else self.shared_guide
        learned = self.has_guide and self.guide in ("learned", "straight-through")
        guide = BlockGuide(self.regions, self.guide_pool, self.guide_start)
        dynamic = functools.partial(
            DRConv if self.guide == "learned" else functools.partial(Guided, kind=self.guide),
            regions=1 if self._conv == "dynamic" else self.regions,
            filter_generator=self.filter_generator,
            experts=self.experts,
            guide_kernel_size=self.guide_kernel_size and (self.guide_kernel_size,) * 2,
        )
        makers: dict[str, Any] = {
            "drconv": dynamic,
            "standard": nn.Conv,
            "local": nn.ConvLocal,
            "dynamic": dynamic,
        }
        fields: dict[str, Any] = {
            "num_classes": num_classes,
            "conv": makers[self._conv],
            "guide": guide if learned and shared else None,
            "dtype": jnp.dtype(self.dtype),
        }
        if fields["guide"] is None and guide != BlockGuide(self.regions):
            raise UserError(
                "--model.guide-pool and --model.guide-start need a learned guide that a block "
                f"shares; add --model.shared-guide or leave them out, got {self.guide_pool} and "
                f'"{self.guide_start}".'
            )
        for name in ("placement", "width", "channels", "blocks", "stem_strides"):
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        if "shufflenet" not in self.name and len(self.stem_strides or ()) == 1:
            (fields["stem_strides"],) = self.stem_strides or ()
        try:
            self._check_counts()
            if self.name == _SMALL:
                small = {"width": 0.5, "blocks": (2, 2, 2), "stem_strides": (1, 2)}
                return ShuffleNetV2(**{**small, **fields})
            return create_model(self.name, **fields)
        except ValueError as error:
            raise UserError(f'--model.name: {error} "small" is another.') from None
        except TypeError as error:  # a field that this network does not have
            option = str(error).rsplit("'", 2)[-2].replace("_", "-")
            raise UserError(
                f'--model.{option}: the network "{self.name}" has no such option; leave it out.'
            ) from None

    def _check_counts(self) -> None:
        """Refuses an option of too many or too few numbers."""
        network = ShuffleNetV2 if self.name == _SMALL else type(create_model(self.name))
        for name, count in _COUNTS[network].items():
            value = getattr(self, name)
            if value is not None and len(value) != count:
                numbers = "one number" if count == 1 else f"{count} numbers"
                raise UserError(
                    f"--model.{name.replace('_', '-')} must be {numbers} in the network "
                    f'"{self.name}", got {" ".join(map(str, value)) or "none"}.'
                )
