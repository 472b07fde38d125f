"""What a run of detection leaves at its end: results, metrics and pictures."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from experiments.detection import pictures
from experiments.detection.config import Config
from experiments.detection.feed import CocoImages
from experiments.detection.samples import decode
from experiments.detection.task import Detection, DetectorEvaluation
from experiments.runtime.files import write_text
from experiments.runtime.images import BrokenImageError
from experiments.runtime.task import Variables

SURE = 0.5
"""Score from which on an object is drawn."""

_IMAGES = 6  # in a picture


def at_the_end(
    config: Config, task: Detection, feed: CocoImages, evaluations: Sequence[DetectorEvaluation]
) -> dict[str, Callable[[pathlib.Path, Variables], None]]:
    """What writes each of the files, given its path and the network's variables.

    Args:
      config: of the run.
      task: what was trained.
      feed: has the held-out images.
      evaluations: to which the run adds its own; the last one counts.
    """
    split = feed.test
    annotations = split.annotations
    categories = list(
        zip(annotations.category_ids.tolist(), annotations.category_names.tolist(), strict=True)
    )

    def write_detections(path: pathlib.Path, _: Variables) -> None:
        evaluations[-1].results.write(path)

    def write_metrics(path: pathlib.Path, _: Variables) -> None:
        metrics = {
            kind: {"all": found.summary}
            | {name: found.by_category[key] for key, name in categories}
            for kind, found in evaluations[-1].metrics.items()
        }
        write_text(path, json.dumps(metrics, indent=2) + "\n")

    def draw_curves(path: pathlib.Path, _: Variables) -> None:
        pictures.draw_curves(path, evaluations[-1].metrics)

    def draw_detections(path: pathlib.Path, _: Variables) -> None:
        shown = _readable(feed, range(len(feed.test_canvases.shapes)))
        results = evaluations[-1].results.detections
        found, truth, images = [], [], []
        for image in shown:
            key = int(annotations.image_ids[image])
            sure = [d for d in results if d["image_id"] == key and d["score"] >= SURE]
            found.append(pictures.found_in(sure, categories))
            truth.append(pictures.truth_of(annotations, image))
            size = int(annotations.heights[image]), int(annotations.widths[image])
            images.append(decode(split.content(image), *size))
        pictures.draw_objects(path, images, {"found": found, "truth": truth})

    def draw_guide_masks(path: pathlib.Path, variables: Variables) -> None:
        canvases = feed.test_canvases
        place = int(np.bincount(canvases.smallest).argmax())  # that on which most images lie
        shown = _readable(feed, [place])
        samples = [
            feed.preparation.evaluation(
                split.content(image),
                int(annotations.heights[image]),
                int(annotations.widths[image]),
                canvases.shapes[place],
            )
            for image in shown
        ]
        pictures.draw_guide_masks(
            path,
            variables,
            task.model,
            np.stack([sample["image"] for sample in samples]),
            np.stack([sample["size"] for sample in samples]),
            [pathlib.Path(str(annotations.file_names[image])).stem for image in shown],
            config.model.regions,
        )

    files = {
        "detections.json": write_detections,
        "evaluation.json": write_metrics,
        "precision_recall.png": draw_curves,
        "detections.png": draw_detections,
    }
    return files | ({"guide_masks.png": draw_guide_masks} if config.model.has_guide else {})


def _readable(feed: CocoImages, canvases: Sequence[int]) -> list[int]:
    """Some held-out images on these canvases, that have objects and can be read."""
    split, found = feed.test, []
    annotations = split.annotations
    fit = np.isin(feed.test_canvases.smallest, canvases) & (annotations.object_counts() > 0)
    for image in np.random.default_rng(0).permutation(np.flatnonzero(fit)).tolist():
        try:
            size = int(annotations.heights[image]), int(annotations.widths[image])
            decode(split.content(image), *size)
        except BrokenImageError:
            continue
        found.append(image)
        if len(found) == _IMAGES:
            break
    return found
