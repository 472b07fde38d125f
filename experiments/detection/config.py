"""What a run of detection is: its options, and the presets that they start from."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal

from experiments.detection.coco import Paths
from experiments.detection.model import DetectorConfig
from experiments.detection.samples import Preparation
from experiments.runtime.checkpoints import CheckpointConfig
from experiments.runtime.configs import check_options
from experiments.runtime.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class DetectorRecipe(Recipe):
    """How to train a detector."""

    jitter: tuple[float, float] = (1.0, 1.0)
    """Images of training are made smaller by a factor drawn between these two, of 0 to 1."""
    flip: bool = True
    """Whether every other image of training is mirrored."""
    freeze: tuple[str, ...] = ()
    """Parts of the network that are not trained, by how their parameters' names begin, such as
    backbone/stem or backbone/stage2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.jitter
        check_options(self, "train", ("jitter", 0 < low <= high <= 1, "rising, of 0 to 1"))


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is; saved with it."""

    data: str = ""
    """coco:PATH, a folder or a zip with annotations/instances_train*.json and
    instances_val*.json, and the folders of images train*/ and val*/ beside annotations."""
    train_annotations: str | None = None
    """The json of the training images, if it lies elsewhere; so too the three others."""
    train_images: str | None = None
    """The folder of the training images, or a zip of it."""
    val_annotations: str | None = None
    """The json of the held-out images."""
    val_images: str | None = None
    """The folder of the held-out images, or a zip of it."""
    empty_images: bool = False
    """Whether images without an object are trained on."""
    min_size: int = 320
    """Images are scaled until their shorter side has this many pixels ..."""
    max_size: int = 512
    """... or their longer side this many, whichever is sooner."""
    slots: int = 100
    """Objects of an image that can be learned of at a time."""
    mask_crop: int = 56
    """Pixels a side at which the loader cuts objects' masks to their boxes."""
    init: str | None = None
    """What the backbone starts from: the folder of a run of experiments.classification or of
    experiments.detection, or a safetensors file of drconv_jax.weights."""
    evaluator: Literal["pycocotools", "hotcoco"] = "pycocotools"
    """COCO's own code for its metrics, or a faster one with the same numbers (pip install
    hotcoco)."""
    model: DetectorConfig = dataclasses.field(default_factory=DetectorConfig)
    train: DetectorRecipe = dataclasses.field(default_factory=DetectorRecipe)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_options(
            self,
            "",
            ("min_size", 1 <= self.min_size <= self.max_size, "at least 1 and at most --max-size"),
            ("slots", self.slots >= 1, "at least 1"),
            ("mask_crop", self.mask_crop >= 1, "at least 1"),
        )

    @property
    def preparation(self) -> Preparation:
        """How images become samples."""
        return Preparation(
            self.min_size,
            self.max_size,
            self.slots,
            self.mask_crop if self.model.has_masks else 0,
            self.train.jitter,
            self.train.flip,
        )

    @property
    def train_paths(self) -> Paths:
        """Where the training split's parts lie, if elsewhere."""
        return _paths(self.train_annotations, self.train_images)

    @property
    def val_paths(self) -> Paths:
        """Where the held-out split's parts lie, if elsewhere."""
        return _paths(self.val_annotations, self.val_images)


def _paths(annotations: str | None, images: str | None) -> Paths:
    return Paths(*(None if path is None else pathlib.Path(path) for path in (annotations, images)))


Preset = Literal["small", "1x"]

_STEPS = DetectorRecipe(
    epochs=12,
    batch_size=16,
    learning_rate=0.02,
    reference_batch=16,
    schedule="steps",
    decay_rate=0.1,
    decay_epochs=(8.0, 11.0),
    warmup_epochs=0.0,
    warmup_steps=500,
    warmup_start=0.001,
    nesterov=False,
    weight_decay=1e-4,
    gradient_clip=35.0,
)

PRESETS: Mapping[str, Config] = {
    # A small network from random weights, on a few hundred images, on a CPU.
    "small": Config(
        model=DetectorConfig(
            features=64,
            box_features=256,
            mask_features=64,
            anchor_sizes=(16.0, 32.0, 64.0, 128.0, 256.0),
            pre_nms=(500, 500),
            post_nms=(500, 300),
            anchors_per_image=128,
            regions_per_image=128,
        ),
        train=DetectorRecipe(
            epochs=12,
            batch_size=4,
            learning_rate=0.02,
            warmup_epochs=0.5,
            nesterov=False,
            weight_decay=1e-4,
            gradient_clip=10.0,
        ),
    ),
    # COCO as the field trains on it: "1x" of Detectron, 12 epochs of 16 images.
    "1x": Config(
        min_size=800,
        max_size=1333,
        mask_crop=112,
        model=DetectorConfig("dr_maskrcnn_shufflenet_v2_x1_0_fpn", dtype="bfloat16"),
        train=_STEPS,
    ),
}
