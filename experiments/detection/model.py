"""Which detector an experiment trains."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.detection import Anchors, FasterRCNN, MaskRCNN
from drconv_jax.models import BlockGuide, create_model, list_models
from experiments.runtime import mesh as meshes
from experiments.runtime.configs import check_options
from experiments.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Which detector."""

    name: str = "dr_maskrcnn_shufflenet_v2_x0_5_fpn"
    """Any name of drconv_jax.models.list_models("detection"), such as
    dr_maskrcnn_shufflenet_v2_x1_0_fpn or fasterrcnn_mobilenet_v2_x1_0_fpn."""
    conv: Literal["drconv", "standard", "dynamic"] | None = None
    """What stands where DRConv replaces a convolution of the backbone: DRConv, nn.Conv, or a
    dynamic convolution (DRConv with one region); default: as the name says."""
    placement: Literal["all", "last"] | None = None
    """Which 1x1 convolutions of a block it replaces; default: as the name says."""
    regions: int = 8
    """m, the regions of a DRConv."""
    filter_generator: Literal["mixture", "pooled", "experts"] = "mixture"
    """DRConv's own filter generator, the paper's or the released code's."""
    shared_guide: bool = True
    """Whether the convolutions of a block share one guide, as in the released code."""
    dr_pyramid: bool = False
    """Whether the pyramid's convolutions are those of --model.conv too."""
    dr_heads: bool = False
    """Whether the 3x3 convolutions of the heads are."""
    features: int = 256
    """Channels of the pyramid."""
    box_features: int = 1024
    """Of the box head's two layers."""
    mask_features: int = 256
    """Of the mask head's convolutions."""
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Sides of square anchors on each of the five levels, in pixels."""
    pre_nms: tuple[int, int] = (2000, 1000)
    """Proposals of a level before suppression, in training and in evaluation."""
    post_nms: tuple[int, int] = (2000, 1000)
    """Proposals of an image after suppression."""
    anchors_per_image: int = 256
    """Anchors that the region proposal network learns of."""
    regions_per_image: int = 512
    """Proposals that the heads learn of."""
    detections: int = 100
    """Objects found in an image, at most."""
    score_threshold: float = 0.05
    """Least probability of an object."""
    batch_norm: Literal["live", "frozen"] = "live"
    """Whether batch norms use the statistics of the batch, of all devices together, or those that
    they have: "frozen" is for small batches, and for a backbone that is trained already."""
    group_norm: bool = False
    """Whether the pyramid and the mask head have group norm, which needs no large batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; boxes, scores and losses are float32."""

    def __post_init__(self) -> None:
        counts = ("regions", "features", "box_features", "mask_features", "anchors_per_image")
        check_options(
            self,
            "model",
            *(
                (name, getattr(self, name) >= 1, "at least 1")
                for name in (*counts, "regions_per_image", "detections")
            ),
            ("pre_nms", min(self.pre_nms) >= 1, "at least 1 each"),
            ("post_nms", min(self.post_nms) >= 1, "at least 1 each"),
            (
                "anchor_sizes",
                len(self.anchor_sizes) == 5 and min(self.anchor_sizes) > 0,
                "five positive numbers",
            ),
            ("score_threshold", 0 <= self.score_threshold < 1, "at least 0 and less than 1"),
        )
        self.build(1)

    @property
    def has_masks(self) -> bool:
        """Whether it finds masks, or boxes alone."""
        return "maskrcnn" in self.name

    @property
    def has_guide(self) -> bool:
        """Whether the network has guide masks to look at."""
        return self._conv == "drconv"

    @property
    def is_plain(self) -> bool:
        """Whether all its convolutions are nn.Conv."""
        return self._conv == "standard"

    @property
    def _conv(self) -> str:
        return self.conv or ("drconv" if self.name.startswith("dr_") else "standard")

    def build(self, num_classes: int) -> FasterRCNN:
        """The detector for this many classes, without the background.

        Raises:
          UserError: the name is unknown.
        """
        if self.name not in (names := list_models("detection")):
            raise UserError(
                f'--model.name must be one of list_models("detection"), such as {names[-1]}, got '
                f'"{self.name}".'
            )
        dynamic = functools.partial(
            DRConv,
            regions=1 if self._conv == "dynamic" else self.regions,
            filter_generator=self.filter_generator,
        )
        conv: Any = nn.Conv if self._conv == "standard" else dynamic
        fields: dict[str, Any] = {
            "num_classes": num_classes,
            "conv": conv,
            "guide": BlockGuide() if self._conv == "drconv" and self.shared_guide else None,
            "pyramid_conv": conv if self.dr_pyramid else nn.Conv,
            "head_conv": conv if self.dr_heads else nn.Conv,
            "features": self.features,
            "box_features": self.box_features,
            "anchors": Anchors(tuple((size,) for size in self.anchor_sizes)),
            "rpn_pre_nms_top_n": self.pre_nms,
            "rpn_post_nms_top_n": self.post_nms,
            "rpn_batch_size_per_image": self.anchors_per_image,
            "box_batch_size_per_image": self.regions_per_image,
            "box_detections_per_img": self.detections,
            "box_score_thresh": self.score_threshold,
            "batch_norm": self.batch_norm,
            "group_norm": self.group_norm,
            "dtype": jnp.dtype(self.dtype),
            "batch_axes": meshes.AXES,
        }
        if self.placement is not None:
            fields["placement"] = self.placement
        if self.has_masks:
            fields |= {
                "mask_features": (self.mask_features,) * 4,
                "mask_upsampled": self.mask_features,
            }
        detector = create_model(self.name, **fields)
        assert isinstance(detector, MaskRCNN if self.has_masks else FasterRCNN)
        return detector
