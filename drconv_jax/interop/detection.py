"""Names of torchvision's Faster R-CNN and Mask R-CNN with a feature pyramid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from drconv_jax.detection import FasterRCNN, MaskRCNN
from drconv_jax.interop.entries import Entry
from drconv_jax.interop.networks import NETWORKS, Layers, entries_of_layers


def entries_of_detector(model: FasterRCNN, arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    """What a detector needs of a state dict.

    Raises:
      ValueError: torchvision has no such backbone, or the detector has a layer that torchvision's
        has not, such as a DRConv.
    """
    del arrays
    size = max(model.strides)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(
        model.init, jax.random.key(0), images, jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )
    entries = entries_of_layers(model, variables, _layers(model))
    return [_as_torchvision_has_it(entry) for entry in entries]


def _layers(model: FasterRCNN) -> Layers:
    tables = [t for kind, (t, *_) in NETWORKS.items() if isinstance(model.backbone, kind)]
    if not tables:
        raise ValueError(
            f"backbone must be one of {', '.join(kind.__name__ for kind in NETWORKS)}, got "
            f"{type(model.backbone).__name__}."
        )
    for ours, theirs in tables[0](model.backbone):
        yield f"backbone/{ours}", f"backbone.body.{theirs.removeprefix('features.')}"
    for i in range(len(model.strides)):
        yield f"pyramid/inner{i}", f"backbone.fpn.inner_blocks.{i}.0"
        yield f"pyramid/layer{i}", f"backbone.fpn.layer_blocks.{i}.0"
    for i in range(model.rpn_depth):
        yield f"rpn/head/conv{i}", f"rpn.head.conv.{i}.0"
    yield "rpn/head/objectness", "rpn.head.cls_logits"
    yield "rpn/head/deltas", "rpn.head.bbox_pred"
    yield "box_head/fc6", "roi_heads.box_head.fc6"
    yield "box_head/fc7", "roi_heads.box_head.fc7"
    yield "box_head/class", "roi_heads.box_predictor.cls_score"
    yield "box_head/deltas", "roi_heads.box_predictor.bbox_pred"
    if isinstance(model, MaskRCNN):
        for i in range(len(model.mask_features)):
            yield f"mask_head/conv{i}", f"roi_heads.mask_head.{i}.0"
        yield "mask_head/upsample", "roi_heads.mask_predictor.conv5_mask"
        yield "mask_head/logits", "roi_heads.mask_predictor.mask_fcn_logits"


def _as_torchvision_has_it(entry: Entry) -> Entry:
    """The two kernels that lie otherwise there than those of all other layers."""
    if entry.path[-3:] == ("box_head", "fc6", "kernel"):

        def channels_last(kernel: np.ndarray) -> np.ndarray:
            """Torchvision's regions are flattened channels first."""
            features = kernel.reshape(len(kernel), -1, 7, 7)
            return features.transpose(2, 3, 1, 0).reshape(-1, len(kernel))

        return dataclasses.replace(entry, convert=channels_last)
    if entry.path[-3:] == ("mask_head", "upsample", "kernel"):
        features, channels, *kernel = entry.shape  # a transposed convolution's: in, out
        return dataclasses.replace(
            entry,
            shape=(channels, features, *kernel),
            convert=lambda kernel: kernel.transpose(2, 3, 0, 1),
        )
    return entry
