"""Batches of labelled images, from memory or from a disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from experiments.classification.config import Augment
from experiments.runtime import images, pipeline
from experiments.runtime.errors import UserError
from experiments.runtime.pipeline import Arrays, Loading, Share
from experiments.runtime.sources import ArraySplit, EncodedSplit, Split
from experiments.runtime.task import HostBatch


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """A classifier's `Feed`; see `Classification` for the arrays.

    In training all labels are real. In evaluation, padding and images that cannot be read have
    label -1.

    Attributes:
      train, test: the splits.
      share: of each batch.
      image_size: pixels a side.
      augment: how images are augmented; the host's part of it is "resized-crop".
      flips: whether an image's mirror image is as good as the image.
      seed: of order and augmentation.
      loading: how images come from a disk.
    """

    train: Split
    test: Split
    share: Share
    image_size: int
    augment: Augment
    flips: bool
    seed: int
    loading: Loading

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training split.

        Raises:
          UserError: there is none.
        """
        count = len(self.train)
        if self.share.batch_size > count:
            raise UserError(
                f"--train.batch-size must be at most the {count} training images, got "
                f"{self.share.batch_size}."
            )
        return count // self.share.batch_size

    def training(self, step: int) -> Iterator[HostBatch]:
        """Endless full batches from a step on, in an order drawn anew for every epoch."""
        if isinstance(self.train, ArraySplit):
            return pipeline.training_arrays(_arrays(self.train), self._order, step, self.share)
        samples = _Augmented(self.train, self.image_size, self.augment, self.flips)
        order = grain.MapDataset.range(len(self.train)).seed(self.seed).shuffle()
        return pipeline.training(samples, order, self.seed, step, self.share, self.loading)

    def evaluation(self) -> Iterator[HostBatch]:
        """Batches that have every image once, in order, and padding behind the last."""
        places, real = pipeline.padded(len(self.test), self.share.batch_size)
        if isinstance(self.test, ArraySplit):
            batches = pipeline.evaluation_arrays(_arrays(self.test), places, real, self.share)
            return map(_without_labels_of_padding, batches)
        samples = _HeldOut(self.test, self.image_size, self.augment)
        return pipeline.evaluation(samples, places, real, self.share, self.loading)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.train))


def _arrays(split: ArraySplit) -> dict[str, np.ndarray]:
    return {"image": split.images, "label": split.labels}


def _without_labels_of_padding(batch: HostBatch) -> HostBatch:
    labels = np.where(batch.index >= 0, batch.arrays["label"], -1).astype(np.int32)
    return dataclasses.replace(batch, arrays={**batch.arrays, "label": labels})


@dataclasses.dataclass(frozen=True)
class _Augmented:
    """Training images on a disk (`pipeline.TrainingSamples`)."""

    split: EncodedSplit
    size: int
    augment: Augment
    flips: bool

    def name_of(self, index: int) -> str:
        return self.split.name_of(index)

    def read(self, index: int, generator: np.random.Generator) -> Arrays:
        content, label = self.split[index]
        if self.augment == "resized-crop":
            pixels = images.random_resized_crop(content, self.size, generator, flip=self.flips)
        else:
            pixels = images.squashed(content, self.size)
        return {"image": pixels, "label": np.int32(label)}

    def stand_ins(self, index: int) -> Sequence[int]:
        return range(len(self.split))


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Held-out images on a disk (`pipeline.HeldOutSamples`)."""

    split: EncodedSplit
    size: int
    augment: Augment

    def name_of(self, index: int) -> str:
        return self.split.name_of(index)

    def read(self, index: int) -> Arrays:
        content, label = self.split[index]
        return {"image": held_out_image(content, self.size, self.augment), "label": np.int32(label)}

    def blank(self, index: int) -> Arrays:
        return {"image": np.zeros((self.size, self.size, 3), np.uint8), "label": np.int32(-1)}


def held_out_image(content: bytes, size: int, augment: Augment) -> images.Pixels:
    """An encoded image as evaluation sees it."""
    decode = images.centre_crop if augment == "resized-crop" else images.squashed
    return decode(content, size)
