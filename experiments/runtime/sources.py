"""Where images come from: each function reads one kind of source and gives a `Dataset`.

Splits on disk hand out encoded images one at a time, in any order, from any thread, and can be
pickled for worker processes; `record_of` and `write_records` are the format of ArrayRecord files.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import os
import pathlib
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from experiments.runtime import images
from experiments.runtime.errors import UserError
from experiments.runtime.files import replacing, write_text

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
_TRAIN, _TEST = ("train",), ("test", "val", "validation")


class Sample(NamedTuple):
    """An encoded image and its label."""

    content: bytes
    label: int


@runtime_checkable
class EncodedSplit(Protocol):
    """Encoded images of any size, read from a disk one at a time."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Sample:
        """Reads one."""

    def name_of(self, index: int) -> str:
        """Which sample it is, for people."""


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """Decoded images of one size, in memory.

    Attributes:
      images, labels: the samples.
      origin: where they were read from, if from a disk, and which of its samples they are.
    """

    images: UInt8[np.ndarray, "count size size 3"]
    labels: Int[np.ndarray, count]
    origin: tuple[EncodedSplit, Int[np.ndarray, count]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """Which sample it is, for people."""
        if self.origin is None:
            return f"image {index}"
        split, samples = self.origin
        return split.name_of(int(samples[index]))


Split = ArraySplit | EncodedSplit


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


def digits(size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, every fifth one held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = _grey((found.images * (255 / 16)).astype(np.uint8), size)
    labels = found.target.astype(np.int32)
    held_out = np.arange(len(labels)) % 5 == 4
    return Dataset(
        train=ArraySplit(images[~held_out], labels[~held_out]),
        test=ArraySplit(images[held_out], labels[held_out]),
        classes=tuple(str(name) for name in found.target_names),
    )


def idx(path: pathlib.Path, size: int) -> Dataset:
    """The four idx files of MNIST or Fashion-MNIST, gzipped or not, in a folder."""
    train, test = (
        ArraySplit(
            _grey(_idx_array(path, f"{part}-images-idx3-ubyte", 3), size),
            _idx_array(path, f"{part}-labels-idx1-ubyte", 1).astype(np.int32),
        )
        for part in ("train", "t10k")
    )
    for split in (train, test):
        if len(split.images) != len(split.labels):
            raise UserError(
                f'--data: "{path}" has {len(split.images)} images with {len(split.labels)} labels; '
                "its files do not belong together."
            )
    classes = tuple(str(label) for label in range(int(train.labels.max()) + 1))
    _check_classes(str(path), classes, train.labels, test.labels)
    return Dataset(train, test, classes)


def folder(path: pathlib.Path) -> Dataset:
    """A tree train/CLASS/x.jpg and test|val/CLASS/x.jpg, or a zip of one."""
    if not path.exists():
        raise UserError(f'--data: there is no "{path}".')
    if path.is_dir():
        names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
        return _tree(str(path), names, _FolderReader(path))
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        raise UserError(
            f'--data: "{path}" is neither a folder nor a zip file that can be read.'
        ) from None
    return _tree(str(path), names, _ZipReader(path))


def array_record(path: pathlib.Path) -> Dataset:
    """A folder of classes.json and {train,test}-*.arrayrecord, as experiments.convert writes it."""
    try:
        classes = json.loads((path / "classes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f'--data: "{path}" has no classes.json that can be read; python -m experiments.convert '
            "writes ArrayRecord folders."
        ) from None
    splits = []
    for name in ("train", "test"):
        files = sorted(map(str, path.glob(f"{name}-*.arrayrecord")))
        if not files:
            raise UserError(f'--data: "{path}" has no {name}-*.arrayrecord.')
        splits.append(_RecordSplit(files))
    return Dataset(splits[0], splits[1], tuple(classes), flips=True)


def hugging_face(source: str) -> Dataset:
    """A data set of the `datasets` library, by name or local path.

    Its columns of types Image and ClassLabel are used, its split "train", and one of "test",
    "val" and "validation".
    """
    datasets = importlib.import_module("datasets")
    try:
        try:
            found = datasets.load_from_disk(source) if os.path.isdir(source) else None
        except FileNotFoundError:  # a folder of files, not one that save_to_disk has written
            found = None
        found = datasets.load_dataset(source) if found is None else found
    except Exception as error:  # of many kinds, all about the source
        raise UserError(f'--data: datasets cannot load "{source}": {error}') from None
    held_out = [name for name in _TEST if name in found]
    if "train" not in found or not held_out:
        raise UserError(
            f'--data: "{source}" must have a split "train" and one of {", ".join(_TEST)}, got '
            f"{', '.join(found)}."
        )
    kinds = {
        kind: [n for n, feature in found["train"].features.items() if isinstance(feature, kind)]
        for kind in (datasets.Image, datasets.ClassLabel)
    }
    for kind, columns in kinds.items():
        if not columns:
            raise UserError(
                f'--data: "{source}" has no column of type {kind.__name__}, but '
                f"{', '.join(map(str, found['train'].features))}."
            )
    (image, *_), (label, *_) = kinds.values()
    train, test = (
        _ColumnSplit(
            found[name].cast_column(image, datasets.Image(decode=False)), image, label, name
        )
        for name in ("train", held_out[0])
    )
    return Dataset(train, test, tuple(found["train"].features[label].names), flips=True)


def reason_of(split: Split, index: int) -> str:
    """Why a sample cannot be read."""
    try:
        images.squashed(split[index].content, 8)  # type: ignore[index]
    except Exception as error:  # of any kind
        return str(error) or type(error).__name__
    return "it could not be read, but can be now"


def record_of(name: str, sample: Sample) -> bytes:
    """A sample as a record: a line of JSON with its name and label, then the encoded image."""
    header = json.dumps({"name": name, "label": sample.label})
    return header.encode() + b"\n" + sample.content


def write_records(
    split: EncodedSplit, stem: pathlib.Path, per_file: int, order: Sequence[int]
) -> Iterator[int]:
    """Writes STEM-00000-of-00004.arrayrecord and so on.

    Args:
      split: what to write.
      stem: the files' names begin with it.
      per_file: samples in a file.
      order: which samples, in which order.

    Yields:
      The number of samples written so far.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    files = -(-len(order) // per_file)
    for file in range(files):
        path = stem.with_name(f"{stem.name}-{file:05d}-of-{files:05d}.arrayrecord")
        with replacing(path) as temporary:
            # Random access needs groups of one record.
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            for done, index in enumerate(order[file * per_file : (file + 1) * per_file], 1):
                writer.write(record_of(split.name_of(index), split[index]))
                yield file * per_file + done
            writer.close()


def write_classes(classes: Sequence[str], folder: pathlib.Path) -> None:
    """Writes the classes.json of a folder of ArrayRecord files."""
    write_text(folder / "classes.json", json.dumps(list(classes)) + "\n")


@dataclasses.dataclass(frozen=True)
class _FileSplit:
    """Files whose names and labels are known."""

    names: Sequence[str]
    labels: Int[np.ndarray, count]
    read: Callable[[str], bytes]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.read(self.names[index]), int(self.labels[index]))

    def name_of(self, index: int) -> str:
        return self.names[index]


@dataclasses.dataclass(frozen=True)
class _FolderReader:
    root: pathlib.Path

    def __call__(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class _ZipReader:
    """Reads members of a zip file, which every process opens for itself."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._archive: zipfile.ZipFile | None = None
        self._lock = threading.Lock()

    def __call__(self, name: str) -> bytes:
        with self._lock:
            if self._archive is None:
                self._archive = zipfile.ZipFile(self._path)
            return self._archive.read(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ZipReader, (self._path,)


class _RecordSplit:
    """ArrayRecord files."""

    def __init__(self, files: Sequence[str]):
        from grain.sources import ArrayRecordDataSource

        self._records = ArrayRecordDataSource(list(files))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        header, content = self._parted(index)
        return Sample(content, header["label"])

    def name_of(self, index: int) -> str:
        return str(self._parted(index)[0]["name"])

    def _parted(self, index: int) -> tuple[dict[str, Any], bytes]:
        header, _, content = self._records[index].partition(b"\n")
        return json.loads(header), content


@dataclasses.dataclass(frozen=True)
class _ColumnSplit:
    """Two columns of a split of the `datasets` library."""

    rows: Any
    image: str
    label: str
    split: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        image = row[self.image]
        content = image["bytes"]
        if content is None:
            content = pathlib.Path(image["path"]).read_bytes()
        return Sample(content, row[self.label])

    def name_of(self, index: int) -> str:
        path = self.rows[index][self.image]["path"]
        return f"{self.split} row {index}" + (f" ({path})" if path else "")


def _tree(where: str, names: Sequence[str], read: Callable[[str], bytes]) -> Dataset:
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
    number = {label: i for i, label in enumerate(sorted(classes["train"]))}
    train, test = (
        _FileSplit(
            [name for _, name in entries],
            np.array([number[label] for label, _ in entries], np.int32),
            read,
        )
        for entries in files.values()
    )
    return Dataset(train, test, tuple(number), flips=True)


def _grey(images: UInt8[np.ndarray, "count height width"], size: int) -> np.ndarray:
    """Grey images as RGB, resized to size x size."""
    return np.stack(
        [
            np.asarray(
                Image.fromarray(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
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
    except (OSError, EOFError) as error:
        raise UserError(f'--data: "{path}" (or .gz) cannot be read: {error}.') from None
    shape = [int(n) for n in np.frombuffer(content[4 : 4 + 4 * rank], ">i4")]
    values = np.frombuffer(content[4 + 4 * rank :], np.uint8)
    if content[:4] != bytes([0, 0, 8, rank]) or len(values) != np.prod(shape):
        raise UserError(f'--data: "{path}" is no idx file of bytes in {rank} dimensions.')
    return values.reshape(shape)


def _check_classes(where: str, classes: Sequence[str], *labels: np.ndarray) -> None:
    for split, found in zip(("train", "test"), labels, strict=True):
        for label, name in enumerate(classes):
            if label not in found:
                raise UserError(
                    f'--data: class "{name}" has no image in the {split} split of "{where}".'
                )
