"""Batches of a COCO data set for training and evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from experiments.detection.canvases import Canvases, Group
from experiments.detection.coco import CocoSplit
from experiments.detection.samples import Canvas, Preparation
from experiments.runtime import pipeline
from experiments.runtime.errors import UserError
from experiments.runtime.pipeline import Arrays, Loading, Share
from experiments.runtime.task import HostBatch


@dataclasses.dataclass(frozen=True)
class CocoImages:
    """A detector's `Feed`; for the arrays, see `Preparation`.

    Attributes:
      train, test: the splits.
      share: of each batch.
      preparation: how images become samples.
      seed: of order and augmentation.
      loading: how images come from a disk.
    """

    train: CocoSplit
    test: CocoSplit
    share: Share
    preparation: Preparation
    seed: int
    loading: Loading

    def __post_init__(self) -> None:
        if self.preparation.mask_size and not self.train.annotations.has_masks:
            raise ValueError("mask_size must be 0 for annotations that were read without masks")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training split.

        Raises:
          UserError: there is none.
        """
        if self.share.batch_size > len(self.train):
            raise UserError(
                f"--train.batch-size must be at most the {len(self.train)} training images, got "
                f"{self.share.batch_size}."
            )
        return self.canvases.steps(self.share.batch_size)

    @functools.cached_property
    def canvases(self) -> Canvases:
        """Those of the training split."""
        return _canvases(self.train, self.preparation)

    @functools.cached_property
    def test_canvases(self) -> Canvases:
        """Those of the held-out split."""
        return _canvases(self.test, self.preparation)

    def training(self, step: int) -> Iterator[HostBatch]:
        """Endless full batches from a step on, each on one canvas, drawn anew for every epoch."""
        placed = _Placed(len(self.train), self.canvases.shapes)
        order = pipeline.OrderByEpoch(
            self.steps_per_epoch * self.share.batch_size,
            functools.partial(_order, placed, self.canvases, self.share.batch_size, self.seed),
        ).seed(self.seed)
        samples = _Augmented(self.train, self.preparation, placed)
        batches = pipeline.training(samples, order, self.seed, step, self.share, self.loading)
        return map(placed.of_images, batches)

    def evaluation(self) -> Iterator[HostBatch]:
        """Batches that have every image once, each on one canvas, and padding."""
        placed = _Placed(len(self.test), self.test_canvases.shapes)
        groups = self.test_canvases.evaluation(self.share.batch_size)
        real = np.stack([group.images >= 0 for group in groups])
        # What is no image has the shapes of the first of its batch, which is one.
        numbers = np.stack([placed.numbers(group) for group in groups])
        numbers = np.where(real, numbers, numbers[:, :1])
        samples = _HeldOut(self.test, self.preparation, placed)
        batches = pipeline.evaluation(samples, numbers, real, self.share, self.loading)
        return map(placed.of_images, batches)


@dataclasses.dataclass(frozen=True)
class _Placed:
    """Numbers of samples, each of which tells an image and the canvas that it is to lie on.

    Attributes:
      images: how many there are.
      canvases: the canvases.
    """

    images: int
    canvases: tuple[Canvas, ...]

    def numbers(self, group: Group) -> Int64[np.ndarray, batch]:
        """Of the images of a batch."""
        return self.canvases.index(group.canvas) * self.images + group.images

    def parts(self, number: int) -> tuple[Canvas, int]:
        """The canvas and the image."""
        place, image = divmod(number, self.images)
        return self.canvases[place], image

    def on_same_canvas(self, number: int) -> range:
        """The numbers of all images on the canvas of one."""
        first = number // self.images * self.images
        return range(first, first + self.images)

    def of_images(self, batch: HostBatch) -> HostBatch:
        """A batch whose samples are named by their images."""
        index = np.where(batch.index < 0, -1, batch.index % self.images)
        broken = {number % self.images: why for number, why in batch.broken.items()}
        return HostBatch(batch.arrays, index, broken)


@dataclasses.dataclass(frozen=True)
class _Augmented:
    """Training images (`pipeline.TrainingSamples`)."""

    split: CocoSplit
    preparation: Preparation
    placed: _Placed

    def name_of(self, index: int) -> str:
        return self.split.name_of(self.placed.parts(index)[1])

    def read(self, index: int, generator: np.random.Generator) -> Arrays:
        canvas, image = self.placed.parts(index)
        annotations = self.split.annotations
        return self.preparation.training(
            self.split.content(image),
            int(annotations.heights[image]),
            int(annotations.widths[image]),
            annotations.objects(image),
            canvas,
            generator,
        )

    def stand_ins(self, index: int) -> Sequence[int]:
        return self.placed.on_same_canvas(index)


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Images to evaluate (`pipeline.HeldOutSamples`)."""

    split: CocoSplit
    preparation: Preparation
    placed: _Placed

    def name_of(self, index: int) -> str:
        return self.split.name_of(self.placed.parts(index)[1])

    def read(self, index: int) -> Arrays:
        canvas, image = self.placed.parts(index)
        annotations = self.split.annotations
        return self.preparation.evaluation(
            self.split.content(image),
            int(annotations.heights[image]),
            int(annotations.widths[image]),
            canvas,
        )

    def blank(self, index: int) -> Arrays:
        return self.preparation.blank(self.placed.parts(index)[0])


def _canvases(split: CocoSplit, preparation: Preparation) -> Canvases:
    annotations = split.annotations
    return Canvases.of(
        annotations.heights, annotations.widths, preparation.min_size, preparation.max_size
    )


def _order(
    placed: _Placed, canvases: Canvases, batch_size: int, seed: int, epoch: int
) -> Int64[np.ndarray, samples]:
    """The samples of an epoch, batch after batch."""
    groups = canvases.epoch(batch_size, seed, epoch)
    return np.concatenate([placed.numbers(group) for group in groups])
