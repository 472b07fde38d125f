"""Data sets of Hugging Face's `datasets` library."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.runtime.errors import UserError
from experiments.runtime.images import BrokenImageError
from experiments.runtime.sources.labels import check_range, numbered
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

_HELD_OUT = ("test", "val", "validation")


def hugging_face(source: str) -> Dataset:
    """A data set of the `datasets` library, by name or local path.

    Its first columns of types Image and ClassLabel are used, its split "train", and the first of
    "test", "val" and "validation" that has labels. Rows without a label (-1 or none) are left out.

    Raises:
      UserError: it cannot be loaded, or lacks any of these.
    """
    datasets = importlib.import_module("datasets")
    found = _loaded(datasets, source)
    held_out = [name for name in _HELD_OUT if name in found]
    if "train" not in found or not held_out:
        raise UserError(
            f'"{source}" must have a split "train" and one of {", ".join(_HELD_OUT)}, got '
            f"{', '.join(found)}."
        )
    left_out: list[str] = []
    image, label = (
        _column(source, found["train"].features, kind, left_out)
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    names = found["train"].features[label].names
    labels = {"train": _labels(source, found, "train", label, names)}
    for name in held_out:
        labels[name] = _labels(source, found, name, label, names)
    labelled = [name for name, values in labels.items() if (values >= 0).any()]
    for needed in (["train"], held_out):
        if not set(needed) & set(labelled):
            raise UserError(
                f'no row of "{source}" has a label in {", ".join(needed)} (all are -1 or none); '
                "a labelled split is needed."
            )
    used = next(name for name in held_out if name in labelled)
    if not isinstance(found[used].features.get(image), datasets.Image):
        raise UserError(f'the split "{used}" of "{source}" has no column {image} of type Image.')
    for name in held_out:
        if name != used:
            why = "" if name in labelled else ", which has no labels"
            left_out.append(f'the split "{name}"{why}, as "{used}" is held out')
    places = {}
    for name in ("train", used):
        places[name] = np.flatnonzero(labels[name] >= 0)
        if without := len(labels[name]) - len(places[name]):
            left_out.append(f'{count_of(without, "row")} without a label in the split "{name}"')
    kept = {"train": labels["train"][places["train"]], "test": labels[used][places[used]]}
    classes, kept = numbered(source, names, kept)
    train, test = (
        _column_split(datasets, found[name], image, name, places[name], kept[split], source)
        for split, name in (("train", "train"), ("test", used))
    )
    return Dataset(train, test, classes, left_out=tuple(left_out), flips=can_be_mirrored(classes))


def hugging_face_train(source: str) -> Labelled:
    """The split "train" of a data set as of `hugging_face`, which needs no other.

    Raises:
      UserError: it cannot be loaded, or has no such split or no labels.
    """
    datasets = importlib.import_module("datasets")
    found = _loaded(datasets, source, "train")
    if "train" not in found:
        raise UserError(f'"{source}" must have a split "train", got {", ".join(found)}.')
    left_out: list[str] = []
    rows = found["train"]
    image, label = (
        _column(source, rows.features, kind, left_out)
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    names = rows.features[label].names
    labels = _labels(source, found, "train", label, names)
    check_range(source, "train", labels[labels != -1], len(names))
    places = np.flatnonzero(labels >= 0)
    if without := len(labels) - len(places):
        left_out.append(f"{count_of(without, 'row')} without a label")
    if not len(places):
        raise UserError(f'no row of "{source}" has a label.')
    present, numbers = np.unique(labels[places], return_inverse=True)
    split = _column_split(datasets, rows, image, "train", places, numbers, source)
    return Labelled(split, numbers, tuple(names[n] for n in present), tuple(left_out))


def _column_split(
    datasets: Any,
    rows: Any,
    image: str,
    name: str,
    places: Int[np.ndarray, count],
    labels: Int[np.ndarray, count],
    source: str,
) -> _ColumnSplit:
    root = pathlib.Path(source) if os.path.isdir(source) else None
    encoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return _ColumnSplit(encoded, image, name, places, labels, root)


@dataclasses.dataclass(frozen=True)
class _ColumnSplit:
    """A column of images of a split, and the labels of those of its rows that have one.

    Attributes:
      rows, image: the split, and the column's name.
      split: its name.
      places, labels: which rows have a label, and which.
      root: the folder that it was loaded from, if it was one.
    """

    rows: Any
    image: str
    split: str
    places: Int[np.ndarray, count]
    labels: Int[np.ndarray, count]
    root: pathlib.Path | None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        image = self._image(index)
        content = image.get("bytes")
        if content is None:
            if not image.get("path"):
                raise BrokenImageError("the row has no image")
            content = read_file(pathlib.Path(image["path"]), self.root)
        return Sample(content, int(self.labels[index]))

    def name_of(self, index: int) -> str:
        try:
            path = self._image(index).get("path")
        except Exception:  # of many kinds; a row that cannot be read has a name all the same
            path = None
        return f"{self.split} row {self.places[index]}" + (f" ({path})" if path else "")

    def digest(self) -> str:
        sizes = (size.encode() for size in _sizes(self.rows, self.image))
        known = [self.places.tobytes(), self.labels.tobytes()]
        return digest_of(itertools.chain(known, sizes, some_contents(self)))

    def _image(self, index: int) -> dict[str, Any]:
        return self.rows[int(self.places[index])][self.image] or {}


def _loaded(datasets: Any, source: str, only: str | None = None) -> Any:
    """The splits of a data set; `only` is what one that has no splits is taken for."""
    try:
        try:
            found = datasets.load_from_disk(source) if os.path.isdir(source) else None
        except FileNotFoundError:  # a folder of files, not one that save_to_disk has written
            found = None
        found = datasets.load_dataset(source) if found is None else found
    except Exception as error:  # of many kinds, all about the source
        raise UserError(f'datasets cannot load "{source}": {error}') from None
    if only is not None and isinstance(found, datasets.Dataset):
        return {only: found}
    if not isinstance(found, datasets.DatasetDict):
        raise UserError(
            f'"{source}" is one split only; save a DatasetDict with "train" and one of '
            f"{', '.join(_HELD_OUT)}."
        )
    return found


def _column(source: str, features: Any, kind: Any, left_out: list[str]) -> str:
    """The first column of a type."""
    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if not columns:
        raise UserError(
            f'"{source}" has no column of type {kind.__name__}, but {", ".join(features)}.'
        )
    if columns[1:]:
        left_out.append(
            f"the columns {', '.join(columns[1:])}, as {columns[0]} is the first of type "
            f"{kind.__name__}"
        )
    return columns[0]


def _labels(source: str, found: Any, split: str, label: str, names: Sequence[str]) -> np.ndarray:
    """A split's labels as places in `names`, and -1 where a row has none."""
    feature = found[split].features.get(label)
    theirs = getattr(feature, "names", None)
    if theirs is None or set(theirs) != set(names):
        differing = sorted(set(theirs or ()) ^ set(names))
        raise UserError(
            f'the column {label} of "{source}" has not the same classes in "{split}" as in '
            f'"train": {", ".join(differing[:5])}{" ..." if differing[5:] else ""}.'
        )
    values = [-1 if value is None else value for value in found[split][label][:]]
    labels = np.array(values, np.int64)
    if theirs != names:
        within = (labels >= 0) & (labels < len(names))
        to_ours = np.array([names.index(name) for name in theirs])
        labels[within] = to_ours[labels[within]]
    return labels


def _sizes(rows: Any, image: str) -> Iterator[str]:
    """What tells each row's image from another without reading it: its size, in a file its name."""
    import pyarrow.compute

    for table in rows.with_format("arrow").iter(1000):
        for chunk in table.column(image).chunks:
            content, paths = (pyarrow.compute.struct_field(chunk, n) for n in ("bytes", "path"))
            sizes = pyarrow.compute.binary_length(content).to_pylist()
            for size, path in zip(sizes, paths.to_pylist(), strict=True):
                if size is None and path:
                    file = pathlib.Path(path)
                    size = f"{file.name} {file.stat().st_size if file.exists() else None}"
                yield str(size)
