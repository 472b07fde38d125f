"""What a run's folder holds in the end besides numbers: pictures of the last evaluation."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.face import pictures
from experiments.face.config import Config
from experiments.face.faces import Faces
from experiments.face.task import FaceEvaluation, Recognition, network_of
from experiments.runtime import images
from experiments.runtime.sources.splits import evenly_spread

_FACES = 8  # whose guide masks are drawn


def at_the_end(
    config: Config, task: Recognition, faces: Faces, evaluations: Sequence[FaceEvaluation]
) -> Mapping[str, Callable[[pathlib.Path, Any], None]]:
    """The pictures by name, as `Setup.pictures` takes them.

    Args:
      config: the run's options.
      task: what is trained.
      faces: what it is judged by.
      evaluations: those that there were; the last is drawn.
    """

    def of_pairs(draw: Callable[..., None]) -> Callable[[pathlib.Path, Any], None]:
        def drawn(path: pathlib.Path, variables: Any) -> None:
            del variables
            last = evaluations[-1]
            counted = faces.judged & ~np.isnan(last.similarities)
            draw(path, np.flatnonzero(counted), last)

        return drawn

    def roc(path: pathlib.Path, which: np.ndarray, last: FaceEvaluation) -> None:
        same = faces.pairs.same[which]
        pictures.draw_roc(path, last.similarities[which], same, last.threshold)

    def similarities(path: pathlib.Path, which: np.ndarray, last: FaceEvaluation) -> None:
        same = faces.pairs.same[which]
        pictures.draw_similarities(path, last.similarities[which], same, last.threshold)

    def hardest(path: pathlib.Path, which: np.ndarray, last: FaceEvaluation) -> None:
        def pair(place: int) -> pictures.Pair:
            both = int(faces.pairs.first[place]), int(faces.pairs.second[place])
            pixels, names = [pixels_of(i) for i in both], [faces.held_out.name_of(i) for i in both]
            return pictures.Pair(
                (pixels[0], pixels[1]), (names[0], names[1]), float(last.similarities[place])
            )

        found = pictures.hardest_pairs(last.similarities[which], faces.pairs.same[which])
        of_one, of_two = ([pair(int(which[i])) for i in places] for places in found)
        pictures.draw_hardest_pairs(path, of_one, of_two, last.threshold)

    def pixels_of(index: int) -> np.ndarray:
        return images.squashed(faces.held_out[index].content, config.image_size)

    def guide_masks(path: pathlib.Path, variables: Any) -> None:
        chosen, names = [], []
        for index in evenly_spread(len(faces.held_out), _FACES):
            try:
                chosen.append(pixels_of(index))
            except Exception:  # of any kind: a broken image is not drawn
                continue
            names.append(faces.held_out.name_of(index))
        faces_drawn = np.stack(chosen)
        masks = pictures.guide_masks(task.model, network_of(variables), faces_drawn)
        pictures.draw_guide_masks(path, faces_drawn, masks, names, config.model.regions)

    drawn = {
        "roc.png": of_pairs(roc),
        "similarities.png": of_pairs(similarities),
        "hardest_pairs.png": of_pairs(hardest),
    }
    return drawn | ({"guide_masks.png": guide_masks} if config.model.has_guide else {})
