"""Detections back in their images' frames, and COCO's metrics of them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import pathlib
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Float64, Int
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from experiments.detection import rle
from experiments.detection.annotations import Annotations
from experiments.detection.resampling import taps
from experiments.runtime.errors import UserError
from experiments.runtime.files import write_text

Kind = Literal["bbox", "segm"]
"""What is compared: boxes or masks; as pycocotools and COCO's own files have it."""

METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
"""COCO's twelve numbers: average precision and recall, over IoU thresholds 0.5 to 0.95, at one
threshold, of small, medium and large objects, with 1, 10 and 100 detections of a category."""


@dataclasses.dataclass(frozen=True)
class Results:
    """What a detector has found in some images.

    Attributes:
      image_ids: of all images that it has seen, also of those in which it has found nothing.
      detections: COCO's results: image_id, category_id, bbox (x, y, width, height), score, and with
        masks segmentation, a run-length code.
    """

    image_ids: tuple[int, ...]
    detections: list[dict[str, Any]]

    @classmethod
    def joined(cls, parts: Iterable[Results]) -> Results:
        """The results of several batches or processes.

        Raises:
          ValueError: an image is in two of them, or twice in one.
        """
        parts = list(parts)
        ids = [key for part in parts for key in part.image_ids]
        if len(ids) != len(set(ids)):
            twice = next(key for key in ids if ids.count(key) > 1)
            raise ValueError(f"the image with the id {twice} was evaluated twice")
        return cls(tuple(ids), [found for part in parts for found in part.detections])

    def write(self, path: pathlib.Path) -> None:
        """Writes a results json of COCO's, all at once or not at all."""
        write_text(path, json.dumps(self.detections))


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """COCO's numbers; -1 where there is no object that they could be of.

    Attributes:
      summary: by the names of `METRICS`.
      by_category: the same by a category's id.
      precision: by IoU threshold (0.5, 0.55, ..., 0.95), recall (0, 0.01, ..., 1), category, area
        (all, small, medium, large) and number of detections (1, 10, 100).
      recall: likewise, without an axis of recall.
      scores: of the detections at which a recall is reached, as `precision`.
    """

    summary: Mapping[str, float]
    by_category: Mapping[int, Mapping[str, float]]
    precision: Float64[np.ndarray, "10 101 K 4 3"]
    recall: Float64[np.ndarray, "10 K 4 3"]
    scores: Float64[np.ndarray, "10 101 K 4 3"]

    def curves(self) -> dict[str, Float64[np.ndarray, 101]]:
        """Precision at a recall of 0, 0.01, ..., 1, over the categories that have objects.

        By names: "0.5" and "0.75", an IoU threshold, and "0.5:0.95", the mean over all; empty if
        no category has an object.
        """
        precision = self.precision[:, :, :, 0, 2]
        precision = precision[:, :, (precision > -1).all((0, 1))]
        if not precision.shape[2]:
            return {}
        mean = precision.mean(2)
        return {"0.5": mean[0], "0.75": mean[5], "0.5:0.95": mean.mean(0)}


def results_of(
    annotations: Annotations,
    index: Int[np.ndarray, B],
    size: Int[np.ndarray, "B 2"],
    boxes: Float[np.ndarray, "B D 4"],
    scores: Float[np.ndarray, "B D"],
    labels: Int[np.ndarray, "B D"],
    masks: Float[np.ndarray, "B D M M"] | None,
    broken: Container[int] = (),
) -> Results:
    """A batch's detections in the frames of their images.

    Args:
      annotations: of the images.
      index: which images these are; -1 where there is none.
      size: height and width of the images on their canvases.
      boxes: x1, y1, x2, y2 in pixels of the canvas.
      scores: of the detections.
      labels: from 1; 0 where there is no detection.
      masks: probabilities within the boxes.
      broken: the images that could not be read, in which nothing is found.
    """
    seen: list[int] = []
    found: list[dict[str, Any]] = []
    for row in np.flatnonzero(index >= 0):
        image = index[row]
        seen.append(int(annotations.image_ids[image]))
        if image in broken:
            continue
        own = detections_of(
            int(annotations.heights[image]),
            int(annotations.widths[image]),
            size[row],
            boxes[row],
            scores[row],
            labels[row],
            None if masks is None else masks[row],
            annotations.category_ids,
        )
        found += [{"image_id": seen[-1], **detection} for detection in own]
    return Results(tuple(seen), found)


def detections_of(
    height: int,
    width: int,
    size: Int[np.ndarray, 2],
    boxes: Float[np.ndarray, "D 4"],
    scores: Float[np.ndarray, D],
    labels: Int[np.ndarray, D],
    masks: Float[np.ndarray, "D M M"] | None,
    category_ids: Int[np.ndarray, K],
) -> list[dict[str, Any]]:
    """One image's detections in its own frame: category_id, bbox, score, and segmentation.

    Args:
      height, width: of the image before it was resized.
      size: height and width on its canvas.
      boxes, scores, labels, masks: as of `results_of`.
      category_ids: in the order of the labels.
    """
    old = np.array([width, height], np.float32) / size[::-1].astype(np.float32)
    found = []
    for d in np.flatnonzero(labels > 0):
        box = boxes[d].astype(np.float32) * np.tile(old, 2)
        x1, y1, x2, y2 = box.astype(np.float64).tolist()
        detection = {
            "category_id": int(category_ids[labels[d] - 1]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(scores[d]),
        }
        if masks is not None:
            code = pasted(masks[d].astype(np.float32), box, height, width).decode()
            detection["segmentation"] = {"size": [height, width], "counts": code}
        found.append(detection)
    return found


def pasted(
    mask: Float32[np.ndarray, "M M"], box: Float32[np.ndarray, 4], height: int, width: int
) -> bytes:
    """The run-length code of the mask of an image, where a box's mask is above 0.5.

    Args:
      mask: probabilities within the box.
      box: x1, y1, x2, y2 in pixels of the image.
      height, width: of the image.
    """
    top, left, values = paste(mask, box, height, width)
    return rle.encoded(values > 0.5, top, left, height, width)


def paste(
    mask: Float32[np.ndarray, "M M"], box: Float32[np.ndarray, 4], height: int, width: int
) -> tuple[int, int, Float32[np.ndarray, "rows columns"]]:
    """A box's mask in the image, as torchvision pastes it (`paste_masks_in_image`).

    The mask is padded by a cell of 0, the box widened accordingly and cut to whole pixels, and the
    mask resized to these.

    Returns:
      The first row and column of the image that may not be 0, and the values from there on.
    """
    size = mask.shape[0]
    padded = np.pad(mask, 1)
    grown = np.float32((size + 2) / size)
    x1, x2 = _widened(box[0], box[2], grown)
    y1, y2 = _widened(box[1], box[3], grown)
    left, right = max(x1, 0), min(x2 + 1, width)
    top, bottom = max(y1, 0), min(y2 + 1, height)
    if right <= left or bottom <= top:
        return 0, 0, np.zeros((0, 0), np.float32)
    columns = taps(size + 2, x2 - x1 + 1, left - x1, right - x1)
    rows = taps(size + 2, y2 - y1 + 1, top - y1, bottom - y1)
    values = (1 - columns.weight) * padded[:, columns.low] + columns.weight * padded[
        :, columns.high
    ]
    weight = rows.weight[:, None]
    return top, left, (1 - weight) * values[rows.low] + weight * values[rows.high]


def _widened(low: np.float32, high: np.float32, grown: np.float32) -> tuple[int, int]:
    """The first and last pixel of a side that is made longer about its middle."""
    middle, half = (high + low) * np.float32(0.5), (high - low) * np.float32(0.5) * grown
    return int(middle - half), max(int(middle + half), int(middle - half))


Evaluator = Callable[[dict[str, Any], dict[str, Any], Kind], Mapping[str, np.ndarray]]
"""Matches detections to objects, both in the form of a COCO json with compressed masks.

It gives "precision", "recall" and "scores" in the shapes of `Evaluation`.
"""


def pycocotools(
    truth: dict[str, Any], detected: dict[str, Any], kind: Kind
) -> Mapping[str, np.ndarray]:
    """COCO's own `Evaluator`."""

    def indexed(dataset: dict[str, Any]) -> COCO:
        index = COCO()
        index.dataset = dataset
        index.createIndex()
        return index

    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
        evaluation = COCOeval(indexed(truth), indexed(detected), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def hotcoco(
    truth: dict[str, Any], detected: dict[str, Any], kind: Kind
) -> Mapping[str, np.ndarray]:
    """An `Evaluator` in Rust with the same results, many times faster.

    Raises:
      UserError: hotcoco is not installed.
    """
    try:
        library = importlib.import_module("hotcoco")
    except ImportError:
        raise UserError("hotcoco is not installed; pip install hotcoco.") from None
    evaluation = library.COCOeval(library.COCO(truth), library.COCO(detected), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval


def evaluate(
    annotations: Annotations,
    results: Results,
    kind: Kind,
    *,
    area_of_box: bool = False,
    evaluator: Evaluator = pycocotools,
) -> Evaluation:
    """COCO's metrics.

    Args:
      annotations: the truth.
      results: for every image of it.
      kind: whether boxes or masks are compared.
      area_of_box: whether a detected mask is small, medium or large by the area of its box, as
        pycocotools has it if it is given results with boxes and masks, and not by its own.
      evaluator: does the work.

    Raises:
      ValueError: the results are not of these images.
    """
    if set(results.image_ids) != set(annotations.image_ids.tolist()):
        raise ValueError(
            f"results of {len(results.image_ids)} images are no results of the "
            f"{len(annotations)} images that are annotated"
        )
    found = evaluator(
        _dataset(annotations, _truth(annotations, kind)),
        _dataset(annotations, _detected(results, kind, area_of_box)),
        kind,
    )
    precision, recall, scores = (found[name] for name in ("precision", "recall", "scores"))
    return Evaluation(
        summary=_summary(precision, recall),
        by_category={
            key: _summary(precision[:, :, k : k + 1], recall[:, k : k + 1])
            for k, key in enumerate(annotations.category_ids.tolist())
        },
        precision=precision,
        recall=recall,
        scores=scores,
    )


def _truth(annotations: Annotations, kind: Kind) -> list[dict[str, Any]]:
    """All objects as pycocotools wants them; their ids begin at 1, as 0 would mean no match."""
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.first))
    objects = []
    for j, i in enumerate(image.tolist()):
        size = [int(annotations.heights[i]), int(annotations.widths[i])]
        truth = {
            "id": j + 1,
            "image_id": int(annotations.image_ids[i]),
            "category_id": int(annotations.category_ids[annotations.labels[j] - 1]),
            "bbox": annotations.boxes[j].tolist(),
            "area": float(annotations.areas[j]),
            "iscrowd": int(annotations.crowd[j]),
        }
        if kind == "segm":
            truth["segmentation"] = {"size": size, "counts": annotations.code(j).decode()}
        objects.append(truth)
    return objects


def _detected(results: Results, kind: Kind, area_of_box: bool) -> list[dict[str, Any]]:
    detections = []
    for number, result in enumerate(results.detections, 1):
        if kind == "segm" and not area_of_box:
            area = float(codec.area(result["segmentation"]))
        else:
            area = result["bbox"][2] * result["bbox"][3]
        detections.append({**result, "id": number, "area": area, "iscrowd": 0})
    return detections


def _dataset(annotations: Annotations, objects: list[dict[str, Any]]) -> dict[str, Any]:
    """A COCO json of objects in the annotated images."""
    sizes = zip(
        annotations.image_ids.tolist(),
        annotations.heights.tolist(),
        annotations.widths.tolist(),
        strict=True,
    )
    return {
        "images": [{"id": key, "height": height, "width": width} for key, height, width in sizes],
        "categories": [
            {"id": key, "name": name}
            for key, name in zip(
                annotations.category_ids.tolist(), annotations.category_names.tolist(), strict=True
            )
        ],
        "annotations": objects,
    }


def _summary(
    precision: Float64[np.ndarray, "10 101 K 4 3"], recall: Float64[np.ndarray, "10 K 4 3"]
) -> dict[str, float]:
    """The twelve numbers, as `COCOeval.summarize` has them."""
    means = [
        *(precision[at, :, :, 0, 2] for at in (slice(None), 0, 5)),
        *(precision[:, :, :, area, 2] for area in (1, 2, 3)),
        *(recall[:, :, 0, most] for most in (0, 1, 2)),
        *(recall[:, :, area, 2] for area in (1, 2, 3)),
    ]
    return {
        name: float(np.mean(values[values > -1])) if (values > -1).any() else -1.0
        for name, values in zip(METRICS, means, strict=True)
    }
