"""What a run of face recognition is: its options, and the presets that they start from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from drconv_jax.margin_softmax import Margin, arcface, combined, cosface
from experiments.face.model import EmbedderConfig
from experiments.runtime.checkpoints import CheckpointConfig
from experiments.runtime.configs import check_options
from experiments.runtime.data import Hold
from experiments.runtime.errors import UserError
from experiments.runtime.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class MarginConfig:
    """The margin softmax."""

    kind: Literal["cosface", "arcface", "combined"] = "cosface"
    """cosface (AM-softmax) takes --margin.size from the cosine of the true class, arcface adds it
    to the angle, combined does both, with --margin.angle for the angle."""
    size: float = 0.35
    """The margin; 0.35 is usual of a cosine, 0.5 of an angle."""
    angle: float = 0.3
    """The margin of the angle, of "combined"."""
    scale: float = 64.0
    """What cosines are multiplied by; small sets want less."""
    grow_epochs: float = 0.0
    """Epochs in which the margin grows from 0, which training from random weights may need."""
    sample: float = 1.0
    """Share of the class centres that a step uses, those of its own classes and others drawn at
    random (Partial FC); 1 is exact."""

    def __post_init__(self) -> None:
        check_options(
            self,
            "margin",
            ("size", 0 <= self.size < math.pi, "at least 0 and less than pi"),
            ("angle", 0 <= self.angle < math.pi, "at least 0 and less than pi"),
            ("scale", 0 < self.scale < math.inf, "positive and finite"),
            ("grow_epochs", 0 <= self.grow_epochs < math.inf, "at least 0 and finite"),
            ("sample", 0 < self.sample <= 1, "positive and at most 1"),
        )

    def build(self) -> Margin:
        """The margin."""
        if self.kind == "combined":
            return combined(self.scale, m2=self.angle, m3=self.size)
        return (arcface if self.kind == "arcface" else cosface)(self.scale, self.size)


@dataclasses.dataclass(frozen=True)
class FaceRecipe(Recipe):
    """How to train on faces."""

    flip: bool = True
    """Whether every other image of training is mirrored, and embeddings are those of an image and
    its mirror image together."""
    images_per_person: int = 0
    """Images of each person in a batch, drawn so that all people count alike; 0 draws images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        per_person = self.images_per_person
        check_options(
            self,
            "train",
            (
                "images_per_person",
                per_person >= 0 and (not per_person or self.batch_size % per_person == 0),
                f"0 or a number that --train.batch-size {self.batch_size} can be divided by",
            ),
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is; saved with it."""

    data: str = ""
    """folder:PATH, a tree PERSON/x.jpg or a zip of one; recordio:PATH, a folder with InsightFace's
    train.rec and train.idx; hf:NAME_OR_PATH, the split "train" of a data set of Hugging Face's
    datasets; lfw, which scikit-learn downloads."""
    pairs: str | None = None
    """Pairs to tell apart: a list as LFW's pairs.txt, or a .bin of InsightFace, which has its own
    images. Default: the pairs.txt in --data."""
    pairs_data: str | None = None
    """What the images of such a list are in, as --data; default: --data itself, where nobody who is
    in a pair is trained on."""
    fold: int | None = None
    """Of the folds of the pairs, from 0, the one to be judged on: trained on are the people in the
    others, as LFW's protocol "unrestricted, labelled outside data: none" has it."""
    set_apart: int = 1
    """With --fold, how many of the other folds are not trained on either, but choose the threshold;
    with 0 the pairs of people who were trained on choose it."""
    min_images: int = 2
    """People with fewer images are not trained on."""
    image_size: tuple[int, int] = (112, 112)
    """Height and width that images are resized to."""
    hold: Hold = "auto"
    """Where images are kept: in memory, or on disk and read in every epoch; default: in memory, if
    that takes 4 GiB at most."""
    model: EmbedderConfig = dataclasses.field(default_factory=EmbedderConfig)
    margin: MarginConfig = dataclasses.field(default_factory=MarginConfig)
    train: FaceRecipe = dataclasses.field(default_factory=FaceRecipe)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_options(
            self,
            "",
            ("set_apart", self.set_apart >= 0, "at least 0"),
            ("min_images", self.min_images >= 1, "at least 1"),
            ("image_size", min(self.image_size) >= 16, "at least 16 each"),
        )
        if self.fold is not None and self.pairs_data is not None:
            raise UserError("--fold is for pairs of images in --data; leave out --pairs-data.")


Preset = Literal["lfw", "paper", "insightface"]

PRESETS: Mapping[str, Config] = {
    # A narrow network on the 1,500 people of LFW who have two images or more, on a CPU.
    "lfw": Config(
        model=EmbedderConfig(width=0.5, blocks=(1, 2, 3, 1)),
        margin=MarginConfig(scale=24.0, size=0.2, grow_epochs=3.0),
        train=FaceRecipe(
            epochs=12,
            batch_size=64,
            learning_rate=0.1,
            warmup_epochs=1.0,
            weight_decay=5e-4,
            gradient_clip=5.0,
        ),
    ),
    # MobileFaceNet (Chen et al., CCBR 2018, Section 4) with the AM-softmax of the DRConv paper.
    "paper": Config(
        image_size=(112, 112),
        train=FaceRecipe(
            epochs=16,
            batch_size=512,
            learning_rate=0.1,
            schedule="steps",
            decay_rate=0.1,
            decay_epochs=(8.0, 12.0, 14.0),
            warmup_epochs=0.0,
            nesterov=False,
            weight_decay=5e-4,
        ),
    ),
    # arcface_torch of InsightFace, configs/ms1mv3_mbf.
    "insightface": Config(
        model=EmbedderConfig("dr_mobilefacenet_all", embedding_size=512, dtype="bfloat16"),
        margin=MarginConfig("arcface", size=0.5),
        train=FaceRecipe(
            epochs=40,
            batch_size=512,
            learning_rate=0.1,
            schedule="polynomial",
            warmup_epochs=0.0,
            nesterov=False,
            weight_decay=1e-4,
            gradient_clip=5.0,
        ),
    ),
}
