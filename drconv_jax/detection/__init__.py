"""Detection and instance segmentation with fixed shapes: pure functions, and networks of them."""

from drconv_jax.detection.anchors import Anchors
from drconv_jax.detection.boxes import BoxCoder
from drconv_jax.detection.images import normalize
from drconv_jax.detection.masks import mask_targets, mask_targets_of_crops, paste_masks
from drconv_jax.detection.matching import match, sample
from drconv_jax.detection.nms import nms
from drconv_jax.detection.pyramid import FeaturePyramid
from drconv_jax.detection.rcnn import Detections, FasterRCNN, MaskRCNN, Objects, as_backbone
from drconv_jax.detection.roi_align import levels_of, multilevel_roi_align, roi_align
from drconv_jax.detection.rpn import RegionProposalNetwork

__all__ = [
    "Anchors",
    "BoxCoder",
    "Detections",
    "FasterRCNN",
    "FeaturePyramid",
    "MaskRCNN",
    "Objects",
    "RegionProposalNetwork",
    "as_backbone",
    "levels_of",
    "mask_targets",
    "mask_targets_of_crops",
    "match",
    "multilevel_roi_align",
    "nms",
    "normalize",
    "paste_masks",
    "roi_align",
    "sample",
]
