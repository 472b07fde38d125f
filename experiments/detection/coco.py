"""A data set of images and COCO json, in a folder, a zip, or wherever its parts lie."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import filelock
import numpy as np

from experiments.detection.annotations import Annotations, parse
from experiments.runtime.errors import DataLost, UserError, reason
from experiments.runtime.files import replacing
from experiments.runtime.sources.splits import count_of, digest_of, evenly_spread
from experiments.runtime.sources.trees import (
    Folder,
    FolderReader,
    Reader,
    ZipReader,
    files_below,
    parts_in_zip,
)

# Of the files in which parsed annotations are kept; another number means that none of them is read.
_CACHE_FORMAT = 1

SplitName = Literal["train", "val"]


@dataclasses.dataclass(frozen=True)
class Paths:
    """Where a split's parts lie, if not where the data set's folder has them."""

    annotations: pathlib.Path | None = None
    """The COCO json."""
    images: pathlib.Path | None = None
    """The folder of the images, or a zip of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class CocoSplit:
    """Encoded images, read from a disk one at a time, and their annotations.

    Images are read in any order and from any thread; worker processes, for which a split is
    pickled, open a zip for themselves.

    Attributes:
      annotations: of the images, in their order.
      files: the images, by the names that the reader knows.
      reader: reads them.
      json_file: the file that the annotations are from, for people.
    """

    annotations: Annotations
    files: Sequence[str]
    reader: Reader
    json_file: str

    def __len__(self) -> int:
        return len(self.files)

    def content(self, index: int) -> bytes:
        """Reads an encoded image.

        Raises:
          DataLost: it is not only this one that cannot be read.
          Exception: this one cannot be read.
        """
        return self.reader.read(self.files[index])

    def name_of(self, index: int) -> str:
        """Which image it is, for people."""
        return f"{self.files[index]} (id {self.annotations.image_ids[index]})"

    def with_objects(self) -> CocoSplit:
        """The same without the images in which there is no object but crowds."""
        kept = self.annotations.object_counts() > 0
        files = [self.files[index] for index in np.flatnonzero(kept).tolist()]
        return dataclasses.replace(self, annotations=self.annotations.of_images(kept), files=files)

    def without_slot(self, slots: int) -> str | None:
        """How many objects have none of an image's slots, for people; None if all have one."""
        counts = self.annotations.object_counts()
        more = np.maximum(counts - slots, 0)
        if not more.any():
            return None
        return (
            f"{count_of(int(more.sum()), 'object')} beyond {slots} in "
            f"{count_of(int((more > 0).sum()), 'image')} of {self.json_file}, drawn anew each time"
            f" (the most in one is {counts.max():,})"
        )

    def digest(self) -> str:
        """The same for the same images and annotations, wherever they lie.

        Of most images, their name and size stand for them.
        """
        known = dataclasses.replace(self.annotations, left_out=np.array([], np.str_))
        arrays = [getattr(known, field.name) for field in dataclasses.fields(known)]
        sizes = [str(self.reader.size(name)).encode() for name in self.files]
        some = (self._content_or_nothing(index) for index in evenly_spread(len(self)))
        return digest_of([*(np.ascontiguousarray(a).tobytes() for a in arrays), *sizes, *some])

    def _content_or_nothing(self, index: int) -> bytes:
        try:
            return self.content(index)
        except DataLost:
            raise
        except Exception:  # of any kind: a broken image is the same each time
            return b""


@dataclasses.dataclass(frozen=True, eq=False)
class CocoDataset:
    """A training and a held-out split over the same categories.

    Attributes:
      category_names: in the order of the labels, which begin at 1.
      left_out: what of the files is not used and why, a line for each kind.
    """

    train: CocoSplit
    val: CocoSplit
    category_names: tuple[str, ...]
    left_out: tuple[str, ...]

    def identity(self) -> dict[str, str | int]:
        """What tells this data from other data, by short names; where it lies is no part of it."""
        return {
            "categories": len(self.category_names),
            "category names": digest_of([json.dumps(self.category_names).encode()]),
            "training images": len(self.train),
            "training objects": len(self.train.annotations.labels),
            "training digest": self.train.digest(),
            "val images": len(self.val),
            "val objects": len(self.val.annotations.labels),
            "val digest": self.val.digest(),
        }


def load(
    source: str,
    *,
    masks: bool,
    empty_images: bool = True,
    train: Paths = Paths(),
    val: Paths = Paths(),
    cache: pathlib.Path | None = None,
) -> CocoDataset:
    """Finds a COCO data set and reads its annotations.

    Args:
      source: "coco:PATH", a folder or a zip with annotations/instances_train*.json and
        instances_val*.json, and beside annotations the images, in a folder of the json's name
        ("train2017") or one that begins as it does. All may lie one folder down.
      masks: whether the objects' masks are needed.
      empty_images: whether images in which there is no object, or only crowds, are trained on.
      train, val: parts that lie elsewhere.
      cache: the folder in which parsed annotations are kept; the user's, if not given.

    Raises:
      UserError: there is no such data set, or something is wrong with it.
    """
    kind, _, path = source.partition(":")
    if kind != "coco" or not path:
        raise UserError(f'--data must be "coco:PATH", got "{source}".')
    root = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
    cache = cache or _user_cache()
    tree = None
    if None in (train.annotations, train.images, val.annotations, val.images):
        tree = _Tree.open(root)
    trained = _split("train", train, tree, masks, cache)
    held_out = _split("val", val, tree, masks, cache)
    _check_same_categories(trained, held_out)
    left_out = tuple(
        f"{line} of {split.json_file}"
        for split in (trained, held_out)
        for line in split.annotations.left_out.tolist()
    )
    if trained.annotations.crowd.all():
        raise UserError(
            f'"{trained.json_file}" has no object to train on'
            + (f", but {'; '.join(trained.annotations.left_out.tolist())}" if left_out else "")
            + "; give annotations that have some."
        )
    if not empty_images:
        trained = trained.with_objects()
    names = tuple(trained.annotations.category_names.tolist())
    return CocoDataset(trained, held_out, names, left_out)


class _Tree(NamedTuple):
    """Files in a folder or a zip, by the folders that they are in and their own name."""

    root: pathlib.Path
    reader: Reader
    files: Mapping[Folder, str]

    @classmethod
    def open(cls, root: pathlib.Path) -> _Tree:
        reader: Reader
        if root.is_dir():
            reader = FolderReader(root)
            return cls(root, reader, {reader.parts(n): n for n in files_below(root)[0]})
        if not root.exists():
            raise UserError(f'there is no "{root}".')
        try:
            with zipfile.ZipFile(root) as archive:
                names = [info.filename for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
            raise UserError(
                f'"{root}" is neither a folder nor a zip file that can be read.'
            ) from None
        reader = ZipReader(root)
        return cls(root, reader, {parts_in_zip(name): name for name in names})


def _split(
    name: SplitName, paths: Paths, tree: _Tree | None, masks: bool, cache: pathlib.Path
) -> CocoSplit:
    above: Folder | None = None
    if paths.annotations is not None:
        json_file = paths.annotations
        if not json_file.is_file():
            raise UserError(f'there is no file "{json_file}" (--{name}-annotations).')
        content_of = json_file.read_bytes
        stamped = json_file
    else:
        assert tree is not None
        above, member = _json_in(tree, name)
        json_file = tree.root / member
        content_of = functools.partial(tree.reader.read, member)
        stamped = json_file if tree.root.is_dir() else tree.root
    found = _parsed_once(json_file, stamped, content_of, masks, cache)
    if paths.images is not None:
        return _with_files(found, _Tree.open(paths.images), (), str(json_file))
    assert tree is not None
    folder = _folder_of_images(tree, name, json_file.stem, above)
    return _with_files(found, tree, folder, str(json_file))


def _json_in(tree: _Tree, split: SplitName) -> tuple[Folder, str]:
    """The folder that a split's annotations/instances_*.json is below, and the json's name."""
    pattern = f"instances_{split}*.json"
    found = [
        parts
        for parts in tree.files
        if len(parts) in (2, 3)
        and parts[-2] == "annotations"
        and fnmatch.fnmatch(parts[-1], pattern)
    ]
    found = [parts for parts in found if len(parts) == min(map(len, found))]
    if not found:
        raise UserError(
            f'"{tree.root}" has no annotations/{pattern}; name the file with --{split}-annotations.'
        )
    if len(found) > 1:
        first, second, *_ = sorted("/".join(parts) for parts in found)
        raise UserError(
            f'"{tree.root}" has "{first}" and "{second}" for one split; say which with '
            f"--{split}-annotations."
        )
    return found[0][:-2], tree.files[found[0]]


def _folder_of_images(tree: _Tree, split: SplitName, stem: str, above: Folder | None) -> Folder:
    """The folder with a split's images: named as the json is, or the only one named as the split.

    Args:
      tree: where it is looked for.
      split: its name.
      stem: the json's name without its suffix.
      above: the folder that the folder of annotations is in, which comes first, if it is known.
    """
    folders = {parts[:depth] for parts in tree.files for depth in (1, 2) if len(parts) > depth}
    named = stem.removeprefix("instances_")
    for wanted in (
        [folder for folder in folders if folder[-1] == named],
        [folder for folder in folders if folder[-1].startswith(split)],
    ):
        beside = [folder for folder in wanted if folder[:-1] == above]
        if len(beside or wanted) == 1:
            return (beside or wanted)[0]
    raise UserError(
        f'"{tree.root}" has no folder "{named}", and not exactly one {split}*, with the images of '
        f'"{stem}.json"; name it with --{split}-images.'
    )


def _with_files(found: Annotations, images: _Tree, folder: Folder, json_file: str) -> CocoSplit:
    """The split whose images lie in a folder, or are named from the folder above."""
    files: list[str] = []
    missing: list[int] = []
    for number, name in enumerate(found.file_names.tolist()):
        parts = parts_in_zip(name)
        file = images.files.get(folder + parts) or images.files.get(folder[:-1] + parts)
        if file is None:
            missing.append(number)
        else:
            files.append(file)
    if missing:
        where = images.root.joinpath(*folder)
        raise UserError(
            f'{count_of(len(missing), "image")} of "{json_file}" cannot be found in "{where}", as '
            f'"{found.file_names[missing[0]]}" (id {found.image_ids[missing[0]]}); add what is '
            "missing, or take it out of the json."
        )
    return CocoSplit(found, files, images.reader, json_file)


def _parsed_once(
    json_file: pathlib.Path,
    stamped: pathlib.Path,
    content_of: Callable[[], bytes],
    masks: bool,
    cache: pathlib.Path,
) -> Annotations:
    """The annotations of a json, which is parsed the first time only.

    Args:
      json_file: its name, or that of a member of a zip as if the zip were a folder.
      stamped: the file whose size and time tell whether it is the same: itself, or the zip.
      content_of: reads it.
      masks: whether masks are needed.
      cache: the folder in which parsed annotations are kept.
    """
    status = stamped.stat()
    about = [json_file, status.st_size, status.st_mtime_ns, masks, _CACHE_FORMAT]
    kept = cache / f"{json_file.stem}-{digest_of([str(a).encode() for a in about])}.npz"

    def parsed() -> Annotations:
        try:
            content = content_of()
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f'"{json_file}" cannot be read: {reason(error)}.') from None
        return parse(content, str(json_file), masks=masks)

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{kept}.lock"):  # processes of one machine parse it once
            found = _kept(kept)
            if found is None:
                found = parsed()
                with replacing(kept) as temporary:
                    np.savez(temporary, **vars(found))
            return found
    except (OSError, NotImplementedError):  # no place to write to, or none with locks
        return parsed()


def _kept(path: pathlib.Path) -> Annotations | None:
    """Parsed annotations, or None where there are none, or the file is damaged."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return Annotations(**arrays)
    except Exception:  # of many kinds; a file that was cut short is written again
        return None


def _user_cache() -> pathlib.Path:
    """The folder for what can be computed again, by the conventions of freedesktop.org."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "drconv_jax"


def _check_same_categories(train: CocoSplit, val: CocoSplit) -> None:
    def pairs(split: CocoSplit) -> set[tuple[int, str]]:
        ids, names = split.annotations.category_ids, split.annotations.category_names
        return set(zip(ids.tolist(), names.tolist(), strict=True))

    if alone := pairs(train) ^ pairs(val):
        key, category = min(alone)
        split, other = (train, val) if (key, category) in pairs(train) else (val, train)
        raise UserError(
            f'"{split.json_file}" has the category {key}, "{category}", which '
            f'"{other.json_file}" has not; give both the same list of categories.'
        )
