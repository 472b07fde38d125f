"""torchvision's detector of the network, weights and settings of one of ours, to compare with.

Its transform is left out: it gets the canvases that ours gets, and says where things are on them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FasterRCNN as TorchFasterRCNN
from torchvision.models.detection import MaskRCNN as TorchMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.shufflenetv2 import ShuffleNetV2 as TorchShuffleNetV2
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from drconv_jax.detection import FasterRCNN, MaskRCNN, normalize
from drconv_jax.interop import export_torch
from drconv_jax.models import MobileNetV2, ShuffleNetV2

Objects = dict[str, Tensor]
"""The "boxes", "labels", and "masks" of an image, in torchvision's form."""

STRIDES = (4, 8, 16, 32)

# The parts of the backbones whose output is the last of each of these strides.
_SHUFFLENET_MAPS = ("maxpool", "stage2", "stage3", "stage4")
_MOBILENET_MAPS = ("3", "6", "13", "17")
# What our fields and torchvision's arguments are both called.
_SETTINGS = (
    "rpn_nms_thresh", "rpn_score_thresh", "rpn_fg_iou_thresh", "rpn_bg_iou_thresh",
    "rpn_batch_size_per_image", "rpn_positive_fraction", "box_score_thresh", "box_nms_thresh",
    "box_detections_per_img", "box_fg_iou_thresh", "box_batch_size_per_image",
    "box_positive_fraction",
)  # fmt: skip


def build(model: FasterRCNN, variables: Mapping[str, Any]) -> TorchFasterRCNN:
    """The detector, with these weights.

    Args:
      model: ours, in float32 over all of `STRIDES`.
      variables: of it.

    Raises:
      ValueError: torchvision has no such network.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    state = {name: torch.tensor(array) for name, array in export_torch(model, variables).items()}
    backbone, maps = _backbone(model, state)
    anchors = AnchorGenerator(
        model.anchors.sizes, (model.anchors.aspect_ratios,) * len(model.anchors.sizes)
    )
    classes = model.num_classes + 1
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(model.features, anchors.num_anchors_per_location()[0], model.rpn_depth),
        "box_roi_pool": roi_align(7),
        "box_head": TwoMLPHead(model.features * 7**2, model.box_features),
        "box_predictor": FastRCNNPredictor(model.box_features, classes),
    }
    kind = TorchFasterRCNN
    if isinstance(model, MaskRCNN):
        kind = TorchMaskRCNN
        parts |= {
            "mask_roi_pool": roi_align(14),
            "mask_head": MaskRCNNHeads(model.features, model.mask_features, dilation=1),
            "mask_predictor": MaskRCNNPredictor(
                model.mask_features[-1], model.mask_upsampled, classes
            ),
        }
    limits = {
        f"rpn_{when}_nms_top_n_{mode}": getattr(model, f"rpn_{when}_nms_top_n")[i]
        for when in ("pre", "post")
        for i, mode in enumerate(("train", "test"))
    }
    network = kind(
        BackboneWithFPN(backbone, maps, _channels_of_maps(state), model.features),
        **parts,
        **limits,
        **{name: getattr(model, name) for name in _SETTINGS},
        box_bg_iou_thresh=model.box_fg_iou_thresh,
    )
    counts = {n: v for n, v in network.state_dict().items() if n.endswith("num_batches_tracked")}
    network.load_state_dict(counts | state)
    return network


def roi_align(size: int) -> MultiScaleRoIAlign:
    """RoIAlign of the pyramid's maps to `size` bins a side."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio=2)
    # It would take the scales from the images of its first call, which are smaller than the canvas.
    pool.scales = [1 / stride for stride in STRIDES]
    pool.map_levels = LevelMapper(k_min=2, k_max=5)
    return pool


def losses(
    network: TorchFasterRCNN,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    objects: list[Objects],
) -> dict[str, Tensor]:
    """The losses to add up, of a network in training.

    Args:
      network: the detector.
      images: normalised, (batch, 3, height, width).
      sizes: height and width of each image on its canvas.
      objects: what there is in each.
    """
    maps = network.backbone(images)
    proposals, of_proposals = network.rpn(ImageList(images, list(sizes)), maps, objects)
    _, of_heads = network.roi_heads(maps, proposals, list(sizes), objects)
    return of_proposals | of_heads


def find(
    network: TorchFasterRCNN, images: Tensor, sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """What a network in evaluation finds in each image; arguments as of `losses`."""
    with torch.no_grad():
        maps = network.backbone(images)
        proposals, _ = network.rpn(ImageList(images, list(sizes)), maps)
        found, _ = network.roi_heads(maps, proposals, list(sizes))
    return found


def images_of(arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, list[tuple[int, int]]]:
    """A batch's images as `losses` takes them, and their sizes."""
    normal = np.asarray(_normalize(arrays["image"], arrays["size"]))
    return torch.tensor(normal).permute(0, 3, 1, 2).contiguous(), [
        (int(height), int(width)) for height, width in arrays["size"]
    ]


def objects_of(
    arrays: Mapping[str, np.ndarray], scales: Float32[np.ndarray, "batch 2"]
) -> list[Objects]:
    """A batch's objects as torchvision wants them, with the masks pasted back into the canvas.

    Args:
      arrays: of `Preparation`.
      scales: of each image's height and width on the canvas, to those of its file.
    """
    canvas = arrays["image"].shape[1:3]
    objects = []
    for i, labels in enumerate(arrays["labels"]):
        real = labels > 0
        boxes = arrays["boxes"][i][real]
        objects.append({"boxes": torch.tensor(boxes), "labels": torch.tensor(labels[real]).long()})
        if "masks" in arrays:
            masks = pasted(arrays["masks"][i][real], boxes, canvas, scales[i])
            objects[-1]["masks"] = torch.tensor(masks)
    return objects


def pasted(
    crops: UInt8[np.ndarray, "objects crop crop"],
    boxes: Float32[np.ndarray, "objects 4"],
    canvas: tuple[int, int],
    scale: Float32[np.ndarray, 2],
) -> UInt8[np.ndarray, "objects height width"]:
    """Masks of the whole canvas, 0 or 1 at each pixel.

    A pixel belongs to an object if its middle does. In the crops, the value of a pixel of the
    image's file lies at its upper left corner: half such a pixel left of and above its middle.

    Args:
      crops: masks cut to their boxes, as `resampling.mask_of_box` does.
      boxes: in pixels of the canvas.
      canvas: its height and width.
      scale: of the image's height and width on the canvas, to those of its file.
    """
    rows, columns = (
        _interpolation(
            np.arange(canvas[axis]) + 0.5, boxes[:, 1 - axis], boxes[:, 3 - axis],
            scale[axis] / 2, crops.shape[-1],
        )
        for axis in (0, 1)
    )  # fmt: skip
    inside = np.matmul(np.matmul(rows, crops.astype(np.float32)), columns.transpose(0, 2, 1))
    return (inside >= 255 / 2).astype(np.uint8)


def _interpolation(
    at: np.ndarray, low: np.ndarray, high: np.ndarray, shift: float, cells: int
) -> Float32[np.ndarray, "objects pixels cells"]:
    """How much of each cell between two ends of an axis is at each place; nothing is beyond.

    The cells tell what is `shift` further on.
    """
    at, low, high = at[None], low[:, None], high[:, None]
    place = (at - shift - low) / np.maximum(high - low, 1) * cells - 0.5
    near = 1 - np.abs(np.clip(place, 0, cells - 1)[..., None] - np.arange(cells))
    inside = (low <= at) & (at < high)
    return (np.maximum(near, 0) * inside[..., None]).astype(np.float32)


def _backbone(model: FasterRCNN, state: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, str]]:
    """The network, and the names of its maps by the parts that make them."""
    if model.strides != STRIDES:
        raise ValueError(f"strides must be {STRIDES}, got {model.strides}.")
    backbone = model.backbone
    if isinstance(backbone, MobileNetV2):
        network, parts = mobilenet_v2(width_mult=backbone.width).features, _MOBILENET_MAPS
    elif isinstance(backbone, ShuffleNetV2):
        # The last convolution is left out of a detector, whatever its channels.
        channels = [*_channels_of_maps(state), 1024]
        network, parts = TorchShuffleNetV2(list(backbone.blocks), channels), _SHUFFLENET_MAPS
    else:
        raise ValueError(
            "torchvision has no network like the backbone; it must be a ShuffleNetV2 or "
            f"MobileNetV2, got {type(backbone).__name__}."
        )
    return network, {part: str(i) for i, part in enumerate(parts)}


def _channels_of_maps(state: Mapping[str, Tensor]) -> list[int]:
    names = (f"backbone.fpn.inner_blocks.{i}.0.weight" for i in range(len(STRIDES)))
    return [state[name].shape[1] for name in names]


_normalize = jax.jit(normalize)
