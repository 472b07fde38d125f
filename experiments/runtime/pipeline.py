"""Batches of a split, each process's own share of them: a function of the seed and the step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from experiments.runtime import images, preemption
from experiments.runtime.errors import UserError
from experiments.runtime.images import Pixels
from experiments.runtime.recipes import Augment
from experiments.runtime.sources import ArraySplit, EncodedSplit, Split

Batch = dict[str, np.ndarray]
"""Images "image" (share, size, size, 3), labels "label" (share,), which are -1 for broken images
and padding, and "index" (share,), the samples' places in the split, which are -1 for padding."""


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

        No sample is twice in an epoch, and a batch has the same ones for any number of processes.
        """
        if isinstance(split, ArraySplit):
            return self._training_arrays(split, step)
        return self._training_encoded(split, step)

    def evaluation(self, split: Split) -> Iterator[Batch]:
        """Batches that have every sample once, and padding behind the last."""
        count = -(-len(split) // self.global_batch_size) * self.global_batch_size
        index = np.arange(count).reshape(-1, self.process_count, self.share)[:, self.process_index]
        if isinstance(split, ArraySplit):
            return self._evaluation_arrays(split, index)
        decode = images.centre_crop if self.augment == "resized-crop" else images.squashed
        read = functools.partial(_read, split, decode, self.image_size)
        dataset = grain.MapDataset.source(index.ravel()).map(read)
        return self._iterate(dataset)

    def _training_arrays(self, split: ArraySplit, step: int) -> Iterator[Batch]:
        steps, start = len(split) // self.global_batch_size, self.process_index * self.share
        for epoch in itertools.count(step // steps):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(split))
            for batch in range(step % steps, steps):
                at = batch * self.global_batch_size + start
                index = order[at : at + self.share]
                yield {"image": split.images[index], "label": split.labels[index], "index": index}
            step = 0

    def _evaluation_arrays(self, split: ArraySplit, indices: np.ndarray) -> Iterator[Batch]:
        for index in indices:
            real = index < len(split)
            index = np.where(real, index, -1)
            labels = np.where(real, split.labels[index], -1).astype(np.int32)
            yield {"image": split.images[index], "label": labels, "index": index}

    def _training_encoded(self, split: EncodedSplit, step: int) -> Iterator[Batch]:
        steps = len(split) // self.global_batch_size
        dataset = grain.MapDataset.range(len(split)).seed(self.seed).shuffle()
        if self.augment == "resized-crop":
            dataset = dataset.random_map(functools.partial(_crop, split, self))
        else:
            dataset = dataset.map(functools.partial(_read, split, images.squashed, self.image_size))
        dataset = dataset[: steps * self.global_batch_size].repeat()
        # The processes' shares of a batch are the batch; they are interleaved in it.
        dataset = dataset[self.process_index :: self.process_count]
        return self._iterate(dataset[step * self.share :])

    def _iterate(self, dataset: grain.MapDataset[Any]) -> Iterator[Batch]:
        loading = self.loading
        batches = dataset.batch(self.share).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            if loading.workers
            else grain.ReadOptions(loading.threads, loading.threads)
        )
        if loading.workers:
            flags.FLAGS.mark_as_parsed()  # grain asks for its own, which have their defaults
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(loading.workers), preemption.end_with_parent
            )
            return _with_workers(iter(batches))
        return iter(batches)


def _with_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; with the first of them, their worker processes are started."""
    with preemption.workers_unreached():
        first = next(batches)
    yield first
    yield from batches


def broken(batch: Batch) -> list[int]:
    """The samples of a batch whose images could not be read."""
    return batch["index"][(batch["label"] < 0) & (batch["index"] >= 0)].tolist()


def _read(
    split: EncodedSplit, decode: Callable[[bytes, int], Pixels], size: int, index: int
) -> dict[str, Any]:
    return _element(split, size, index, lambda content: decode(content, size))


def _crop(
    split: EncodedSplit, pipeline: Pipeline, index: int, generator: np.random.Generator
) -> dict[str, Any]:
    size = pipeline.image_size
    return _element(
        split,
        size,
        index,
        lambda content: images.random_resized_crop(content, size, generator, flip=pipeline.flips),
    )


def _element(
    split: EncodedSplit, size: int, index: int, decode: Callable[[bytes], Pixels]
) -> dict[str, Any]:
    """A sample of a batch; a broken image is black and has label -1."""
    label, pixels = -1, np.zeros((size, size, 3), np.uint8)
    real = index < len(split)
    if real:
        try:
            sample = split[index]
            pixels = decode(sample.content)
            label = sample.label
        except Exception:  # of any kind: one broken image never stops a run
            pass
    return {
        "image": pixels,
        "label": np.int32(label),
        "index": np.int64(index if real else -1),
    }
