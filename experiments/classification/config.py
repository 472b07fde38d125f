"""What a run of classification is: its options, and the presets that they start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from experiments.classification.model import ModelConfig
from experiments.runtime.checkpoints import CheckpointConfig
from experiments.runtime.configs import check_options
from experiments.runtime.data import Hold
from experiments.runtime.recipes import Recipe

Augment = Literal["none", "crop", "resized-crop"]


@dataclasses.dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """How to train a classifier."""

    label_smoothing: float = 0.1
    """Of the training loss."""
    augment: Augment = "crop"
    """For small images, pad and crop at random; for large ones, which stay on disk, cut out a
    random part and resize it, and evaluate on the middle. Mirroring is the next option."""
    mirror: Literal["auto", "yes", "no"] = "auto"
    """Whether augmented images are mirrored at random; "auto" is no for digits, idx files and
    classes that are all named by single characters or words as "zero", and yes for all else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            "train",
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and less than 1"),
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is; saved with it."""

    data: str = "digits"
    """"digits" (embedded); folder:PATH, a tree train/CLASS/x.jpg and test|val/CLASS/x.jpg or a zip
    of one; arrayrecord:PATH, what experiments.convert makes of that; hf:NAME_OR_PATH, a data set of
    Hugging Face's datasets; idx:PATH, a folder of MNIST's or Fashion-MNIST's four files."""
    image_size: int = 32
    """Images are resized to this many pixels a side."""
    hold: Hold = "auto"
    """Where images are kept: in memory, resized, or on disk, and read in every epoch; default: in
    memory, if that takes 4 GiB at most and --train.augment is not resized-crop."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: ClassifierRecipe = dataclasses.field(default_factory=ClassifierRecipe)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


Preset = Literal["small", "imagenet", "mobilenet"]

PRESETS: Mapping[str, Config] = {
    # Digits and other small images, in minutes.
    "small": Config(),
    # ShuffleNetV2 (Ma et al., ECCV 2018, Section 4) on ImageNet.
    "imagenet": Config(
        image_size=224,
        model=ModelConfig("dr_shufflenet_v2_x0_5"),
        train=ClassifierRecipe(
            epochs=240,
            batch_size=1024,
            learning_rate=0.5,
            schedule="linear",
            augment="resized-crop",
            warmup_epochs=0.0,
            nesterov=False,
        ),
    ),
    # MobileNetV2 on ImageNet as torchvision trains it (references/classification, 8 x 32 images).
    "mobilenet": Config(
        image_size=224,
        model=ModelConfig("dr_mobilenet_v2_x1_0"),
        train=ClassifierRecipe(
            epochs=300,
            batch_size=256,
            learning_rate=0.045,
            schedule="exponential",
            warmup_epochs=0.0,
            nesterov=False,
            label_smoothing=0.0,
            augment="resized-crop",
        ),
    ),
}
