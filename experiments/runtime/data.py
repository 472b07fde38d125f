"""Image classification data, held as arrays: the embedded digits, image-folder trees and zips."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import os
import pathlib
import threading
import zipfile
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from rich.progress import track

from experiments.runtime.errors import UserError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
_TRAIN, _TEST = ("train",), ("test", "val")


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (uint8) and their labels."""

    images: UInt8[np.ndarray, "count size size 3"]
    labels: Int[np.ndarray, count]

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """Which sample it is."""
        return f"image {index}"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a held-out split over the same classes.

    Attributes:
      classes: names, in the order of the labels.
      skipped: what could not be read, as "path: reason".
      flips: whether an image's mirror image is as good as the image.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    flips: bool = False


def load(source: str, size: int) -> Dataset:
    """Loads a data set.

    Args:
      source: "digits", or "folder:PATH" with PATH an image-folder tree (train/CLASS/x.jpg and
        test|val/CLASS/x.jpg) or a zip of one.
      size: images are resized to size x size.

    Raises:
      UserError: the source is unknown, or there is something wrong with it.
    """
    if size < 8:
        raise UserError(f"--image-size must be at least 8, got {size}.")
    if source == "digits":
        return _digits(size)
    kind, _, path = source.partition(":")
    if kind == "folder" and path:
        return _folder(pathlib.Path(path), size)
    raise UserError(f'--data must be "digits" or "folder:PATH", got "{source}".')


def augment(
    key: jax.Array, images: Float[jax.Array, "batch size size 3"], *, flip: bool
) -> Float[jax.Array, "batch size size 3"]:
    """Pads by an eighth of the size, crops at random, and flips every other image if asked."""
    batch, size = images.shape[:2]
    pad = size // 8
    crop_key, flip_key = jax.random.split(key)
    padded = jax.numpy.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, 3))

    images = jax.vmap(crop)(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jax.numpy.where(mirrored, images[:, :, ::-1], images)
    return images


def _digits(size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, every fifth one held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.stack(
        [
            np.asarray(
                Image.fromarray((image * (255 / 16)).astype(np.uint8))
                .convert("RGB")
                .resize((size, size), Image.Resampling.BICUBIC)
            )
            for image in digits.images
        ]
    )
    labels = digits.target.astype(np.int32)
    held_out = np.arange(len(labels)) % 5 == 4
    return Dataset(
        train=Split(images[~held_out], labels[~held_out]),
        test=Split(images[held_out], labels[held_out]),
        classes=tuple(str(name) for name in digits.target_names),
    )


def _folder(path: pathlib.Path, size: int) -> Dataset:
    if not path.exists():
        raise UserError(f'--data: there is no "{path}".')
    if path.is_dir():
        names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
        return _tree(str(path), names, lambda name: (path / name).read_bytes(), size)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        raise UserError(
            f'--data: "{path}" is neither a folder nor a zip file that can be read.'
        ) from None
    lock = threading.Lock()  # members are opened from several threads

    def read(name: str) -> bytes:
        with lock:
            return archive.read(name)

    with archive:
        return _tree(str(path), sorted(archive.namelist()), read, size)


def _tree(where: str, names: list[str], read: Callable[[str], bytes], size: int) -> Dataset:
    files: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for name in names:
        parts = pathlib.PurePosixPath(name.replace(os.sep, "/")).parts
        if len(parts) < 3 or pathlib.PurePosixPath(name).suffix.lower() not in _IMAGE_SUFFIXES:
            continue
        if parts[-3] in _TRAIN:
            files["train"].append((parts[-2], name))
        elif parts[-3] in _TEST:
            files["test"].append((parts[-2], name))
    for split, folder in (("train", "train"), ("test", "test or val")):
        if not files[split]:
            raise UserError(
                f'--data: "{where}" has no images at {folder}/CLASS/ (as in '
                f"{folder.split()[0]}/CLASS/x.jpg)."
            )
    classes = {split: {label for label, _ in entries} for split, entries in files.items()}
    if alone := classes["train"] ^ classes["test"]:
        name = min(alone)
        split, other = ("train", "test") if name in classes["train"] else ("test", "train")
        raise UserError(
            f'--data: class "{name}" of "{where}" is only in the {split} split; put a folder of '
            f"that name into the {other} split or take it out."
        )
    if len(classes["train"]) < 2:
        raise UserError(f'--data: "{where}" has one class only; a classifier needs two or more.')
    ordered = tuple(sorted(classes["train"]))
    skipped: list[str] = []
    splits = {
        split: _decode(where, split, entries, ordered, read, size, skipped)
        for split, entries in files.items()
    }
    return Dataset(splits["train"], splits["test"], ordered, tuple(skipped), flips=True)


def _decode(
    where: str,
    split: str,
    entries: list[tuple[str, str]],
    classes: tuple[str, ...],
    read: Callable[[str], bytes],
    size: int,
    skipped: list[str],
) -> Split:
    images = np.empty((len(entries), size, size, 3), np.uint8)
    labels = np.array([classes.index(label) for label, _ in entries], np.int32)
    good = np.ones(len(entries), bool)

    def decode(name: str) -> np.ndarray | str:
        try:
            content = read(name)
            if not content:
                return "the file is empty"
            with Image.open(io.BytesIO(content)) as opened:
                image = opened.convert("RGB")
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                return np.asarray(image)
        except Exception as error:  # of any kind: one broken image never stops a run
            return str(error) or type(error).__name__

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        names = [name for _, name in entries]
        decoded = track(
            pool.map(decode, names), f"reading {split} images", len(entries), transient=True
        )
        for i, result in enumerate(decoded):
            if isinstance(result, str):
                good[i] = False
                skipped.append(f"{entries[i][1]}: {result}")
            else:
                images[i] = result
    if not good.any():
        raise UserError(
            f'--data: no image of the {split} split of "{where}" can be read; the first is '
            f"{skipped[-len(entries)]}."
        )
    for i, label in enumerate(classes):
        if i not in labels[good]:
            raise UserError(
                f'--data: no image of class "{label}" in the {split} split of "{where}" can be '
                "read; mend its images or take the class out."
            )
    return Split(images[good], labels[good])
