"""Faster R-CNN and Mask R-CNN on a feature pyramid, over any network of `drconv_jax.models`.

All shapes are fixed: images lie on canvases of one size, objects, proposals and detections in slots
of which some are empty. So everything is compiled once, and runs as it is on TPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray, Shaped

from drconv_jax.detection import heads, losses, rpn
from drconv_jax.detection.anchors import Anchors
from drconv_jax.detection.boxes import iou
from drconv_jax.detection.masks import mask_targets, mask_targets_of_crops
from drconv_jax.detection.matching import BACKGROUND, match, sample
from drconv_jax.detection.pyramid import FeaturePyramid
from drconv_jax.detection.roi_align import levels_of, multilevel_roi_align
from drconv_jax.models.parts import ConvFactory

Maps = list[Float[Array, "batch _ _ channels"]]


class Objects(NamedTuple):
    """What there is in a batch of images.

    Attributes:
      boxes: in pixels of the canvas.
      labels: classes from 1; 0 is an empty slot.
      masks: of the objects, between 0 and 1 (or 0 and 255 as uint8): at every pixel of the canvas,
        or of any other size, cut to their boxes as `roi_align` cuts; None where there are none.
    """

    boxes: Float[Array, "batch objects 4"]
    labels: Int[Array, "batch objects"]
    masks: Num[Array, "batch objects mask_height mask_width"] | None = None


class Detections(NamedTuple):
    """What was found in a batch of images, by falling score.

    Attributes:
      boxes: in pixels of the canvas.
      scores: probabilities.
      labels: classes from 1; 0 is an empty slot.
      masks: probabilities within the boxes (`masks.paste_masks` puts them into the image); None of
        a network without masks.
    """

    boxes: Float[Array, "batch detections 4"]
    scores: Float[Array, "batch detections"]
    labels: Int[Array, "batch detections"]
    masks: Float[Array, "batch detections 28 28"] | None = None


class FasterRCNN(nn.Module):
    """The detector.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from drconv_jax.detection import FasterRCNN
      >>> from drconv_jax.models import ShuffleNetV2
      >>> model = FasterRCNN(ShuffleNetV2(width=0.5), num_classes=3)
      >>> images, sizes = jnp.ones((1, 64, 96, 3)), jnp.array([[64, 90]])
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images, sizes)
      >>> jax.eval_shape(model.apply, variables, images, sizes).boxes.shape
      (1, 100, 4)

    Attributes:
      backbone: a network whose call takes `features=True` and then returns feature maps by stride.
      num_classes: without the background.
      strides: of the backbone's maps that the pyramid is made of.
      features: channels of the pyramid.
      anchors: of every level of the pyramid, and of one that is coarser.
      batch_norm: "live", normalising with the batch's statistics in training, those of all devices
        together; or "frozen", with the running statistics, as for small batches.
      pyramid_conv, head_conv: make the convolutions of the pyramid, and the 3×3 ones of the heads;
        called as `nn.Conv` is.
      group_norm: whether the convolutions of the pyramid and of the mask head have group norm.
      rpn_depth: 3×3 convolutions of the region proposal network.
      rpn_pre_nms_top_n, rpn_post_nms_top_n: see `rpn.propose`; in training, and otherwise.
      rpn_nms_thresh, rpn_score_thresh: see `rpn.propose`.
      rpn_fg_iou_thresh, rpn_bg_iou_thresh: overlap with an object from which on an anchor is
        positive, and below which it is negative.
      rpn_batch_size_per_image, rpn_positive_fraction: anchors drawn for the loss, and how many of
        them are positives at most.
      box_features: of the box head's layers.
      box_score_thresh, box_nms_thresh, box_detections_per_img: see `heads.detect`.
      box_fg_iou_thresh: overlap from which on a proposal is the object's.
      box_batch_size_per_image, box_positive_fraction: as those of the region proposal network.
      dtype: of the computation; boxes, scores and losses are float32.
      batch_axes: axes of the mesh (`jax.set_mesh`) that a batch is parted over. Each device then
        suppresses, matches and draws for its own images alone, where XLA would have all devices
        wait for each other at every turn of a loop. Without them, or without a mesh, it is left to
        XLA.
    """

    backbone: nn.Module
    num_classes: int = 80
    strides: tuple[int, ...] = (4, 8, 16, 32)
    features: int = 256
    anchors: Anchors = Anchors()
    batch_norm: Literal["live", "frozen"] = "live"
    pyramid_conv: ConvFactory = nn.Conv
    head_conv: ConvFactory = nn.Conv
    group_norm: bool = False
    rpn_depth: int = 1
    rpn_pre_nms_top_n: tuple[int, int] = (2000, 1000)
    rpn_post_nms_top_n: tuple[int, int] = (2000, 1000)
    rpn_nms_thresh: float = 0.7
    rpn_score_thresh: float = 0.0
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.5
    box_features: int = 1024
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    box_fg_iou_thresh: float = 0.5
    box_batch_size_per_image: int = 512
    box_positive_fraction: float = 0.25
    dtype: Dtype | None = None
    batch_axes: tuple[str, ...] = ()

    def setup(self) -> None:
        """Names the parts."""
        self.pyramid = FeaturePyramid(self.features, self.pyramid_conv, self.group_norm, self.dtype)
        self.rpn = rpn.RegionProposalNetwork(
            self.anchors, self.rpn_depth, self.head_conv, self.dtype
        )
        self.box_head = heads.BoxHead(self.num_classes + 1, self.box_features, self.dtype)

    def __call__(
        self, images: Float[Array, "batch height width 3"], sizes: Int[Array, "batch 2"]
    ) -> Detections:
        """Finds objects.

        Args:
          images: normalised, in the upper left corner of a canvas that is 0 elsewhere; of a height
            and width that the largest stride divides.
          sizes: height and width of each image on its canvas.
        """
        maps = self._maps(images, train=False)
        proposals = self._propose(*self.rpn(maps), maps, images, sizes, train=False)
        return self._detect(maps, proposals, sizes)

    def losses(
        self,
        images: Float[Array, "batch height width 3"],
        sizes: Int[Array, "batch 2"],
        objects: Objects,
        key: PRNGKeyArray,
    ) -> dict[str, Float[Array, ""]]:
        """The losses to add up in training, by torchvision's names.

        Args:
          images, sizes: see `__call__`.
          objects: what there is in them.
          key: of the draws of anchors and regions.
        """
        maps = self._maps(images, train=self.batch_norm == "live")
        objectness, deltas = self.rpn(maps)
        rpn_key, box_key = jax.random.split(key)
        named = dict(
            zip(
                ("loss_objectness", "loss_rpn_box_reg"),
                self._rpn_losses(objectness, deltas, maps, images, objects, rpn_key),
                strict=True,
            )
        )
        proposals = self._propose(objectness, deltas, maps, images, sizes, train=True)
        proposals = jax.lax.stop_gradient(proposals)
        regions = self._regions(proposals, objects, box_key)
        return named | self._head_losses(maps, regions, objects, sizes)

    def _maps(self, images: Float[Array, "batch height width 3"], train: bool) -> Maps:
        """The levels of the pyramid."""
        coarsest = max(self.strides)
        if images.shape[1] % coarsest or images.shape[2] % coarsest:
            raise ValueError(
                f"images must have a height and width that {coarsest} divides, got "
                f"{images.shape[1]} and {images.shape[2]}; pad them with zeros."
            )
        found = self.backbone(images, train=train, features=True)
        missing = [stride for stride in self.strides if stride not in found]
        if missing:
            raise ValueError(
                f"strides must be among those of the backbone's maps, {tuple(found)}, got "
                f"{self.strides}."
            )
        maps: Maps = self.pyramid([found[stride] for stride in self.strides])
        return maps

    def _by_device(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of a batch, of which each device of a mesh is given its own images."""
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(
            a for a in self.batch_axes if a in mesh.axis_names and a not in mesh.manual_axes
        )
        if not axes:
            return function
        own = PartitionSpec(axes)
        return jax.shard_map(function, in_specs=own, out_specs=own, axis_names=set(axes))

    def _anchors(self, maps: Maps, images: Array) -> tuple[Float[np.ndarray, "_ 4"], ...]:
        height, width = images.shape[1:3]
        return self.anchors((height, width), [(m.shape[1], m.shape[2]) for m in maps])

    def _propose(
        self, objectness: Any, deltas: Any, maps: Maps, images: Array, sizes: Array, *, train: bool
    ) -> rpn.Proposals:
        propose = functools.partial(
            rpn.propose,
            anchors=self._anchors(maps, images),
            pre_nms_top_n=self.rpn_pre_nms_top_n[0 if train else 1],
            post_nms_top_n=self.rpn_post_nms_top_n[0 if train else 1],
            nms_threshold=self.rpn_nms_thresh,
            score_threshold=self.rpn_score_thresh,
        )
        of_images = jax.vmap(lambda o, d, size: propose(o, d, size=size))
        proposals: rpn.Proposals = self._by_device(of_images)(objectness, deltas, sizes)
        return proposals

    def _rpn_losses(
        self,
        objectness: list[Array],
        deltas: list[Array],
        maps: Maps,
        images: Array,
        objects: Objects,
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        anchors = np.concatenate(self._anchors(maps, images))

        def drawn(
            key: PRNGKeyArray, boxes: Array, labels: Array, objectness: Any, deltas: Any
        ) -> tuple[Array, ...]:
            matched = match(
                iou(boxes, jnp.asarray(anchors)),
                labels > 0,
                high=self.rpn_fg_iou_thresh,
                low=self.rpn_bg_iou_thresh,
                low_quality=True,
            )
            chosen, positive, real = sample(
                key,
                matched >= 0,
                matched == BACKGROUND,
                self.rpn_batch_size_per_image,
                self.rpn_positive_fraction,
            )
            own = boxes[jnp.maximum(matched[chosen], 0)]
            return (
                jnp.concatenate(objectness)[chosen],
                jnp.concatenate(deltas)[chosen],
                rpn.CODER.encode(own, jnp.asarray(anchors)[chosen]),
                positive,
                real,
            )

        keys = jax.random.split(key, images.shape[0])
        return losses.rpn_losses(
            *self._by_device(jax.vmap(drawn))(
                keys, objects.boxes, objects.labels, objectness, deltas
            )
        )

    def _regions(self, proposals: rpn.Proposals, objects: Objects, key: PRNGKeyArray) -> _Regions:
        """Proposals, and the objects themselves, drawn for the heads to learn of."""

        def drawn(
            key: PRNGKeyArray, proposals: rpn.Proposals, own: Array, labels: Array
        ) -> _Regions:
            boxes = jnp.concatenate([proposals.boxes, own])
            is_box = jnp.concatenate([proposals.real, labels > 0])
            matched = match(
                iou(own, boxes), labels > 0, high=self.box_fg_iou_thresh, low=self.box_fg_iou_thresh
            )
            chosen, positive, real = sample(
                key,
                (matched >= 0) & is_box,
                (matched == BACKGROUND) & is_box,
                self.box_batch_size_per_image,
                self.box_positive_fraction,
            )
            boxes, matched = boxes[chosen], jnp.maximum(matched[chosen], 0)
            deltas = heads.CODER.encode(own[matched], boxes)
            return _Regions(boxes, matched, jnp.where(positive, labels[matched], 0), deltas, real)

        keys = jax.random.split(key, proposals.boxes.shape[0])
        regions: _Regions = self._by_device(jax.vmap(drawn))(
            keys, proposals, objects.boxes, objects.labels
        )
        return regions

    def _head_losses(
        self, maps: Maps, regions: _Regions, objects: Objects, sizes: Array
    ) -> dict[str, Float[Array, ""]]:
        del sizes
        logits, deltas = self.box_head(_flat(self._aligned(maps, regions.boxes, 7)))
        classifier, box = losses.box_losses(
            logits, deltas, *map(_flat, (regions.labels, regions.deltas, regions.real))
        )
        return {"loss_classifier": classifier, "loss_box_reg": box}

    def _detect(self, maps: Maps, proposals: rpn.Proposals, sizes: Array) -> Detections:
        logits, deltas = self.box_head(_flat(self._aligned(maps, proposals.boxes, 7)))
        batch, count = proposals.real.shape
        detect = functools.partial(
            heads.detect,
            limit=self.box_detections_per_img,
            score_threshold=self.box_score_thresh,
            nms_threshold=self.box_nms_thresh,
        )
        return Detections(
            *self._by_device(jax.vmap(detect))(
                logits.reshape(batch, count, -1),
                deltas.reshape(batch, count, -1, 4),
                proposals.boxes,
                proposals.real,
                sizes,
            )
        )

    def _aligned(
        self, maps: Maps, boxes: Float[Array, "batch n 4"], size: int
    ) -> Float[Array, "batch n size size channels"]:
        """The pyramid's features of boxes; its last level has proposals only."""
        maps = maps[: len(self.strides)]
        levels = levels_of(boxes, len(maps), finest=self.strides[0].bit_length() - 1)
        align = functools.partial(
            multilevel_roi_align,
            output_size=(size, size),
            spatial_scales=[1 / stride for stride in self.strides],
        )
        return self._by_device(align)(maps, boxes, levels)


class MaskRCNN(FasterRCNN):
    """The detector with a mask for every object (He et al., Mask R-CNN, ICCV 2017).

    Attributes:
      mask_features: of the mask head's convolutions.
      mask_upsampled: features of its convolution to twice the size.
    """

    mask_features: tuple[int, ...] = (256, 256, 256, 256)
    mask_upsampled: int = 256

    def setup(self) -> None:
        """Names the parts."""
        super().setup()
        self.mask_head = heads.MaskHead(
            self.num_classes + 1,
            self.mask_features,
            self.mask_upsampled,
            self.head_conv,
            self.group_norm,
            self.dtype,
        )

    def _head_losses(
        self, maps: Maps, regions: _Regions, objects: Objects, sizes: Array
    ) -> dict[str, Float[Array, ""]]:
        if objects.masks is None:
            raise ValueError("objects.masks must be given to train a MaskRCNN, got None.")
        named = super()._head_losses(maps, regions, objects, sizes)
        # Positives come first, and there are never more.
        count = int(regions.labels.shape[1] * self.box_positive_fraction)
        boxes, matched, labels, *_ = (value[:, :count] for value in regions)
        logits = self.mask_head(_flat(self._aligned(maps, boxes, 14)))
        canvas = tuple(length * self.strides[0] for length in maps[0].shape[1:3])
        targets = self._by_device(jax.vmap(functools.partial(_mask_targets, canvas=canvas)))(
            objects.masks, objects.boxes, boxes, matched, sizes
        )
        mask = losses.mask_loss(logits, *map(_flat, (labels, targets, labels > 0)))
        return named | {"loss_mask": mask}

    def _detect(self, maps: Maps, proposals: rpn.Proposals, sizes: Array) -> Detections:
        found = super()._detect(maps, proposals, sizes)
        logits = self.mask_head(_flat(self._aligned(maps, found.boxes, 14)))
        own = jnp.take_along_axis(logits, _flat(found.labels)[:, None, None, None], axis=-1)
        masks = jax.nn.sigmoid(own).reshape(*found.labels.shape, *own.shape[1:3])
        return found._replace(masks=jnp.where((found.labels > 0)[..., None, None], masks, 0))


def as_backbone(variables: Any) -> Any:
    """Variables of a network under the names that they have in a detector over it.

    For `drconv_jax.weights.load_matching`, which starts a detector from a classifier and reports
    what fitted::

      variables, report = load_matching(detector.init(key, images, sizes), as_backbone(source))
    """
    return {collection: {"backbone": tree} for collection, tree in variables.items()}


class _Regions(NamedTuple):
    """Boxes that the heads learn of; those of objects come first.

    Attributes:
      boxes: in pixels.
      matched: the object of each.
      labels: its class; 0 of the background.
      deltas: what the box head is to say of it.
      real: which slots hold a box.
    """

    boxes: Float[Array, "*batch n 4"]
    matched: Int[Array, "*batch n"]
    labels: Int[Array, "*batch n"]
    deltas: Float[Array, "*batch n 4"]
    real: Bool[Array, "*batch n"]


def _mask_targets(
    masks: Num[Array, "objects mask_height mask_width"],
    own: Float[Array, "objects 4"],
    boxes: Float[Array, "n 4"],
    matched: Int[Array, " n"],
    size: Int[Array, " 2"],
    *,
    canvas: tuple[int, ...],
) -> Float[Array, "n 28 28"]:
    """What the mask head is to say of the boxes of one image."""
    scale = 255.0 if masks.dtype == jnp.uint8 else 1.0
    if masks.shape[1:] != canvas:
        return mask_targets_of_crops(masks, own, boxes, matched, 28) / scale
    # What lies beyond an image is, as at the end of an array, the last that is in it.
    row, column = (jnp.minimum(jnp.arange(n), size[i] - 1) for i, n in enumerate(canvas))
    return mask_targets(masks[:, row][:, :, column], boxes, matched, 28) / scale


def _flat(values: Shaped[Array, "batch n *rest"]) -> Shaped[Array, " _ *rest"]:
    return values.reshape(-1, *values.shape[2:])
