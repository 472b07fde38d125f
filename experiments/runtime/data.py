"""A data set by the name that --data gives, on disk or in memory."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from rich.progress import track

from experiments.runtime import images, sources
from experiments.runtime.errors import DataLost, UserError, blaming, reason
from experiments.runtime.sources import ArraySplit, Dataset, EncodedSplit, Sample
from experiments.runtime.sources.splits import digest_of

Hold = Literal["auto", "memory", "disk"]

IN_MEMORY = 4 * 2**30
"""Bytes of images that are held in memory without being asked to."""

_ON_DISK: dict[str, Callable[[str], Dataset]] = {
    "folder": lambda path: sources.folder(pathlib.Path(path)),
    "arrayrecord": lambda path: sources.array_record(pathlib.Path(path)),
    "hf": sources.hugging_face,
}


def load(source: str, size: int, *, hold: Hold = "auto", whole_images: bool = False) -> Dataset:
    """Finds the data set that --data names, and reads it if it is to be held in memory.

    Args:
      source: "digits"; "idx:PATH", a folder of the four files of MNIST or Fashion-MNIST;
        "folder:PATH", an image-folder tree (train/CLASS/x.jpg and test|val/CLASS/x.jpg) or a zip of
        one; "arrayrecord:PATH", a folder that experiments.convert has written; "hf:NAME_OR_PATH",
        a data set of Hugging Face's `datasets`.
      size: pixels a side of images in memory, whatever their shape was.
      hold: where images are kept while they are used; "auto" is memory if that takes 4 GiB at most
        and whole_images is not asked for.
      whole_images: whether the images' own size and shape must be kept, which is done on disk.

    Returns:
      Splits that are both `ArraySplit` or both `EncodedSplit`.

    Raises:
      UserError: the source is unknown, or there is something wrong with it.
    """
    source = absolute(source)
    if size < 8:
        raise UserError(f"--image-size must be at least 8, got {size}.")
    kind, _, path = source.partition(":")
    if source == "digits" or (kind == "idx" and path):
        if hold == "disk" or whole_images:
            asked = ['--hold is "disk"'] if hold == "disk" else []
            asked += ["--train.augment is resized-crop"] if whole_images else []
            raise UserError(
                f"--data {source} is held in memory, but {' and '.join(asked)}; give another value."
            )
        with blaming("--data"):
            if kind == "digits":
                return sources.digits(size)
            return sources.idx(pathlib.Path(path), size)
    if kind not in _ON_DISK or not path:
        raise UserError(
            '--data must be "digits", "idx:PATH", "folder:PATH", "arrayrecord:PATH" or '
            f'"hf:NAME_OR_PATH", got "{source}".'
        )
    if hold == "memory" and whole_images:
        raise UserError(
            "--train.augment resized-crop needs images of their own size, which are on disk, but "
            '--hold is "memory"; leave it out.'
        )
    dataset = on_disk(source)
    take = (len(dataset.train) + len(dataset.test)) * size * size * 3
    if whole_images or hold == "disk" or (hold == "auto" and take > IN_MEMORY):
        return dataset
    with blaming("--data"):
        return _in_memory(path, dataset, size)


def on_disk(source: str, option: str = "--data") -> Dataset:
    """Finds a data set whose images are read from a disk when they are used.

    Args:
      source: "folder:PATH", "arrayrecord:PATH" or "hf:NAME_OR_PATH", as for `load`.
      option: what gave the source, for errors.

    Raises:
      UserError: the source is none of these, or there is something wrong with it.
    """
    kind, _, path = absolute(source).partition(":")
    if kind not in _ON_DISK or not path:
        raise UserError(
            f'{option} must be "folder:PATH", "arrayrecord:PATH" or "hf:NAME_OR_PATH", got '
            f'"{source}".'
        )
    with blaming(option):
        return _ON_DISK[kind](path)


def absolute(source: str) -> str:
    """The same source, whatever the working folder is: its path absolute and without ~."""
    kind, _, path = source.partition(":")
    expanded = os.path.expanduser(path)
    if not path or kind not in {"idx", *_ON_DISK}:
        return source
    if kind == "hf" and not os.path.exists(expanded):  # a name
        return source
    return f"{kind}:{os.path.abspath(expanded)}"


def _in_memory(where: str, dataset: Dataset, size: int) -> Dataset:
    assert not isinstance(dataset.train, ArraySplit) and not isinstance(dataset.test, ArraySplit)
    skipped: list[str] = []
    train = _decoded(where, "train", dataset.train, dataset.classes, size, skipped)
    test = _decoded(where, "test", dataset.test, dataset.classes, size, skipped)
    return dataclasses.replace(dataset, train=train, test=test, skipped=tuple(skipped))


def _decoded(
    where: str,
    name: str,
    split: EncodedSplit,
    classes: tuple[str, ...],
    size: int,
    skipped: list[str],
) -> ArraySplit:
    labels = np.full(len(split), -1, np.int32)
    digests = [b""] * len(split)

    def seen(index: int, sample: Sample) -> None:
        labels[index] = sample.label
        digests[index] = f"{digest_of([sample.content])} {sample.label}".encode()

    pixels, reasons = decoded(split, (size, size), f"reading {name} images", seen)
    broken = [f"{split.name_of(index)}: {why}" for index, why in reasons.items()]
    skipped += broken
    good = labels >= 0
    if not good.any():
        raise UserError(
            f'no image of the {name} split of "{where}" can be read; the first is {broken[0]}.'
        )
    if len(split) >= 16 and 2 * good.sum() < len(split):
        raise UserError(
            f'{len(broken)} of {len(split)} images of the {name} split of "{where}" cannot be '
            f"read; the first is {broken[0]}."
        )
    for label, title in enumerate(classes):
        if label not in labels[good]:
            raise UserError(
                f'no image of class "{title}" in the {name} split of "{where}" can be read; mend '
                "its images or take the class out."
            )
    if not good.all():
        pixels, labels = pixels[good], labels[good]
    return ArraySplit(pixels, labels, (split, np.flatnonzero(good)), digest_of(digests))


def decoded(
    split: EncodedSplit,
    size: tuple[int, int],
    title: str,
    seen: Callable[[int, Sample], None] = lambda index, sample: None,
) -> tuple[UInt8[np.ndarray, "count height width 3"], dict[int, str]]:
    """All images of a split, resized, and which could not be read, and why.

    Args:
      split: the images.
      size: their height and width in memory.
      title: of the progress bar.
      seen: is called with every image that was read, from any thread.

    Raises:
      DataLost: it is not only single ones that cannot be read.
    """
    pixels = np.zeros((len(split), *size, 3), np.uint8)

    def decode(index: int) -> str | None:
        try:
            sample = split[index]
            pixels[index] = images.squashed(sample.content, size)
        except DataLost:
            raise
        except Exception as error:  # of any kind: one broken image never stops a run
            return reason(error)
        seen(index, sample)
        return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        shown = functools.partial(track, transient=True, disable=not sys.stdout.isatty())
        reasons = list(shown(pool.map(decode, range(len(split))), title, len(split)))
    return pixels, {index: why for index, why in enumerate(reasons) if why is not None}
