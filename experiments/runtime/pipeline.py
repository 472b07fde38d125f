"""Batches of a split, each process's own share of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments.runtime.data import Split

Batch = dict[str, np.ndarray]


class TrainingBatches:
    """Endless full batches, in an order drawn anew for every epoch."""

    def __init__(self, split: Split, size: int, seed: int, share: slice):
        self._split, self._size, self._seed, self._share = split, size, seed, share
        self._step = 0

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> Batch:
        epoch, batch = divmod(self._step, len(self._split) // self._size)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._split))
        index = order[batch * self._size : (batch + 1) * self._size][self._share]
        self._step += 1
        return {
            "image": self._split.images[index],
            "label": self._split.labels[index],
            "index": index,
        }

    def get_state(self) -> dict[str, int]:
        """Where the iteration stands."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from there."""
        self._step = state["step"]


def training_batches(
    split: Split, *, global_batch_size: int, seed: int, process_index: int, process_count: int
) -> TrainingBatches:
    """The share of this process of all training batches."""
    share = global_batch_size // process_count
    own = slice(process_index * share, (process_index + 1) * share)
    return TrainingBatches(split, global_batch_size, seed, own)


def evaluation_batches(
    split: Split, *, global_batch_size: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    """The share of this process of batches that have every sample once; padding has label -1."""
    share = global_batch_size // process_count
    for start in range(0, len(split), global_batch_size):
        index = start + process_index * share + np.arange(share)
        real = index < len(split)
        index = np.where(real, index, 0)
        yield {
            "image": split.images[index],
            "label": np.where(real, split.labels[index], -1).astype(np.int32),
            "index": index,
        }
