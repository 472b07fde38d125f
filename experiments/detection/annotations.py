"""The images and objects of a COCO json, checked and held in arrays."""

from __future__ import annotations

import collections
import dataclasses
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt8

from experiments.detection import rle
from experiments.runtime.errors import UserError

# Pixels from the corner of an image beyond which no point of an object can be meant.
_FARTHEST = 1e6
# Whole numbers up to it are exact in float64.
_LARGEST = 2**53
# Annotations of a kind that are named one by one.
_NAMED = 5


class Objects(NamedTuple):
    """The objects of one image.

    Attributes:
      boxes: x, y, width, height in pixels, as the json has them.
      labels: from 1, in the order of the categories' ids.
      crowd: whether it is a region of many objects, which are not told apart.
      masks: COCO's run-length codes, one an object; none where masks were not asked for.
    """

    boxes: Float64[np.ndarray, "objects 4"]
    labels: Int32[np.ndarray, objects]
    crowd: Bool[np.ndarray, objects]
    masks: list[bytes]


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """What a COCO json tells of N images and M objects.

    Attributes:
      image_ids, file_names, heights, widths: of the images, in the file's order.
      first: the objects of image i are first[i] to first[i + 1] - 1, in the file's order.
      boxes: x, y, width, height in pixels.
      labels: from 1, in the order of the categories' ids.
      areas: in pixels, as the file has them, or the mask's (without masks, the box's).
      crowd: whether an object is a region of many, which are not told apart.
      codes: run-length codes of all masks, one behind the other; empty without masks.
      first_code: the code of object j is codes[first_code[j] : first_code[j + 1]].
      category_ids, category_names: in the order of the ids, which may have gaps.
      left_out: the annotations that are left out and why, a line for each kind.
    """

    image_ids: Int64[np.ndarray, N]
    file_names: np.ndarray
    heights: Int64[np.ndarray, N]
    widths: Int64[np.ndarray, N]
    first: Int64[np.ndarray, N + 1]
    boxes: Float64[np.ndarray, "M 4"]
    labels: Int32[np.ndarray, M]
    areas: Float64[np.ndarray, M]
    crowd: Bool[np.ndarray, M]
    codes: UInt8[np.ndarray, characters]
    first_code: Int64[np.ndarray, M + 1]
    category_ids: Int64[np.ndarray, K]
    category_names: np.ndarray
    left_out: np.ndarray

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.image_ids)

    @property
    def has_masks(self) -> bool:
        """Whether masks were asked for; a file without objects has none either way."""
        return len(self.codes) > 0

    def objects(self, image: int) -> Objects:
        """Those of the image at a place in the file."""
        mine = slice(self.first[image], self.first[image + 1])
        codes = [self.code(j) for j in range(mine.start, mine.stop)] if self.has_masks else []
        return Objects(self.boxes[mine], self.labels[mine], self.crowd[mine], codes)

    def code(self, number: int) -> bytes:
        """The run-length code of an object's mask."""
        return self.codes[self.first_code[number] : self.first_code[number + 1]].tobytes()

    def object_counts(self) -> Int64[np.ndarray, N]:
        """How many objects each image has, crowds not counted."""
        image = np.repeat(np.arange(len(self)), np.diff(self.first))
        return np.bincount(image[~self.crowd], minlength=len(self))

    def of_images(self, kept: Bool[np.ndarray, N]) -> Annotations:
        """The same without the images that are not kept, and their objects."""
        objects = np.repeat(kept, np.diff(self.first))
        lengths = np.diff(self.first_code)
        return dataclasses.replace(
            self,
            image_ids=self.image_ids[kept],
            file_names=self.file_names[kept],
            heights=self.heights[kept],
            widths=self.widths[kept],
            first=_offsets(np.diff(self.first)[kept]),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            areas=self.areas[objects],
            crowd=self.crowd[objects],
            codes=self.codes[np.repeat(objects, lengths)],
            first_code=_offsets(lengths[objects]),
        )


def parse(content: bytes, where: str, *, masks: bool) -> Annotations:
    """Reads a COCO json of objects.

    What is wrong with the file as a whole, or what a program that wrote one annotation so will have
    done to all, is an error. A single annotation that cannot be used is left out and named.

    Args:
      content: of the file.
      where: its name, for errors.
      masks: whether the objects' masks are needed.

    Raises:
      UserError: it is not JSON, or no COCO json of objects; ids that nothing defines, or twice; a
        mask of another size than its image, or a box in its place; no masks.
    """
    document = _document(content, where)
    images = _Images.read(document["images"], where)
    category_ids, names = _categories(document["categories"], where)
    label_of = {number: label for label, number in enumerate(category_ids, 1)}
    place_of = {number: place for place, number in enumerate(images.ids)}
    faults: dict[str, list[Any]] = collections.defaultdict(list)
    rows: list[tuple[int, int, float, bool]] = []
    boxes: list[list[float]] = []
    codes: list[bytes] = []
    for number, annotation in enumerate(document["annotations"]):
        title = _title("annotation", number, annotation, where)
        image = _defined(annotation, "image", place_of, title)
        label = _defined(annotation, "category", label_of, title)
        height, width = images.heights[image], images.widths[image]
        code = b""
        try:
            box = _box(annotation.get("bbox"), height, width)
            if masks:
                code = _mask(annotation.get("segmentation"), height, width, title)
        except _Fault as fault:
            faults[str(fault)].append(annotation.get("id", number))
            continue
        area = annotation.get("area")
        if not _is_number(area):
            area = rle.run_lengths(code)[1::2].sum() if masks else box[2] * box[3]
        rows.append((image, label, float(area), bool(annotation.get("iscrowd", 0))))
        boxes.append(box)
        codes.append(code)
    if len(faults.get(_NO_MASK, ())) == len(document["annotations"]) > 0:
        raise UserError(
            f'no annotation of "{where}" has a mask (a "segmentation"); train a detector of boxes, '
            "or give a file that has them."
        )
    order = np.argsort([row[0] for row in rows], kind="stable")
    return Annotations(
        image_ids=np.array(images.ids, np.int64),
        file_names=np.array(images.files, np.str_),
        heights=np.array(images.heights, np.int64),
        widths=np.array(images.widths, np.int64),
        first=_offsets(np.bincount([row[0] for row in rows], minlength=len(images.ids))),
        boxes=np.array(boxes, np.float64).reshape(-1, 4)[order],
        labels=np.array([row[1] for row in rows], np.int32)[order],
        areas=np.array([row[2] for row in rows], np.float64)[order],
        crowd=np.array([row[3] for row in rows], np.bool_)[order],
        codes=np.frombuffer(b"".join(codes[j] for j in order), np.uint8),
        first_code=_offsets(np.array([len(codes[j]) for j in order], np.int64)),
        category_ids=np.array(category_ids, np.int64),
        category_names=np.array(names, np.str_),
        left_out=np.array([_line(fault, ids) for fault, ids in sorted(faults.items())], np.str_),
    )


class _Fault(Exception):
    """Why an annotation is left out, as "with a box of no size"."""


_NO_MASK = "without a mask"


def _document(content: bytes, where: str) -> Mapping[str, list[Any]]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f'"{where}" is not JSON, or damaged: {error}.') from None
    needed = ("images", "annotations", "categories")
    if not isinstance(document, dict):
        raise UserError(
            f'"{where}" is no COCO json of objects: it holds no lists "images", "annotations" and '
            f'"categories", but is a {type(document).__name__} (results of a detector are a list).'
        )
    for name in needed:
        if not isinstance(document.get(name), list):
            raise UserError(
                f'"{where}" is no COCO json of objects: it has no list "{name}", but '
                f"{', '.join(map(reprlib.repr, document)) or 'nothing'}."
            )
    for name in ("images", "categories"):
        if not document[name]:
            raise UserError(f'the list "{name}" of "{where}" is empty; give a file that has some.')
    annotations = document["annotations"]
    if annotations and all(isinstance(a, dict) and "category_id" not in a for a in annotations):
        raise UserError(
            f'"{where}" is no COCO json of objects: its annotations have no "category_id", but '
            f"{', '.join(map(reprlib.repr, annotations[0]))}; give one of the files instances_*."
        )
    return document


class _Images(NamedTuple):
    ids: list[int]
    files: list[str]
    heights: list[int]
    widths: list[int]

    @classmethod
    def read(cls, images: Sequence[Any], where: str) -> _Images:
        found = cls([], [], [], [])
        for number, image in enumerate(images):
            title = _title("image", number, image, where)
            found.ids.append(_whole(image, "id", title))
            if not isinstance(image.get("file_name"), str) or not image["file_name"]:
                raise UserError(f'{title} has no "file_name"; every image needs one.')
            found.files.append(image["file_name"])
            for sizes, name in ((found.heights, "height"), (found.widths, "width")):
                sizes.append(_whole(image, name, title))
                if sizes[-1] < 1:
                    raise UserError(f'{title} has the "{name}" {sizes[-1]}; it must be at least 1.')
        _check_unique(found.ids, "images", where)
        return found


def _categories(categories: Sequence[Any], where: str) -> tuple[list[int], list[str]]:
    pairs = []
    for number, category in enumerate(categories):
        title = _title("category", number, category, where)
        key = _whole(category, "id", title)
        pairs.append((key, str(category.get("name", key))))
    _check_unique([key for key, _ in pairs], "categories", where)
    pairs.sort()
    return [key for key, _ in pairs], [name for _, name in pairs]


def _title(kind: str, number: int, entry: Any, where: str) -> str:
    """Which image, category or annotation it is, for errors."""
    if not isinstance(entry, dict):
        raise UserError(f'{kind} number {number} of "{where}" is no object of JSON; mend the file.')
    return f'{kind} {reprlib.repr(entry.get("id", f"number {number}"))} of "{where}"'


def _whole(entry: Mapping[str, Any], name: str, title: str) -> int:
    value: Any = entry.get(name)
    if not _is_number(value) or value != int(value):
        raise UserError(f'{title} has the "{name}" {value!r}; it must be a whole number.')
    return int(value)


def _check_unique(ids: Sequence[int], name: str, where: str) -> None:
    (key, count), *_ = collections.Counter(ids).most_common(1)
    if count > 1:
        raise UserError(f'{count} {name} of "{where}" have the id {key}; give each its own.')


def _defined(entry: Mapping[str, Any], kind: str, known: Mapping[int, int], title: str) -> int:
    """The place of the image or category that an annotation names."""
    key: Any = entry.get(f"{kind}_id")
    if not _is_number(key) or key not in known:
        plural = {"image": "images", "category": "categories"}[kind]
        raise UserError(
            f'{title} has the {kind}_id {reprlib.repr(key)}, which none of its "{plural}" has; add '
            f"the {kind} or take the annotation out."
        )
    return known[key]


def _box(box: Any, height: int, width: int) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise _Fault("without a box of four numbers")
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0:
        raise _Fault("with a box of no size")
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        raise _Fault("with a box outside the image")
    return [x, y, w, h]


def _mask(segmentation: Any, height: int, width: int, title: str) -> bytes:
    """A mask's run-length code, however it is given."""
    if segmentation is None or segmentation == []:
        raise _Fault(_NO_MASK)
    if isinstance(segmentation, dict):
        return _code(segmentation, height, width, title)
    if not isinstance(segmentation, list):
        raise _Fault("with a mask that is neither polygons nor a run-length code")
    if all(map(_is_number, segmentation)):
        raise UserError(
            f"{title} has a list of {len(segmentation)} numbers where polygons are due; put each "
            "polygon (x, y, x, y, ...) into a list of its own."
        )
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all(map(_is_number, polygon)) or len(polygon) % 2:
            raise _Fault("with a polygon that is no list of x, y, x, y, ...")
        if len(polygon) < 6:
            raise _Fault("with a polygon of fewer than 3 points")
        if max(map(abs, polygon)) > _FARTHEST:
            raise _Fault("with a polygon far outside the image")
    return rle.from_polygons(segmentation, height, width)


def _code(mask: Mapping[str, Any], height: int, width: int, title: str) -> bytes:
    counts: Any = mask.get("counts")
    if mask.get("size") != [height, width]:
        raise UserError(
            f"{title} has a run-length mask of the size (height, width) "
            f"{reprlib.repr(mask.get('size'))}, but its image has {[height, width]}; mend either."
        )
    try:
        if isinstance(counts, list):
            lengths, code = np.array(counts).astype(np.int64, casting="safe"), None
        else:
            code = counts.encode("ascii")
            lengths = rle.run_lengths(code)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise _Fault("with a run-length code that is damaged") from None
    if lengths.min(initial=0) < 0 or lengths.sum() != height * width:
        raise _Fault("with a run-length code that does not fill the image")
    return code or rle.from_lengths(lengths.tolist(), height, width)


def _is_number(value: Any) -> bool:
    """Whether it is one, and finite: JSON of Python may hold NaN and integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _offsets(lengths: np.ndarray) -> Int64[np.ndarray, count + 1]:
    """Where parts of some lengths begin, one behind the other, and where the last ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _line(fault: str, ids: Sequence[Any]) -> str:
    named = ", ".join(reprlib.repr(key) for key in ids[:_NAMED])
    more = ", ..." if len(ids) > _NAMED else ""
    return f"{len(ids):,} annotation{'s' if ids[1:] else ''} {fault} (id {named}{more})"
