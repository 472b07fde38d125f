"""Image files in a tree of folders, or a zip of one: in splits and classes, or in classes alone."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int
from PIL import Image

from experiments.runtime.errors import DataLost, UserError, reason
from experiments.runtime.sources.labels import numbered
from experiments.runtime.sources.splits import (
    Dataset,
    Labelled,
    Sample,
    can_be_mirrored,
    count_of,
    digest_of,
    read_file,
    some_contents,
)

# Names of the splits' folders, in any case; of several held-out ones, the first is used.
_TRAIN = ("train", "training")
_HELD_OUT = ("test", "testing", "val", "valid", "validation")
# Formats that Pillow knows by name, but that are no pictures, or cannot be decoded without more.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}

Folder = tuple[str, ...]
"""The names of the folders on the way to one, from the root of the tree or the zip."""


def folder(path: pathlib.Path) -> Dataset:
    """A tree train/CLASS/x.jpg and test|val/CLASS/x.jpg, or a zip of one.

    Images may lie in folders below their class's, the tree in folders of a zip, and symbolic links
    are followed. What is hidden (.x, __MACOSX, Thumbs.db) is no part of the tree.

    Raises:
      UserError: there is no such tree, there are two, or the splits have not the same classes.
    """
    names, reader, left_out = files_of(path)
    return _dataset(str(path), names, reader, left_out)


def one_split(path: pathlib.Path) -> Labelled:
    """A tree CLASS/x.jpg, in any folder, or a zip of one.

    What is hidden (.x, __MACOSX, Thumbs.db) is no part of the tree.

    Raises:
      UserError: there is no such tree, or two of its folders are the same class.
    """
    names, reader, left_out = files_of(path)
    images = _images(reader, names, left_out)
    if nowhere := images.pop((), []):
        left_out.append(f'{count_of(len(nowhere), "image")} in no folder, as "{nowhere[0]}"')
    folders: dict[str, Folder] = {}
    for folder in sorted(images):
        if (other := folders.setdefault(folder[-1], folder)) != folder:
            raise UserError(
                f'"{path}" has two folders "{folder[-1]}", "{"/".join(other)}" and '
                f'"{"/".join(folder)}"; join them, or rename one.'
            )
    if not folders:
        but = f"; it has {'; '.join(left_out)}" if left_out else ""
        raise UserError(f'"{path}" has no images in folders, as in CLASS/x.jpg{but}.')
    classes = sorted(folders)
    entries = [
        (name, label) for label, c in enumerate(classes) for name in sorted(images[folders[c]])
    ]
    labels = np.array([label for _, label in entries])
    split = _FileSplit([name for name, _ in entries], labels, 0, reader)
    return Labelled(split, labels, tuple(classes), tuple(left_out))


def files_of(path: pathlib.Path) -> tuple[list[str], Reader, list[str]]:
    """The files of a folder or of a zip, what reads them, and what could not be looked at.

    Raises:
      UserError: it is none of these.
    """
    if not path.exists():
        raise UserError(f'there is no "{path}".')
    if path.is_dir():
        names, left_out = files_below(path)
        return names, FolderReader(path), left_out
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            # One file may stand under two spellings of its path.
            spelt = {parts_in_zip(name): name for name in members}
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        raise UserError(f'"{path}" is neither a folder nor a zip file that can be read.') from None
    if members and all(info.flag_bits & 1 for info in members.values()):
        raise UserError(f'"{path}" is encrypted; give a zip without a password, or a folder.')
    return sorted(spelt.values()), ZipReader(path), []


def images_of(path: pathlib.Path) -> tuple[list[str], Reader, list[str]]:
    """`files_of`, without what is hidden and what has no suffix of an image."""
    names, reader, left_out = files_of(path)
    images = _images(reader, names, left_out)
    return sorted(itertools.chain.from_iterable(images.values())), reader, left_out


class Reader(Protocol):
    """Reads the files of a tree by their names in it, from any thread."""

    def read(self, name: str) -> bytes:
        """The content of a file."""

    def size(self, name: str) -> int | None:
        """Its bytes, or None where that cannot be told."""

    def parts(self, name: str) -> Folder:
        """The folders that it is in, and its own name."""


@dataclasses.dataclass(frozen=True)
class FolderReader:
    """Reads files below a folder.

    Attributes:
      root: the folder.
    """

    root: pathlib.Path

    def read(self, name: str) -> bytes:
        """See `Reader`."""
        return read_file(self.root / name, self.root)

    def size(self, name: str) -> int | None:
        """See `Reader`."""
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return None

    def parts(self, name: str) -> Folder:
        """See `Reader`."""
        return tuple(name.split("/"))


class ZipReader:
    """Reads members of a zip file, which every process opens for itself."""

    def __init__(self, path: pathlib.Path, stamp: tuple[int, int] | None = None):
        self._path = path
        self._stamp = stamp or self._stamp_now()
        self._archive: zipfile.ZipFile | None = None
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        """See `Reader`.

        Raises:
          DataLost: the file is gone, or another.
          Exception: this member cannot be read.
        """
        try:
            with self._lock:
                return self._opened().read(name)
        except OSError as error:
            raise DataLost(f'"{self._path}" cannot be read any more: {reason(error)}') from None
        except DataLost:
            raise
        except Exception:  # of many kinds, about this member, if the file is what it was
            if self._stamp_now() != self._stamp:
                raise DataLost(f'"{self._path}" is not the file any more that it was') from None
            raise

    def size(self, name: str) -> int | None:
        """See `Reader`."""
        with self._lock:
            return self._opened().getinfo(name).file_size

    def parts(self, name: str) -> Folder:
        """See `Reader`."""
        return parts_in_zip(name)

    def _opened(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self._path)
            except zipfile.BadZipFile as error:
                raise DataLost(f'"{self._path}" is no zip file any more: {error}') from None
        return self._archive

    def _stamp_now(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (-1, -1)
        return found.st_size, found.st_mtime_ns

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipReader, (self._path, self._stamp)


@dataclasses.dataclass(frozen=True)
class _FileSplit:
    """Files whose names and labels are known.

    Attributes:
      names, labels: of the files.
      depth: folders above those of the classes.
      reader: reads them.
    """

    names: Sequence[str]
    labels: Int[np.ndarray, count]
    depth: int
    reader: Reader

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.reader.read(self.names[index]), int(self.labels[index]))

    def name_of(self, index: int) -> str:
        return self.names[index]

    def digest(self) -> str:
        def about(name: str, label: int) -> bytes:
            path = "/".join(self.reader.parts(name)[self.depth :])
            return f"{path} {label} {self.reader.size(name)}".encode(errors="surrogateescape")

        return digest_of(
            itertools.chain(map(about, self.names, self.labels.tolist()), some_contents(self))
        )


class _Found(NamedTuple):
    """The images of a folder of the tree, and where the folder is in it."""

    split: Folder
    label: str
    names: list[str]


def _images(reader: Reader, names: Iterable[str], left_out: list[str]) -> dict[Folder, list[str]]:
    """The images among the files, by the folder that they are in."""
    images: dict[Folder, list[str]] = collections.defaultdict(list)
    others: collections.Counter[str] = collections.Counter()
    for name in names:
        parts = reader.parts(name)
        if any(map(_is_hidden, parts)):
            continue
        suffix = pathlib.PurePosixPath(parts[-1]).suffix.lower()
        if suffix in _suffixes():
            images[parts[:-1]].append(name)
        else:
            others[suffix or "no suffix"] += 1
    if others:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5))
        left_out.append(f"{count_of(others.total(), 'file')} of other kinds than images ({kinds})")
    return images


def _dataset(where: str, names: Iterable[str], reader: Reader, left_out: list[str]) -> Dataset:
    images = _images(reader, names, left_out)
    found = _in_splits(where, images, left_out)
    train = _only([f for f in found if f.split[-1].lower() in _TRAIN], where, "train", left_out)
    known = {f.label for f in train}
    held_out = _held_out([f for f in found if f.split[-1].lower() in _HELD_OUT], known, left_out)
    held_out = _only(held_out, where, "test or val", left_out)
    splits = {"train": train, "test": held_out}
    names_of_all = sorted({f.label for found in splits.values() for f in found})
    numbers = {label: number for number, label in enumerate(names_of_all)}
    entries = {
        split: sorted((name, numbers[f.label]) for f in found for name in f.names)
        for split, found in splits.items()
    }
    labels = {split: np.array([n for _, n in pairs]) for split, pairs in entries.items()}
    classes, labels = numbered(where, names_of_all, labels)
    files = {
        split: _FileSplit(
            [name for name, _ in entries[split]], labels[split], len(found[0].split), reader
        )
        for split, found in splits.items()
    }
    flips = can_be_mirrored(classes)
    return Dataset(files["train"], files["test"], classes, (), tuple(left_out), flips)


def _in_splits(where: str, images: dict[Folder, list[str]], left_out: list[str]) -> list[_Found]:
    """Finds the tree among the folders that have images: its splits and classes.

    Raises:
      UserError: there are two trees, whose images may be the same ones.
    """
    candidates = {split for folder in images for split in _splits_above(folder)}
    roots = {
        kind: {split[:-1] for split in candidates if split[-1].lower() in kind}
        for kind in (_TRAIN, _HELD_OUT)
    }
    # The tree is where both splits are; where they are in no one folder, each is looked for alone.
    both = roots[_TRAIN] & roots[_HELD_OUT]
    chosen = {min(both or r, key=lambda root: (len(root), root)) for r in roots.values() if r}
    found, outside = [], []
    for folder, names in images.items():
        above = list(_splits_above(folder))
        split = next((split for split in above if split[:-1] in chosen), None)
        if split is not None:
            found.append(_Found(split, folder[len(split)], names))
        elif above:
            tree = "/".join(min(chosen)) or "."
            raise UserError(
                f'"{where}" holds two trees of images, one in "{tree}" and one in '
                f'"{"/".join(above[0][:-1]) or "."}"; take one of them out, so that no image is '
                "there twice."
            )
        else:
            outside += names
    if outside:
        left_out.append(
            f"{count_of(len(outside), 'image')} in no folder of a split and a class, as "
            f'"{outside[0]}"'
        )
    return found


def _splits_above(folder: Folder) -> Iterator[Folder]:
    """The folders above this one, or above a folder that it is in, that a split may be."""
    for depth in range(1, len(folder)):
        if folder[depth - 1].lower() in _TRAIN + _HELD_OUT:
            yield folder[:depth]


def _held_out(found: list[_Found], known: set[str], left_out: list[str]) -> list[_Found]:
    """Of several held-out splits, the first that has a class of the training split's."""
    labelled = [f for f in found if f.label in known] or found
    if not labelled:
        return []
    used = min((f.split for f in labelled), key=lambda split: _HELD_OUT.index(split[-1].lower()))
    for split in sorted({f.split for f in found} - {used}):
        count = sum(len(f.names) for f in found if f.split == split)
        left_out.append(
            f'{count_of(count, "image")} of "{"/".join(split)}", as "{"/".join(used)}" is held out'
        )
    return [f for f in found if f.split == used]


def _only(found: list[_Found], where: str, name: str, left_out: Sequence[str]) -> list[_Found]:
    """Refuses a split that has no images, or several folders."""
    if not found:
        but = f"; it has {'; '.join(left_out)}" if left_out else ""
        raise UserError(
            f'"{where}" has no images at {name}/CLASS/ (as in {name.split()[0]}/CLASS/x.jpg){but}.'
        )
    first, *others = sorted({"/".join(f.split) for f in found})
    if others:
        raise UserError(
            f'"{where}" has two folders for one split, "{first}" and "{others[0]}"; join them.'
        )
    return found


@functools.cache
def _suffixes() -> frozenset[str]:
    """Of the image files that Pillow decodes."""
    return frozenset(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NO_PICTURES
    )


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is for a program's own use, as .DS_Store, ._x.jpg and __MACOSX."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def parts_in_zip(name: str) -> Folder:
    """The folders and the file of a path in a zip.

    Old Windows programs write zips with backslashes; what leads out of a zip leads nowhere.
    """
    parts = name.replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".", ".."))


def files_below(root: pathlib.Path) -> tuple[list[str], list[str]]:
    """The files below a folder, by their paths within it, and what could not be looked at."""
    names: list[str] = []
    left_out: list[str] = []
    no_files: list[str] = []
    # Folders to be looked into, each with those it is in: a link to one of these is a circle.
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        prefix, above = waiting.pop()
        try:
            status = os.stat(root / prefix)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                continue
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    if _is_hidden(entry.name):
                        continue
                    path = prefix + entry.name
                    if entry.is_dir():
                        waiting.append((f"{path}/", above | {identity}))
                    elif entry.is_file():
                        names.append(path)
                    else:
                        no_files.append(path)
        except OSError as error:
            left_out.append(f'the folder "{root / prefix}": {reason(error)}')
    if no_files:
        left_out.append(
            f"{count_of(len(no_files), 'link')} to nothing, or what is no file, as "
            f'"{min(no_files)}"'
        )
    return sorted(names), sorted(left_out)
