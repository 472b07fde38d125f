"""Finds objects in images with a trained detector.

The network of a run of experiments.detection, from its newest checkpoint, looks at images of any
format that Pillow reads, of any size, upright where their EXIF block says how they are turned. An
image that cannot be read is named and left out. The folder --out gets detections.json, a list of
all objects: file_name, category, category_id, bbox (x, y, width, height in the image's pixels, from
its upper left corner), score, and segmentation, the mask as COCO's compressed run-length code; and
detections.png, with boxes, masks and scores drawn on the first six images.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tyro
from jaxtyping import UInt8

from experiments.detection import pictures
from experiments.detection.canvases import Canvases
from experiments.detection.evaluation import detections_of
from experiments.detection.report import SURE
from experiments.detection.samples import Canvas
from experiments.detection.task import Detection
from experiments.detection.trained import Detector, read_detector
from experiments.runtime import commands, run_folder
from experiments.runtime.errors import UserError, reason
from experiments.runtime.files import write_text
from experiments.runtime.images import BrokenImageError, upright

_SHOWN = 6  # images in the picture
_INCHES = 6.0  # an image's side in it

Pixels = UInt8[np.ndarray, "height width 3"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Finds objects in images with a trained detector."""

    run_dir: tyro.conf.Positional[commands.Path]
    """The run's folder."""
    images: tyro.conf.Positional[tuple[commands.Path, ...]]
    """Files of images."""
    score: float = SURE
    """Least score, a probability, of an object."""
    out: commands.Path | None = None
    """Folder for the results, which replace those that it holds; default: a new one in the run's
    folder, predictions/ and the time."""

    def __post_init__(self) -> None:
        if not self.images:
            raise UserError("at least one image must be given behind the run's folder.")
        if not 0 <= self.score <= 1:
            raise UserError(f"--score must be from 0 to 1, got {self.score}.")


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(
            Arguments, prog="python -m experiments.detection.predict", description=__doc__
        )
        finder = Finder(read_detector("RUN-DIR", arguments.run_dir), arguments.score)
        skipped: list[pathlib.Path] = []
        found: list[dict[str, Any]] = []
        shown: list[tuple[Pixels, list[dict[str, Any]]]] = []
        for path, pixels in _readable(arguments.images, skipped):
            objects = finder.objects(pixels)
            found += [{"file_name": str(path), **detection} for detection in objects]
            if len(shown) < _SHOWN:
                shown.append((pixels, objects))
            print(f"{path}: {_counted(objects)}", flush=True)
        if not shown:
            raise UserError(f"none of the {len(skipped)} images can be read; give others.")
        try:
            out = run_folder.results_folder(arguments.out, arguments.run_dir / "predictions")
            write_text(out / "detections.json", json.dumps(found) + "\n")
            pictures.draw_objects(
                out / "detections.png",
                [pixels for pixels, _ in shown],
                {"found": [pictures.found_in(own, finder.categories) for _, own in shown]},
                _INCHES,
            )
        except OSError as error:
            raise UserError(f"--out: nothing can be written there: {error}.") from None
        print(
            f"{len(found)} objects in {len(arguments.images) - len(skipped)} images, "
            f"{len(skipped)} images skipped; see {out}"
        )


class Finder:
    """Finds objects in one image at a time; the network is compiled once for each canvas.

    Attributes:
      categories: ids and names, in the order of the labels.
    """

    def __init__(self, detector: Detector, score: float):
        self.categories = detector.categories
        self._preparation = detector.config.preparation
        self._variables = detector.variables
        model = detector.model.clone(box_score_thresh=score)
        self._evaluate = jax.jit(Detection(model, self._preparation, ()).evaluate)
        self._compiled: set[Canvas] = set()

    def objects(self, image: Pixels) -> list[dict[str, Any]]:
        """What is found: category, category_id, bbox, score, and segmentation."""
        height, width = image.shape[:2]
        (canvas,) = Canvases.of(
            np.array([height]),
            np.array([width]),
            self._preparation.min_size,
            self._preparation.max_size,
        ).shapes
        if canvas not in self._compiled:
            print(f"compiling for images of {canvas.height} x {canvas.width}", file=sys.stderr)
            self._compiled.add(canvas)
        sample = self._preparation.placed(image, canvas)
        batch = {name: np.asarray(array)[None] for name, array in sample.items()}
        results = jax.device_get(self._evaluate(self._variables, batch))
        found = detections_of(
            height,
            width,
            batch["size"][0],
            results["boxes"][0],
            results["scores"][0],
            results["labels"][0],
            results["masks"][0] if "masks" in results else None,
            np.array([key for key, _ in self.categories]),
        )
        names = dict(self.categories)
        return [{"category": names[d["category_id"]], **d} for d in found]


def _readable(
    paths: tuple[pathlib.Path, ...], skipped: list[pathlib.Path]
) -> Iterator[tuple[pathlib.Path, Pixels]]:
    """The images that can be read; the others are named and added to `skipped`."""
    for path in paths:
        try:
            yield path, upright(path.read_bytes())
        except (OSError, BrokenImageError) as error:
            skipped.append(path)
            print(f"skipped {path}: {reason(error)}", file=sys.stderr)


def _counted(objects: list[dict[str, Any]]) -> str:
    """How many objects of each category, as "3 dog, 1 cat"."""
    counts = Counter(detection["category"] for detection in objects)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"


if __name__ == "__main__":
    main()
