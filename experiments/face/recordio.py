"""InsightFace's training sets, train.rec and train.idx (MXNet's RecordIO), without MXNet.

A .rec holds records, each of which begins at a multiple of 4 bytes. All numbers are little-endian:

    magic word      0xced7230a
    part, length    3 and 29 bits of one word; of the data that follow
    data            then zeros up to a multiple of 4 bytes

Where the magic word occurs in a record's data, at a multiple of 4 bytes, the record is split there
into parts, without the word; `part` tells the first, those between, and the last. A record's data
begin with a header of flag, label, id and id2 (uint32, float32, uint64, uint64). If flag is not 0,
so many float32 labels follow, which take the place of the one. The rest is an encoded image.

Record 0 has no image but two labels: images are the records from 1 to before the first label, and
identity records those from there to before the second. An identity record has two labels too: the
images of one identity are the records from the first to before the second. The .idx is text, a line
for each record: its key, and the byte at which it begins.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import struct
import weakref
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int64, UInt32

from experiments.runtime.errors import DataLost, UserError, reason
from experiments.runtime.images import BrokenImageError
from experiments.runtime.sources.splits import Sample, digest_of, some_contents

_MAGIC = 0xCED7230A
_WHOLE, _FIRST, _BETWEEN, _LAST = range(4)  # parts of a record
_HEADER = struct.Struct("<IfQQ")
_WORD = 4  # bytes
# Up to here every whole number is a float32; beyond, the keys in ranges are rounded.
_EXACT = 2**24
_ANEW = "copy the .rec and its .idx anew"


class RecordFile:
    """A .rec, whose records are read in any order, from any thread.

    Worker processes, for which it is pickled, open it for themselves.

    Attributes:
      path: the file.
      size: its bytes.

    Raises:
      DataLost: it cannot be opened.
    """

    def __init__(self, path: pathlib.Path, size: int | None = None):
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataLost(f'"{path}" cannot be read: {reason(error)}') from None
        weakref.finalize(self, os.close, self._descriptor)
        self.path = path
        self.size = self._size_now() if size is None else size

    def record(self, offset: int) -> bytes:
        """The data of the record that begins at a byte, with all of its parts.

        Raises:
          BrokenImageError: no whole record begins there.
          DataLost: the file cannot be read any more, or is another.
        """
        parts = []
        possible = (_WHOLE, _FIRST)
        while True:
            magic, word = struct.unpack("<II", self._read(offset, 2 * _WORD))
            part, length = word >> 29, word & (2**29 - 1)
            if magic != _MAGIC or part not in possible:
                self._check_size()
                raise BrokenImageError(f'"{self.path}" has no record at byte {offset:,}')
            parts.append(self._read(offset + 2 * _WORD, length))
            if part in (_WHOLE, _LAST):
                return _MAGIC.to_bytes(_WORD, "little").join(parts)
            offset += 2 * _WORD + length + -length % _WORD
            possible = (_BETWEEN, _LAST)

    def _read(self, begin: int, count: int) -> bytes:
        try:
            found = os.pread(self._descriptor, count, begin)
        except OSError as error:
            raise DataLost(f'"{self.path}" cannot be read any more: {reason(error)}') from None
        if len(found) < count:
            self._check_size()
            raise BrokenImageError(
                f'"{self.path}" is cut: it ends at byte {self.size:,}, in the midst of a record'
            )
        return found

    def _check_size(self) -> None:
        if self._size_now() != self.size:
            raise DataLost(f'"{self.path}" is not the file any more that it was')

    def _size_now(self) -> int:
        return os.fstat(self._descriptor).st_size

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordFile, (self.path, self.size)


@dataclasses.dataclass(frozen=True, eq=False)
class FaceRecords:
    """The encoded images of a .rec and whose they are; an `EncodedSplit`.

    Attributes:
      file: the .rec.
      keys, offsets: of the images' records: their numbers, ascending, and where they begin.
      labels: of the images, from 0 to identities - 1.
      identities: what the file itself has for each label, ascending.
    """

    file: RecordFile
    keys: Int64[np.ndarray, count]
    offsets: Int64[np.ndarray, count]
    labels: Int64[np.ndarray, count]
    identities: Int64[np.ndarray, identities]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        """Reads an image.

        Raises:
          BrokenImageError: its record is damaged.
          DataLost: the file cannot be read any more, or is another.
        """
        record = self.file.record(int(self.offsets[index]))
        flag = int.from_bytes(record[:_WORD], "little")
        content = record[_HEADER.size + _WORD * flag :]
        if not content:
            raise BrokenImageError("its record holds no image")
        return Sample(content, int(self.labels[index]))

    def name_of(self, index: int) -> str:
        """Which image it is, for people."""
        return f"record {self.keys[index]} of {self.file.path}"

    def digest(self) -> str:
        """The same for the same images and labels, wherever they lie.

        Of most images, the place in the file stands for them.
        """
        return digest_of([self.offsets.tobytes(), self.labels.tobytes(), *some_contents(self)])


def record_io(path: pathlib.Path) -> FaceRecords:
    """A folder of train.rec and train.idx, or another .rec with an .idx beside it.

    Whose an image is comes from the identity records, of each of which only the first image's
    header is read; for images in none of them, from the images' own headers. A set without the
    record 0 that tells of identity records is images only.

    Raises:
      UserError: a file is missing, cut or none of its kind, or they do not belong together.
      DataLost: a file cannot be read.
    """
    rec = path / "train.rec" if path.is_dir() else path
    idx = rec.with_suffix(".idx")
    if not rec.is_file():
        raise UserError(f'there is no "{rec}"; give a folder of train.rec and train.idx.')
    if not idx.is_file():
        raise UserError(
            f'there is no "{idx}", which tells where the records of "{rec}" begin; copy it there, '
            "or write it with MXNet's rec2idx.py."
        )
    records = _Records.of(RecordFile(rec), idx)
    places, labels = _labelled_images(records)
    if not len(places):
        raise UserError(f'"{rec}" has no image in any of the records that "{idx}" tells of.')
    wrong = np.flatnonzero(~(labels >= 0) | (labels != np.floor(labels)) | np.isinf(labels))
    if len(wrong):
        raise UserError(
            f"the label of {records.name_of(places[wrong[0]])} is {labels[wrong[0]]}, but must be "
            "the number of an identity; write the file anew."
        )
    identities, labels = np.unique(labels.astype(np.int64), return_inverse=True)
    return FaceRecords(
        records.file, records.keys[places], records.offsets[places], labels, identities
    )


class _Headers(NamedTuple):
    """What the headers of some records tell.

    Attributes:
      label: the only label, or the first.
      next_label: the one behind it in a record of two or more labels.
      labels: how many follow the header.
      holds_image: whether there is more than labels.
    """

    label: Float[np.ndarray, count]
    next_label: Float[np.ndarray, count]
    labels: UInt32[np.ndarray, count]
    holds_image: Bool[np.ndarray, count]


@dataclasses.dataclass(frozen=True, eq=False)
class _Records:
    """All records of a .rec, as its .idx tells.

    Attributes:
      file, idx: the .rec, and the .idx for people.
      keys, offsets: the records' numbers, ascending, and where they begin.
    """

    file: RecordFile
    idx: pathlib.Path
    keys: Int64[np.ndarray, count]
    offsets: Int64[np.ndarray, count]

    @staticmethod
    def of(file: RecordFile, idx: pathlib.Path) -> _Records:
        """Reads an .idx, and refuses one that cannot be this file's, and a file that is cut.

        Raises:
          UserError: as said.
        """
        records = _Records(file, idx, *_read_idx(idx))
        magic = int(records.words[0]) if len(records.words) else None
        if magic != _MAGIC:
            begin = "is empty" if magic is None else f"begins with {magic:#010x}"
            raise UserError(
                f'"{file.path}" is no RecordIO file: it {begin}, not with {_MAGIC:#x}; {_ANEW}.'
            )
        smallest = 2 * _WORD + _HEADER.size
        beyond = np.flatnonzero(records.offsets > file.size - smallest)
        if len(beyond):
            raise UserError(
                f'"{file.path}" ends at byte {file.size:,}, but "{idx}" has '
                f"{records.name_of(beyond[0])}: the .rec is cut, or the .idx is another's; {_ANEW}."
            )
        last = int(np.argmax(records.offsets))
        try:
            file.record(int(records.offsets[last]))
        except BrokenImageError as error:
            raise UserError(f"{error} ({records.name_of(last)}); {_ANEW}.") from None
        return records

    @functools.cached_property
    def words(self) -> UInt32[np.ndarray, words]:
        """The file, of which only what is looked at is read."""
        count = self.file.size // _WORD
        if not count:  # which cannot be mapped
            return np.empty(0, np.uint32)
        return np.asarray(np.memmap(self.file.path, "<u4", "r", shape=count))

    def name_of(self, place: int) -> str:
        """Which record it is, for people."""
        return f"record {self.keys[place]} at byte {self.offsets[place]:,}"

    def headers(self, places: Int[np.ndarray, some]) -> _Headers:
        """Looks at the headers of some records.

        Raises:
          UserError: there is no record where the .idx says.
        """
        at = self.offsets[places] // _WORD
        wrong = np.flatnonzero((self.words[at] != _MAGIC) | (self.offsets[places] % _WORD > 0))
        if len(wrong):
            raise UserError(
                f'"{self.file.path}" has no {self.name_of(places[wrong[0]])}, where "{self.idx}" '
                f"says it is: the .rec is damaged, or the .idx is another's; {_ANEW}."
            )
        whole = self.words[at + 1] >> 29 == _WHOLE
        length, labels = self.words[at + 1] & (2**29 - 1), self.words[at + 2]
        holds_image = ~whole | (length > _HEADER.size + _WORD * labels.astype(np.int64))
        behind = at + (2 * _WORD + _HEADER.size) // _WORD  # where labels are, if any
        first, second = (
            self.words[np.minimum(behind + i, len(self.words) - 1)].view("<f4") for i in range(2)
        )
        label = np.where(labels > 0, first, self.words[at + 3].view("<f4"))
        return _Headers(label, second, labels, holds_image)


def _read_idx(idx: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The keys, ascending, and the offsets of an .idx."""
    try:
        numbers = np.fromstring(idx.read_bytes(), np.int64, sep=" ")
    except OSError as error:
        raise DataLost(f'"{idx}" cannot be read: {reason(error)}') from None
    except ValueError:
        numbers = np.empty(0, np.int64)
    if not len(numbers) or len(numbers) % 2 or numbers.min() < 0:
        raise UserError(
            f'"{idx}" is no index of a .rec, lines of a key and a byte; copy it anew, or write it '
            "with MXNet's rec2idx.py."
        )
    keys, offsets = numbers.reshape(-1, 2).T
    order = np.argsort(keys, kind="stable")
    keys, offsets = keys[order], offsets[order]
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        raise UserError(f'"{idx}" has record {twice[0]} twice; {_ANEW}.')
    return keys, offsets


def _labelled_images(
    records: _Records,
) -> tuple[Int[np.ndarray, count], Float[np.ndarray, count]]:
    """The places of the records that are images, and their labels in the file."""
    everything = np.arange(len(records.keys))
    first = records.headers(everything[:1])
    has_identities = records.keys[0] == 0 and first.labels[0] == 2 and not first.holds_image[0]
    if not has_identities or first.next_label[0] > _EXACT:
        headers = records.headers(everything)
        return everything[headers.holds_image], headers.label[headers.holds_image]
    behind, end = np.searchsorted(records.keys, [first.label[0], first.next_label[0]])
    places = everything[1:behind]
    ranges = _ranges(records, everything[behind:end])
    ranges = np.searchsorted(records.keys[places], ranges)
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    labels = np.full(len(places), np.nan, np.float32)
    of_identities = records.headers(places[ranges[:, 0]]).label
    for (begin, end), label in zip(ranges.tolist(), of_identities.tolist(), strict=True):
        labels[begin:end] = label
    others = np.flatnonzero(np.isnan(labels))
    labels[others] = records.headers(places[others]).label
    return places, labels


def _ranges(records: _Records, places: Int[np.ndarray, some]) -> Float[np.ndarray, "some 2"]:
    """The keys at which the images of identity records begin and end, ascending."""
    headers = records.headers(places)
    ranges = np.stack([headers.label, headers.next_label], axis=1)
    order = np.argsort(ranges[:, 0], kind="stable")
    places, ranges = places[order], ranges[order]
    wrong = (headers.labels[order] != 2) | ~(ranges[:, 0] <= ranges[:, 1])
    wrong[1:] |= ~(ranges[:-1, 1] <= ranges[1:, 0])
    if wrong.any():
        place = places[np.argmax(wrong)]
        raise UserError(
            f'{records.name_of(place)} of "{records.file.path}" must tell which images are of one '
            f"identity and of no other; {_ANEW}."
        )
    return ranges
