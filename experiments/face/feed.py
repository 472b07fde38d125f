"""Batches of faces, from memory or from a disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from experiments.face.config import FaceRecipe
from experiments.runtime import images, pipeline
from experiments.runtime.data import IN_MEMORY, Hold, decoded
from experiments.runtime.errors import UserError
from experiments.runtime.pipeline import Arrays, Loading, OrderByEpoch, Share
from experiments.runtime.sources import EncodedSplit, Sample
from experiments.runtime.task import HostBatch


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Images in memory, and labels.

    Attributes:
      pixels: all of one size.
      labels: as those of the split, -1 of a held-out image.
      split: what they were read from.
      places: where in it.
    """

    pixels: UInt8[np.ndarray, "count height width 3"]
    labels: Int[np.ndarray, count]
    split: EncodedSplit
    places: Int[np.ndarray, count]

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """As the split has it."""
        return self.split.name_of(int(self.places[index]))


@dataclasses.dataclass(frozen=True)
class FaceImages:
    """The `Feed`; see `Recognition` for the arrays.

    Attributes:
      train, test: the images of training and the held-out ones.
      labels: those of training.
      share: of each batch.
      image_size: height and width.
      recipe: how to train.
      loading: how images come from a disk.
    """

    train: Decoded | EncodedSplit
    test: Decoded | EncodedSplit
    labels: Int[np.ndarray, count]
    share: Share
    image_size: tuple[int, int]
    recipe: FaceRecipe
    loading: Loading

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training split.

        Raises:
          UserError: there is none.
        """
        steps = len(self._order(0)) // self.share.batch_size
        if not steps:
            raise UserError(
                f"--train.batch-size {self.share.batch_size} is more than the "
                f"{len(self._order(0))} training images of an epoch; choose a smaller one."
            )
        return steps

    def training(self, step: int) -> Iterator[HostBatch]:
        """Endless full batches from a step on, in an order drawn anew for every epoch."""
        if isinstance(self.train, Decoded):
            arrays = {"image": self.train.pixels, "label": self.train.labels}
            return pipeline.training_arrays(arrays, self._order, step, self.share)
        samples = _Faces(self.train, self.image_size)
        order = OrderByEpoch(len(self._order(0)), self._order).seed(self.recipe.seed)
        return pipeline.training(samples, order, self.recipe.seed, step, self.share, self.loading)

    def evaluation(self) -> Iterator[HostBatch]:
        """Batches that have every held-out image once, in order, and padding behind the last."""
        places, real = pipeline.padded(len(self.test), self.share.batch_size)
        if isinstance(self.test, Decoded):
            arrays = {"image": self.test.pixels}
            return pipeline.evaluation_arrays(arrays, places, real, self.share)
        samples = _HeldOut(self.test, self.image_size)
        return pipeline.evaluation(samples, places, real, self.share, self.loading)

    @functools.cached_property
    def _order(self) -> Callable[[int], Int[np.ndarray, count]]:
        if self.recipe.images_per_person == 0:
            return functools.partial(_shuffled, self.labels, self.recipe.seed)
        return functools.partial(
            _by_person,
            self.labels,
            self.recipe.seed,
            self.recipe.batch_size,
            self.recipe.images_per_person,
        )


def in_memory(
    split: EncodedSplit, size: tuple[int, int], hold: Hold, title: str, skipped: list[str]
) -> Decoded | EncodedSplit:
    """A split as it is held while it is used.

    Args:
      split: the images.
      size: their height and width.
      hold: see `Config`.
      title: of the progress bar.
      skipped: gets the images that cannot be read, as "path: reason".

    Raises:
      UserError: none of the images, or not even half of sixteen or more, can be read.
    """
    if hold == "disk" or (hold == "auto" and len(split) * 3 * size[0] * size[1] > IN_MEMORY):
        return split
    labels = np.full(len(split), -1, np.int32)

    def seen(index: int, sample: Sample) -> None:
        labels[index] = sample.label

    pixels, broken = decoded(split, size, title, seen)
    skipped += [f"{split.name_of(index)}: {why}" for index, why in broken.items()]
    good = np.setdiff1d(np.arange(len(split)), list(broken))
    if len(broken) and (not len(good) or (len(split) >= 16 and 2 * len(good) < len(split))):
        raise UserError(
            f"--data: {len(broken)} of {len(split)} images cannot be read; the first is "
            f"{skipped[-len(broken)]}."
        )
    if not broken:
        return Decoded(pixels, labels, split, good)
    return Decoded(pixels[good], labels[good], split, good)


def _shuffled(labels: Int[np.ndarray, count], seed: int, epoch: int) -> Int[np.ndarray, count]:
    """All images, in a random order."""
    return np.random.default_rng((seed, epoch)).permutation(len(labels))


def _by_person(
    labels: Int[np.ndarray, count], seed: int, batch_size: int, per_person: int, epoch: int
) -> Int[np.ndarray, drawn]:
    """As many images as there are, in batches of so many of every person who is drawn.

    People are drawn one after another until all have been, and so on; so are each one's images.
    """
    generator = np.random.default_rng((seed, epoch))
    by_person = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_person], np.arange(labels.max() + 2))
    people = np.flatnonzero(np.diff(starts))
    turns = max(len(labels) // batch_size, 1) * batch_size // per_person
    drawn = np.concatenate([generator.permutation(people) for _ in range(-(-turns // len(people)))])
    images = [
        by_person[starts[p] : starts[p + 1]][
            np.resize(generator.permutation(starts[p + 1] - starts[p]), per_person)
        ]
        for p in drawn[:turns]
    ]
    return np.concatenate(images)


@dataclasses.dataclass(frozen=True)
class _Faces:
    """Training images on a disk (`pipeline.TrainingSamples`)."""

    split: EncodedSplit
    size: tuple[int, int]

    def name_of(self, index: int) -> str:
        return self.split.name_of(index)

    def read(self, index: int, generator: np.random.Generator) -> Arrays:
        del generator
        content, label = self.split[index]
        return {"image": images.squashed(content, self.size), "label": np.int32(label)}

    def stand_ins(self, index: int) -> Sequence[int]:
        return range(len(self.split))


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Held-out images on a disk (`pipeline.HeldOutSamples`)."""

    split: EncodedSplit
    size: tuple[int, int]

    def name_of(self, index: int) -> str:
        return self.split.name_of(index)

    def read(self, index: int) -> Arrays:
        return {"image": images.squashed(self.split[index].content, self.size)}

    def blank(self, index: int) -> Arrays:
        return {"image": np.zeros((*self.size, 3), np.uint8)}
