"""Encoded images in ArrayRecord files, which are read fast from network storage."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.runtime.errors import DataLost, UserError, reason
from experiments.runtime.files import write_text
from experiments.runtime.images import BrokenImageError
from experiments.runtime.sources.labels import check_classes, check_range
from experiments.runtime.sources.splits import (
    Dataset,
    EncodedSplit,
    Sample,
    can_be_mirrored,
    digest_of,
    evenly_spread,
    some_contents,
)


def array_record(path: pathlib.Path) -> Dataset:
    """A folder of classes.json and {train,test}-*.arrayrecord, as experiments.convert writes it.

    Raises:
      UserError: it is not whole, or labels are not those of its classes.
    """
    try:
        classes = json.loads((path / "classes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f'"{path}" has no classes.json that can be read; python -m experiments.convert writes '
            "ArrayRecord folders."
        ) from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f'"{path / "classes.json"}" must be a list of the names of classes.')
    splits = {
        name: _RecordSplit(name, _files_of(path, name), len(classes)) for name in ("train", "test")
    }
    labels = {}
    for name, split in splits.items():
        labels[name] = split.some_labels()
        check_range(str(path), name, labels[name], len(classes))
    if all(len(labels[name]) == len(split) for name, split in splits.items()):
        check_classes(str(path), classes, labels)
    return Dataset(splits["train"], splits["test"], tuple(classes), flips=can_be_mirrored(classes))


def replace_records(
    splits: Mapping[str, EncodedSplit],
    classes: Sequence[str],
    folder: pathlib.Path,
    per_file: int,
    seed: int,
) -> Iterator[tuple[str, str | None]]:
    """Writes a folder that `array_record` reads, in place of the one that was there.

    Files are written elsewhere in the folder and are moved to their places when all of them are
    whole; until then the folder holds what it held. A sample that cannot be read is left out.

    Args:
      splits: what to write, by name.
      classes: names, in the order of the labels.
      folder: where to; it must be there.
      per_file: samples in a file.
      seed: of the order in which samples are written.

    Yields:
      For each sample, the split's name, and why it is left out, or None where it is written.

    Raises:
      DataLost: the samples cannot be read any more.
      OSError: the folder cannot be written to.
    """
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for name, split in splits.items():
            order = np.random.default_rng(seed).permutation(len(split)).tolist()
            for left_out in _write(split, unfinished / name, per_file, order):
                yield name, left_out
        # From here to the end, a folder without classes.json is none.
        (folder / "classes.json").unlink(missing_ok=True)
        for name in splits:
            for stale in folder.glob(f"{name}-*.arrayrecord"):
                stale.unlink()
        for file in unfinished.iterdir():
            file.rename(folder / file.name)
        write_text(folder / "classes.json", json.dumps(list(classes)) + "\n")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(
    split: EncodedSplit, stem: pathlib.Path, per_file: int, order: Sequence[int]
) -> Iterator[str | None]:
    """Writes STEM-00000-of-00004.arrayrecord and so on; for each sample, why it is left out."""
    from array_record.python.array_record_module import ArrayRecordWriter

    files = -(-len(order) // per_file)
    for file in range(files):
        path = stem.with_name(f"{stem.name}-{file:05d}-of-{files:05d}.arrayrecord")
        # Random access needs groups of one record.
        writer = ArrayRecordWriter(str(path), "group_size:1")
        try:
            for index in order[file * per_file : (file + 1) * per_file]:
                left_out = None
                try:
                    sample = split[index]
                except DataLost:
                    raise
                except Exception as error:  # of any kind
                    left_out = f"{split.name_of(index)}: {reason(error)}"
                else:
                    writer.write(_record_of(split.name_of(index), sample))
                yield left_out
        finally:
            writer.close()


def _record_of(name: str, sample: Sample) -> bytes:
    """A sample as a record: a line of JSON with its name and label, then the encoded image."""
    header = json.dumps({"name": name, "label": sample.label})
    return header.encode() + b"\n" + sample.content


class _RecordSplit:
    """ArrayRecord files of one split, whose labels are below a number of classes."""

    def __init__(self, name: str, files: Sequence[pathlib.Path], classes: int):
        from grain.sources import ArrayRecordDataSource

        self._name, self._classes = name, classes
        try:
            self._sizes = {file: file.stat().st_size for file in files}
            self._records = ArrayRecordDataSource([str(file) for file in files])
        except Exception as error:  # of the system's or of ArrayRecord's own kinds
            raise UserError(
                f'the files of "{files[0].parent}" cannot be read: {reason(error)}; write the '
                "folder anew with python -m experiments.convert."
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        header, content = self._parted(index)
        label = header.get("label")
        if type(label) is not int or not 0 <= label < self._classes:
            raise BrokenImageError(f"its label is {label}, and there are {self._classes} classes")
        return Sample(content, label)

    def name_of(self, index: int) -> str:
        try:
            return str(self._parted(index)[0]["name"])
        except Exception:  # a damaged record has a name no more
            return f"{self._name} record {index}"

    def digest(self) -> str:
        files = [f"{file.name} {size}".encode() for file, size in self._sizes.items()]
        return digest_of([*files, str(len(self)).encode(), *some_contents(self)])

    def some_labels(self) -> np.ndarray:
        """The labels of some records, evenly spread, or of all if they are few.

        Raises:
          UserError: one of them is no number.
        """
        labels = []
        for index in evenly_spread(len(self)):
            try:
                header, _ = self._parted(index)
            except (DataLost, BrokenImageError):  # a matter for the run, which may skip it
                continue
            label = header.get("label")
            if type(label) is not int:
                raise UserError(
                    f'the label of "{self.name_of(index)}" in the {self._name} split is {label!r}, '
                    "not a whole number."
                )
            labels.append(label)
        return np.array(labels, np.int64)

    def _parted(self, index: int) -> tuple[dict[str, Any], bytes]:
        try:
            record = self._records[index]
        except Exception as error:  # of ArrayRecord's own kinds
            self._check_files()
            raise BrokenImageError(f"its record is damaged: {reason(error)}") from None
        header, _, content = record.partition(b"\n")
        try:
            values = json.loads(header)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            self._check_files()
            raise BrokenImageError("its record does not begin with a line of JSON")
        return values, content

    def _check_files(self) -> None:
        """Raises DataLost if a file is not what it was."""
        for file, size in self._sizes.items():
            try:
                now = file.stat().st_size
            except OSError as error:
                raise DataLost(f'"{file}" cannot be read any more: {reason(error)}') from None
            if now != size:
                raise DataLost(f'"{file}" is not the file any more that it was')


def _files_of(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The files of a split, if they are all there.

    Raises:
      UserError: there is none, or one of the number that their names tell is missing.
    """
    files = sorted(folder.glob(f"{split}-*.arrayrecord"))
    if not files:
        raise UserError(f'"{folder}" has no {split}-*.arrayrecord.')
    told = [re.fullmatch(r".+-(\d+)-of-(\d+)\.arrayrecord", file.name) for file in files]
    if not any(told):  # by whom ever they were written
        return files
    counts = {match[2] if match else file.name for match, file in zip(told, files, strict=True)}
    if len(counts) > 1:
        raise UserError(
            f'the {split}-*.arrayrecord in "{folder}" are of several sets ("{files[0].name}", '
            f'"{files[-1].name}"); take out those that are not wanted, or convert again.'
        )
    here = {int(match[1]) for match in told if match}
    if missing := set(range(int(counts.pop()))) - here:
        raise UserError(
            f'"{folder}" has no {split}-{min(missing):05d}-of-{len(here | missing):05d}'
            ".arrayrecord; copy it there, or convert again."
        )
    return files
