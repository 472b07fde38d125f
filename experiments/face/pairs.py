"""Pairs of images that are to be told to be of the same person or not: pairs.txt and .bin."""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pathlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from experiments.runtime.errors import UserError, reason
from experiments.runtime.sources.splits import count_of

_FOLDS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of images.

    Attributes:
      first, second: the images of each pair, by their places in a list of images.
      same: whether they are of one person.
      folds: which fold each pair belongs to, from 0.
    """

    first: Int[np.ndarray, pairs]
    second: Int[np.ndarray, pairs]
    same: Bool[np.ndarray, pairs]
    folds: Int[np.ndarray, pairs]


def lfw_pairs(content: bytes, where: str, names: Sequence[str]) -> Pairs:
    """Reads a list of pairs as that of Labeled Faces in the Wild, pairs.txt.

    A line is "NAME i j" for two images of one person, or "NAME i OTHER j" for two people, separated
    by tabs or, where there are none, by blanks. Image i of NAME is the file NAME/NAME_000i with any
    suffix, in any folder. The first line may tell "folds n": each fold has n pairs of one person
    and n of two, one fold behind the other. With "n" alone, or without such a line, ten folds have
    each their consecutive share of the pairs of one person, and of those of two, which for LFW's
    own order are the same folds.

    Args:
      content: of the file.
      where: the file, for errors.
      names: of the images that there are, paths with slashes.

    Returns:
      Pairs of places in `names`.

    Raises:
      UserError: the file is none of these, or names what is not among the images.
    """
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f'"{where}" is no list of pairs, but no text at all.') from None
    numbered = [(i, _fields(line)) for i, line in enumerate(lines, 1) if line.strip()]
    header = numbered.pop(0)[1] if numbered and len(numbered[0][1]) < 3 else []
    images = _Images(names)
    first, second, same = [], [], []
    for number, fields in numbered:
        try:
            one, other = _pair(fields)
            first.append(images.place(*one))
            second.append(images.place(*other))
        except ValueError as error:
            raise UserError(f'line {number} of "{where}": {error}.') from None
        same.append(len(fields) == 3)
    if not same:
        raise UserError(f'"{where}" has no pairs.')
    return Pairs(
        np.array(first), np.array(second), np.array(same), _folds(header, np.array(same), where)
    )


def bin_pairs(content: bytes, where: str) -> tuple[list[bytes], Pairs]:
    """Reads a .bin of InsightFace: a pickle of a list of encoded images and one of bools.

    Images 2i and 2i + 1 are pair i. The ten folds are consecutive and as equal as can be, as
    InsightFace takes them. A pickle that Python 2 wrote is read too. Nothing but lists, tuples,
    bytes, strings, numbers and bools is made of it: what would run code is refused.

    Args:
      content: of the file.
      where: the file, for errors.

    Returns:
      The encoded images, and pairs of places in them.

    Raises:
      UserError: it is no such file.
    """
    try:
        found = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _ForeignObjectError as error:
        raise UserError(
            f'"{where}" holds {error}, which could run a program when it is read, and is refused; '
            "get the file from where you trust it."
        ) from None
    except Exception as error:  # of many kinds
        raise UserError(f'"{where}" is no .bin of pairs: {reason(error)}; copy it anew.') from None
    if not (_is_list(found) and len(found) == 2 and all(map(_is_list, found))):
        raise UserError(f'"{where}" is no .bin of pairs, a list of images and one of bools.')
    images, same = found
    if len(images) != 2 * len(same):
        raise UserError(
            f'"{where}" has {count_of(len(images), "image")} for {count_of(len(same), "pair")}, '
            "but must have two for each; write it anew."
        )
    if not same:
        raise UserError(f'"{where}" has no pairs.')
    for kind, values, fits in (("images", images, _is_bytes), ("bools", same, _is_bool)):
        wrong = next((i for i, value in enumerate(values) if not fits(value)), None)
        if wrong is not None:
            raise UserError(
                f'number {wrong} of the {kind} in "{where}" is a {type(values[wrong]).__name__}; '
                "write it anew."
            )
    places = np.arange(len(images)).reshape(-1, 2)
    folds = _consecutive(len(same))
    return list(images), Pairs(places[:, 0], places[:, 1], np.array(same, bool), folds)


class _Images:
    """Finds images by their person and number."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._places: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
        for place, name in enumerate(names):
            path = pathlib.PurePosixPath(name)
            self._places[path.parent.name, path.stem].append(place)
        self._people = {person for person, _ in self._places}

    def place(self, person: str, number: int) -> int:
        """The place of an image; raises ValueError with a sentence where there is none."""
        name = f"{person}_{number:04d}"
        found = self._places.get((person, name), [])
        if len(found) == 1:
            return found[0]
        if found:
            one, other = (self._names[place] for place in found[:2])
            raise ValueError(f'"{name}" could be "{one}" or "{other}"; take one of them out')
        if person not in self._people:
            raise ValueError(f'there is no person "{person}" among the images')
        raise ValueError(f'"{person}" has no image {number} ("{name}") among the images')


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.strip().split("\t" if "\t" in line else None)]


def _pair(fields: list[str]) -> tuple[tuple[str, int], tuple[str, int]]:
    """Two people and the numbers of their images; raises ValueError with a sentence."""
    if len(fields) in (3, 4):
        one, i, *others, j = fields
        if i.isdecimal() and j.isdecimal():
            if others == [one]:
                raise ValueError(f'it is a pair of two people, both of which are "{one}"')
            (other,) = others or [one]
            return (one, int(i)), (other, int(j))
    raise ValueError(f'it must be "NAME i j" or "NAME i OTHER j", got "{" ".join(fields)}"')


def _folds(header: list[str], same: Bool[np.ndarray, pairs], where: str) -> np.ndarray:
    """The folds of pairs in their order, by what the first line tells."""
    if not all(field.isdecimal() and int(field) > 0 for field in header):
        raise UserError(
            f'the first line of "{where}" must tell how many folds and pairs of a kind, as '
            f'"10 300", or be a pair, got "{" ".join(header)}".'
        )
    counts = [int(field) for field in header]
    if counts and len(same) != 2 * math.prod(counts):
        raise UserError(
            f'"{where}" must have {2 * math.prod(counts):,} pairs by its first line, '
            f'"{" ".join(header)}", but has {len(same):,}; copy it anew.'
        )
    if len(counts) == 2:
        return np.arange(len(same)) // (2 * counts[1])
    shares = np.empty(len(same), np.int64)
    for kind in (same, ~same):
        shares[kind] = _consecutive(int(kind.sum()))
    return shares


def _consecutive(count: int) -> Int[np.ndarray, count]:
    """Ten folds, one behind the other; the first have one more where they cannot be equal."""
    sizes = count // _FOLDS + (np.arange(_FOLDS) < count % _FOLDS)
    return np.repeat(np.arange(_FOLDS), sizes)


class _ForeignObjectError(Exception):
    """A pickle holds something else than plain values; the message names it."""


class _PlainUnpickler(pickle.Unpickler):
    """Makes lists, tuples, dicts, sets, bytes, strings, numbers and bools, and calls nothing."""

    def find_class(self, module: str, name: str) -> Callable[[Any, Any], bytes]:
        """Called for each function and class that the pickle names.

        Python 3 writes bytes for Python 2 (protocols 0 to 2) as a call of `_codecs.encode` with a
        string and "latin1". What stands in its place does nothing else.
        """
        if (module, name) == ("_codecs", "encode"):
            return _from_latin1
        raise _ForeignObjectError(f"a foreign object, {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Called for each object that the pickle does not hold itself."""
        raise _ForeignObjectError("a reference to a foreign object")


def _from_latin1(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _ForeignObjectError("a foreign object, _codecs.encode of no text in latin1")
    return text.encode("latin1")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, bytes)


def _is_bool(value: Any) -> bool:
    return isinstance(value, int) and value in (0, 1)  # Python 2 may have written numbers
