"""Data sets of small grey images of one size, which are held in memory."""

from __future__ import annotations

import gzip
import pathlib
import zlib

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from experiments.runtime.errors import UserError, reason
from experiments.runtime.images import as_rgb
from experiments.runtime.sources.labels import numbered
from experiments.runtime.sources.splits import ArraySplit, Dataset, digest_of


def digits(size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, every fifth one held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(images)) % 5 == 4
    return _dataset(
        "digits",
        {"train": images[~held_out], "test": images[held_out]},
        {"train": found.target[~held_out], "test": found.target[held_out]},
        size,
    )


def idx(path: pathlib.Path, size: int) -> Dataset:
    """The four idx files of MNIST, EMNIST or Fashion-MNIST, gzipped or not, in a folder.

    Classes are named by their labels, which need not begin at 0.
    """
    images, labels = {}, {}
    for split, part in (("train", "train"), ("test", "t10k")):
        images[split] = _idx_array(path, f"{part}-images-idx3-ubyte", 3)
        labels[split] = _idx_array(path, f"{part}-labels-idx1-ubyte", 1).astype(np.int64)
        if len(images[split]) != len(labels[split]):
            raise UserError(
                f'"{path}" has {len(images[split])} images with {len(labels[split])} labels; its '
                "files do not belong together."
            )
    return _dataset(str(path), images, labels, size)


def _dataset(
    where: str,
    images: dict[str, UInt8[np.ndarray, "count height width"]],
    labels: dict[str, Int[np.ndarray, count]],
    size: int,
) -> Dataset:
    names = [str(label) for label in range(256)]
    classes, numbers = numbered(where, names, labels)
    train, test = (
        ArraySplit(
            _resized(images[split], size),
            numbers[split],
            content_digest=digest_of([images[split].tobytes(), labels[split].tobytes()]),
        )
        for split in ("train", "test")
    )
    return Dataset(train, test, classes)


def _resized(images: UInt8[np.ndarray, "count height width"], size: int) -> np.ndarray:
    """Grey images as RGB, resized to size x size."""
    return np.stack(
        [
            np.asarray(
                as_rgb(Image.fromarray(image)).resize((size, size), Image.Resampling.BICUBIC)
            )
            for image in images
        ]
    )


def _idx_array(folder: pathlib.Path, name: str, rank: int) -> np.ndarray:
    """Reads an idx file of bytes: 0, 0, 8, rank; the lengths; the values."""
    path = folder / name
    packed = path.with_name(f"{name}.gz")
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'"{path}" (or .gz) cannot be read: {reason(error)}.') from None
    begin = 4 + 4 * rank
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4)]
    values = np.frombuffer(content[begin:], np.uint8)
    whole = len(content) >= begin and len(values) == np.prod(shape)
    if content[:4] != bytes([0, 0, 8, rank]) or not whole:
        raise UserError(f'"{path}" is no idx file of bytes in {rank} dimensions.')
    return values.reshape(shape)
