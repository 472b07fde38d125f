"""Reading samples of any kind into batches: a function of the seed and the step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Int

from experiments.runtime import preemption
from experiments.runtime.errors import DataLost, UserError, reason
from experiments.runtime.task import HostBatch, Named

# Samples of a split that are tried in the place of one that cannot be read.
_TRIED = 32
# Images, of one batch or of several, of which half must be readable.
_WATCHED = 16

Arrays = dict[str, np.ndarray | np.generic]
"""What is read of a sample."""


class TrainingSamples(Named, Protocol):
    """What training reads, in any order, from any thread, and pickled for worker processes."""

    def read(self, index: int, generator: np.random.Generator) -> Arrays:
        """A sample's arrays.

        Args:
          index: which sample.
          generator: for augmentation, a function of the seed, the sample and the epoch.

        Raises:
          DataLost: it is not only this one that cannot be read.
          Exception: this one cannot be read.
        """

    def stand_ins(self, index: int) -> Sequence[int]:
        """Samples whose arrays have the shapes of this one's: one may have to take its place."""


class HeldOutSamples(Named, Protocol):
    """What evaluation reads, likewise."""

    def read(self, index: int) -> Arrays:
        """A sample's arrays; raises as that of `TrainingSamples`."""

    def blank(self, index: int) -> Arrays:
        """Arrays of the shapes of this sample's that do not count."""


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
class Share:
    """Which part of every batch is this process's.

    Attributes:
      batch_size: samples in a batch of all processes.
      process, processes: which of them this is, from 0, and how many there are.
    """

    batch_size: int
    process: int = 0
    processes: int = 1

    @property
    def size(self) -> int:
        """Samples in a batch of this process."""
        return self.batch_size // self.processes

    def of(self, batch: np.ndarray) -> np.ndarray:
        """This process's part of a batch, where the parts lie one behind the other.

        Args:
          batch: what there is of each sample, along the last axis.
        """
        return batch[..., self.process * self.size : (self.process + 1) * self.size]


class OrderByEpoch(grain.MapDataset[int]):
    """The samples of one epoch behind the other, for `training`.

    Args:
      length: samples in an epoch.
      order: gives an epoch's samples, in their order, by its number; it is pickled.
    """

    def __init__(self, length: int, order: Callable[[int], Int[np.ndarray, length]]):
        super().__init__()
        self._length, self._order = length, order
        self._last = -1, np.empty(0, np.int64)  # the epoch that was last asked for

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._length)
        last, samples = self._last
        if epoch != last:
            samples = self._order(epoch)
            self._last = epoch, samples
        return int(samples[place])


def training(
    samples: TrainingSamples,
    order: grain.MapDataset[int],
    seed: int,
    step: int,
    share: Share,
    loading: Loading = Loading(),
) -> Iterator[HostBatch]:
    """Endless full batches from a step on, of which each process reads its share.

    In the place of a sample that cannot be read is another, drawn by the seed and the sample from
    its stand-ins, that can be. A batch has the same samples, in the same order, for any number of
    processes.

    Args:
      samples: what to read.
      order: the samples by their place in an epoch, and beyond its length in the epochs that
        follow; what is more than whole batches is left out of each. Its seed (`MapDataset.seed`)
        is that of augmentation.
      seed: of the stand-ins.
      step: where to begin.
      share: of a batch.
      loading: how samples come from a disk.

    Raises:
      DataLost: the data cannot be read any more, or not most of it; see `_while_readable`.
    """
    steps = len(order) // share.batch_size
    dataset = order.random_map(functools.partial(_drawn, samples, seed))
    dataset = dataset[: steps * share.batch_size].repeat()
    return _batches(samples, _OwnShare(dataset, share)[step * share.size :], share, loading)


def evaluation(
    samples: HeldOutSamples,
    places: Int[np.ndarray, "batches batch_size"],
    real: Bool[np.ndarray, "batches batch_size"],
    share: Share,
    loading: Loading = Loading(),
) -> Iterator[HostBatch]:
    """Batches for evaluation, of which each process reads its share.

    Args:
      samples: what to read.
      places: the samples of each batch, all of the same shapes.
      real: where these stand for themselves; elsewhere is padding of their shapes.
      share: of a batch.
      loading: how samples come from a disk.

    Raises:
      DataLost: the data cannot be read any more, or not most of it; see `_while_readable`.
    """
    chosen = np.stack([share.of(places).ravel(), share.of(real).ravel()], axis=-1)
    dataset = grain.MapDataset.source(chosen).map(functools.partial(_held_out, samples))
    return _batches(samples, dataset, share, loading)


def padded(
    count: int, batch_size: int
) -> tuple[Int[np.ndarray, "batches batch_size"], Bool[np.ndarray, "batches batch_size"]]:
    """So many samples in their order, as `places` and `real` of `evaluation`."""
    index = np.arange(-(-count // batch_size) * batch_size).reshape(-1, batch_size)
    return np.minimum(index, count - 1), index < count


def training_arrays(
    arrays: Mapping[str, np.ndarray],
    order: Callable[[int], Int[np.ndarray, length]],
    step: int,
    share: Share,
) -> Iterator[HostBatch]:
    """Batches as of `training`, of samples that are in memory.

    Args:
      arrays: those of all samples, one behind the other.
      order: gives an epoch's samples, in their order, by its number; what is more than whole
        batches is left out.
      step: where to begin.
      share: of a batch.
    """
    steps = len(order(0)) // share.batch_size
    for epoch in itertools.count(step // steps):
        samples = order(epoch)
        for batch in range(step % steps, steps):
            index = share.of(samples[batch * share.batch_size :])
            yield HostBatch({name: a[index] for name, a in arrays.items()}, index, broken={})
        step = 0


def evaluation_arrays(
    arrays: Mapping[str, np.ndarray],
    places: Int[np.ndarray, "batches batch_size"],
    real: Bool[np.ndarray, "batches batch_size"],
    share: Share,
) -> Iterator[HostBatch]:
    """Batches as of `evaluation`, of samples that are in memory."""
    for place, is_real in zip(places, real, strict=True):
        own = share.of(place)
        index = np.where(share.of(is_real), own, -1)
        yield HostBatch({name: a[own] for name, a in arrays.items()}, index, broken={})


class _OwnShare(grain.MapDataset[Any]):
    """This process's part of every batch in a data set of whole batches."""

    def __init__(self, batches: grain.MapDataset[Any], share: Share):
        super().__init__(batches)
        self._batches, self._share = batches, share

    def __len__(self) -> int:
        return len(self._batches) // self._share.processes

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self._share.size)
        start = batch * self._share.batch_size + self._share.process * self._share.size
        return self._batches[start + place]


def _batches(
    samples: Named, dataset: grain.MapDataset[_Element], share: Share, loading: Loading
) -> Iterator[HostBatch]:
    """Batches of a data set; the processes that read them end with it."""
    batches = dataset.batch(share.size, batch_fn=_stacked).to_iter_dataset(
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
        yield from _while_readable(samples, started)
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


def _while_readable(samples: Named, batches: Iterable[dict[str, Any]]) -> Iterator[HostBatch]:
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
                f"{samples.name_of(index)}: {why}"
            )

    for batch in batches:
        if batch["lost"]:
            raise DataLost(batch["lost"])
        good += batch["good"]
        bad |= batch["broken"]
        if good + len(bad) >= _WATCHED:
            check()
            good, bad = 0, {}
        yield HostBatch(batch["arrays"], batch["index"], batch["broken"])
    if len(bad) >= 4:
        check()


@dataclasses.dataclass(frozen=True)
class _Element:
    """One place in a batch.

    Attributes:
      arrays: of a sample; empty where the data is lost.
      index: see `HostBatch`.
      good: whether the arrays are those of a sample that was read.
      broken: the samples that were tried for it and cannot be read, and why.
      lost: why the data cannot be read any more, if it cannot.
    """

    arrays: Arrays
    index: int
    good: bool
    broken: dict[int, str] = dataclasses.field(default_factory=dict)
    lost: str | None = None


def _drawn(
    samples: TrainingSamples, seed: int, index: int, generator: np.random.Generator
) -> _Element:
    """A sample of the training split, or one in its place, augmented."""

    def candidates() -> Iterator[int]:
        yield index
        others, chosen = samples.stand_ins(index), np.random.default_rng((seed, index))
        yield from (others[i] for i in chosen.integers(len(others), size=_TRIED))

    broken: dict[int, str] = {}
    for candidate in map(int, candidates()):
        try:
            return _Element(samples.read(candidate, generator), candidate, True, broken)
        except DataLost as error:
            return _Element({}, -1, False, broken, lost=str(error))
        except Exception as error:  # of any kind: one broken image never stops a run
            broken[candidate] = reason(error)
    first, why = next(iter(broken.items()))
    lost = f"none of {_TRIED} images drawn can be read, as {samples.name_of(first)}: {why}"
    return _Element({}, -1, False, broken, lost)


def _held_out(samples: HeldOutSamples, chosen: Int[np.ndarray, " 2"]) -> _Element:
    """A sample of the held-out split, or padding, by its place and whether it is a real one."""
    index, real = map(int, chosen)
    if not real:
        return _Element(samples.blank(index), -1, False)
    try:
        return _Element(samples.read(index), index, True)
    except DataLost as error:
        return _Element({}, index, False, lost=str(error))
    except Exception as error:  # of any kind: one broken image never stops a run
        return _Element(samples.blank(index), index, False, {index: reason(error)})


def _stacked(elements: Sequence[_Element]) -> dict[str, Any]:
    """A `HostBatch`'s fields, how many are "good", and why the data is "lost", or None."""
    lost = next((element.lost for element in elements if element.lost), None)
    names = () if lost else elements[0].arrays
    return {
        "arrays": {name: np.stack([e.arrays[name] for e in elements]) for name in names},
        "index": np.array([element.index for element in elements], np.int64),
        "broken": {index: why for element in elements for index, why in element.broken.items()},
        "good": sum(element.good for element in elements),
        "lost": lost,
    }
