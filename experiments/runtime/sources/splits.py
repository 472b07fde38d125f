"""What every source gives: two splits of labelled images, in memory or on a disk."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, UInt8

from experiments.runtime.errors import DataLost, reason

# Errors that are about one file, if the folder that it is in can still be read.
_OF_ONE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Sample(NamedTuple):
    """An encoded image and its label."""

    content: bytes
    label: int


class EncodedSplit(Protocol):
    """Encoded images of any size, read from a disk one at a time.

    In any order, from any thread, and pickled for worker processes.
    """

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Sample:
        """Reads one.

        Raises:
          DataLost: it is not only this one that cannot be read.
          Exception: this one cannot be read.
        """

    def name_of(self, index: int) -> str:
        """Which sample it is, for people; also of one that cannot be read."""

    def digest(self) -> str:
        """The same for the same samples and labels, wherever they lie."""


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """Decoded images of one size, in memory.

    Attributes:
      images, labels: the samples.
      origin: where they were read from, if from a disk, and which of its samples they are.
      content_digest: of what the images were decoded from, if they were.
    """

    images: UInt8[np.ndarray, "count size size 3"]
    labels: Int[np.ndarray, count]
    origin: tuple[EncodedSplit, Int[np.ndarray, count]] | None = None
    content_digest: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """Which sample it is, for people."""
        if self.origin is None:
            return f"image {index}"
        split, samples = self.origin
        return split.name_of(int(samples[index]))

    def digest(self) -> str:
        """The same for the same images and labels."""
        return self.content_digest or digest_of([self.images.tobytes(), self.labels.tobytes()])


Split = ArraySplit | EncodedSplit


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a held-out split over the same classes.

    Attributes:
      classes: names, in the order of the labels.
      skipped: images that could not be read, as "path: reason".
      left_out: what of the source is not used and why, a line for each kind.
      flips: whether an image's mirror image is as good as the image, as far as can be told.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    flips: bool = False

    def identity(self) -> dict[str, str | int]:
        """What tells this data from other data, by short names.

        Where the data lies is no part of it; what images, labels and classes there are is. Of what
        is held on a disk, only some images are read for it: names and sizes (in ArrayRecord, of
        whole files) stand for the others.
        """
        return {
            "classes": len(self.classes),
            "class names": digest_of([json.dumps(self.classes).encode()]),
            "training images": len(self.train),
            "training digest": self.train.digest(),
            "test images": len(self.test),
            "test digest": self.test.digest(),
        }


class Labelled(NamedTuple):
    """Images that are in no splits yet.

    Attributes:
      images: all of them.
      labels: their classes.
      classes: names, in the order of the labels.
      left_out: what of the source is not used and why, a line for each kind.
    """

    images: EncodedSplit
    labels: Int[np.ndarray, count]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def digest_of(parts: Iterable[bytes]) -> str:
    """A short digest of byte strings, each of which counts as such."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def evenly_spread(count: int, most: int = 500) -> list[int]:
    """Places from 0 to count - 1: all of them, or `most` at even distances."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()


def some_contents(split: EncodedSplit) -> Iterator[bytes]:
    """Some encoded images, evenly spread, or all if they are few, for a digest.

    Raises:
      DataLost: the data cannot be read.
    """
    for index in evenly_spread(len(split)):
        try:
            yield split[index].content
        except DataLost:
            raise
        except Exception:  # of any kind: a broken image is the same each time
            yield b""


def read_file(path: pathlib.Path, root: pathlib.Path | None) -> bytes:
    """Reads one of the files of a data set.

    Args:
      path: the file.
      root: the folder that the data set is in, if it is in one.

    Raises:
      OSError: this file cannot be read.
      DataLost: the folder or the disk cannot be read any more.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        alone = isinstance(error, _OF_ONE_FILE) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG)
        if alone and (root is None or _has_entries(root)):
            raise
        where = path if root is None else root
        raise DataLost(f'"{where}" cannot be read any more: {reason(error)}') from None


def _has_entries(folder: pathlib.Path) -> bool:
    """Whether a folder can be listed and has something in it, as a disk does that is there."""
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def count_of(count: int, noun: str) -> str:
    """As "1 image" or "2 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def can_be_mirrored(classes: Sequence[str]) -> bool:
    """Whether mirror images are as good: not of characters, which are told by classes' names.

    Names of characters are single characters, numbers (EMNIST's classes), and words as "zero".
    """
    words = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    return not all(len(name) == 1 or name.isdigit() or name.lower() in words for name in classes)
