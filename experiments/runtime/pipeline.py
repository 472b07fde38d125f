"""Batches of a split, each process's own share of them: a function of the seed and the step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from absl import flags

from experiments.runtime import images, preemption
from experiments.runtime.errors import DataLost, UserError, reason
from experiments.runtime.images import Pixels
from experiments.runtime.recipes import Augment
from experiments.runtime.sources import ArraySplit, EncodedSplit, Split

# Samples of a split that are tried in the place of one that cannot be read.
_TRIED = 32
# Images, of one batch or of several, of which half must be readable.
_WATCHED = 16


class Batch(TypedDict):
    """A process's share of a batch.

    Images are uint8 of shape (share, size, size, 3). Of training, all are real images, and "index"
    has the places in the split of those that were read. Of evaluation, what does not count has
    label -1: an image that cannot be read, whose index is its place, and padding, with index -1.
    """

    image: np.ndarray
    label: np.ndarray
    index: np.ndarray
    broken: dict[int, str]
    """Samples that could not be read, and why."""


@dataclasses.dataclass(frozen=True)
class Loading:
    """How images come from a disk; no part of what is trained."""

    workers: int = 0
    """Processes that read and decode images, besides this one's threads; 0 for none."""
    threads: int = 4
    """Threads of each that do so."""

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What all batches of a run have in common.

    Attributes:
      global_batch_size: samples in a batch of all processes.
      process_index, process_count: which share of them is this process's.
      image_size: pixels a side.
      augment: how images are augmented; the host's part of it is "resized-crop".
      flips: whether an image's mirror image is as good as the image.
      seed: of order and augmentation.
      loading: how images come from a disk.
    """

    global_batch_size: int
    process_index: int
    process_count: int
    image_size: int
    augment: Augment
    flips: bool
    seed: int
    loading: Loading = Loading()

    @property
    def share(self) -> int:
        """Samples in a batch of this process."""
        return self.global_batch_size // self.process_count

    def training(self, split: Split, step: int) -> Iterator[Batch]:
        """Endless full batches from a step on, in an order drawn anew for every epoch.

        No sample is twice in an epoch, but where one cannot be read: in its place is another, drawn
        by the seed and the sample, that can be. A batch has the same samples for any number of
        processes.

        Raises:
          DataLost: the data cannot be read any more, or not most of it; see `_while_readable`.
        """
        if isinstance(split, ArraySplit):
            return self._training_arrays(split, step)
        return self._training_encoded(split, step)

    def evaluation(self, split: Split) -> Iterator[Batch]:
        """Batches that have every sample once, and padding behind the last.

        Raises:
          DataLost: the data cannot be read any more, or not most of it; see `_while_readable`.
        """
        count = -(-len(split) // self.global_batch_size) * self.global_batch_size
        index = np.arange(count).reshape(-1, self.process_count, self.share)[:, self.process_index]
        if isinstance(split, ArraySplit):
            return self._evaluation_arrays(split, index)
        dataset = grain.MapDataset.source(index.ravel())
        return self._iterate(split, dataset.map(functools.partial(_held_out, split, self)))

    def _training_arrays(self, split: ArraySplit, step: int) -> Iterator[Batch]:
        steps, start = len(split) // self.global_batch_size, self.process_index * self.share
        for epoch in itertools.count(step // steps):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(split))
            for batch in range(step % steps, steps):
                at = batch * self.global_batch_size + start
                index = order[at : at + self.share]
                yield Batch(
                    image=split.images[index], label=split.labels[index], index=index, broken={}
                )
            step = 0

    def _evaluation_arrays(self, split: ArraySplit, indices: np.ndarray) -> Iterator[Batch]:
        for index in indices:
            real = index < len(split)
            index = np.where(real, index, -1)
            labels = np.where(real, split.labels[index], -1).astype(np.int32)
            yield Batch(image=split.images[index], label=labels, index=index, broken={})

    def _training_encoded(self, split: EncodedSplit, step: int) -> Iterator[Batch]:
        steps = len(split) // self.global_batch_size
        dataset = grain.MapDataset.range(len(split)).seed(self.seed).shuffle()
        dataset = dataset.random_map(functools.partial(_drawn, split, self))
        dataset = dataset[: steps * self.global_batch_size].repeat()
        # The processes' shares of a batch are the batch; they are interleaved in it.
        dataset = dataset[self.process_index :: self.process_count]
        return self._iterate(split, dataset[step * self.share :])

    def _iterate(self, split: EncodedSplit, dataset: grain.MapDataset[Any]) -> Iterator[Batch]:
        """Batches of a data set of `_Element`s; the processes that read them end with it."""
        loading = self.loading
        batches = dataset.batch(self.share, batch_fn=_stacked).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            if loading.workers
            else grain.ReadOptions(loading.threads, loading.threads)
        )
        if loading.workers:
            flags.FLAGS.mark_as_parsed()  # grain asks for its own, which have their defaults
            # Workers send arrays through pipes: shared memory would outlive a run that is killed.
            options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            batches = grain.experimental.WithOptionsIterDataset(batches, options)
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(loading.workers), preemption.end_with_parent
            )
        iterator = iter(batches)
        try:
            started = _started_apart(iterator) if loading.workers else iterator
            yield from _while_readable(split, started)
        except RuntimeError as error:  # grain's; what is raised in reading is caught there
            if not loading.workers:
                raise
            raise DataLost(f"a process that reads images has ended: {reason(error)}") from None
        finally:
            iterator.close()


def _started_apart(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; with the first of them, their worker processes are started."""
    with preemption.workers_unreached():
        first = next(batches)
    yield first
    yield from batches


def _while_readable(split: EncodedSplit, batches: Iterable[dict[str, Any]]) -> Iterator[Batch]:
    """Batches of `_stacked`, without what they tell for this function.

    Raises:
      DataLost: the data is lost, or of `_WATCHED` images or more in a row, more than half cannot be
        read; so too of fewer, if four or more are the last ones.
    """
    good = 0
    bad: dict[int, str] = {}

    def check() -> None:
        if len(bad) > good:
            index, why = next(iter(bad.items()))
            raise DataLost(
                f"{len(bad)} of {len(bad) + good} images in a row cannot be read, as "
                f"{split.name_of(index)}: {why}"
            )

    for batch in batches:
        if batch["lost"]:
            raise DataLost(batch["lost"])
        good += int((batch["label"] >= 0).sum())
        bad |= batch["broken"]
        if good + len(bad) >= _WATCHED:
            check()
            good, bad = 0, {}
        yield Batch(
            image=batch["image"],
            label=batch["label"],
            index=batch["index"],
            broken=batch["broken"],
        )
    if len(bad) >= 4:
        check()


@dataclasses.dataclass(frozen=True)
class _Element:
    """One place in a batch.

    Attributes:
      image, label, index: see `Batch`.
      broken: the samples that were tried for it and cannot be read, and why.
      lost: why the data cannot be read any more, if it cannot.
    """

    image: Pixels
    label: int
    index: int
    broken: dict[int, str]
    lost: str | None = None


def _drawn(
    split: EncodedSplit, pipeline: Pipeline, index: int, generator: np.random.Generator
) -> _Element:
    """A sample of the training split, or one in its place, augmented."""
    size = pipeline.image_size

    def decode(content: bytes) -> Pixels:
        if pipeline.augment == "resized-crop":
            return images.random_resized_crop(content, size, generator, flip=pipeline.flips)
        return images.squashed(content, size)

    def candidates() -> Iterator[int]:
        yield index
        others = np.random.default_rng((pipeline.seed, index))
        yield from others.integers(len(split), size=_TRIED).tolist()

    element = _first_readable(split, candidates(), decode, size)
    if element.label < 0 and element.lost is None:
        broken, why = next(iter(element.broken.items()))
        lost = f"none of {_TRIED} images drawn can be read, as {split.name_of(broken)}: {why}"
        return dataclasses.replace(element, lost=lost)
    return element


def _held_out(split: EncodedSplit, pipeline: Pipeline, index: int) -> _Element:
    """A sample of the held-out split, or padding."""
    size = pipeline.image_size
    decode = images.centre_crop if pipeline.augment == "resized-crop" else images.squashed
    real = [index] if index < len(split) else []
    element = _first_readable(split, real, lambda content: decode(content, size), size)
    return dataclasses.replace(element, index=index if real else -1)


def _first_readable(
    split: EncodedSplit, candidates: Iterable[int], decode: Callable[[bytes], Pixels], size: int
) -> _Element:
    """The first of some samples that can be read, or a black image where there is none."""
    broken: dict[int, str] = {}
    lost = None
    for index in candidates:
        try:
            sample = split[index]
            return _Element(decode(sample.content), sample.label, index, broken)
        except DataLost as error:
            lost = str(error)
            break
        except Exception as error:  # of any kind: one broken image never stops a run
            broken[index] = reason(error)
    return _Element(np.zeros((size, size, 3), np.uint8), -1, -1, broken, lost)


def _stacked(elements: Sequence[_Element]) -> dict[str, Any]:
    """A `Batch`, and why the data is "lost", or None."""
    return {
        "image": np.stack([element.image for element in elements]),
        "label": np.array([element.label for element in elements], np.int32),
        "index": np.array([element.index for element in elements], np.int64),
        "broken": {index: why for element in elements for index, why in element.broken.items()},
        "lost": next((element.lost for element in elements if element.lost), None),
    }
