"""Tells whether two images are of one person, with a trained network.

The network of a run of experiments.face, from its newest checkpoint, looks at two images of any
format that Pillow reads, resized to the run's size, upright where their EXIF block says how they
are turned. Printed are the cosine of their embeddings, from -1 to 1, and the decision by the
threshold that the run has chosen. The folder --out gets comparison.png: both images as the network
sees them, the decision, and below them guide masks of some layers, where the network has DRConv.

With --gallery, a file of experiments.face.embed, one image is compared with all in there, and the
names of the ten nearest are printed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import tyro
from jaxtyping import Float, UInt8

from experiments.face import pictures
from experiments.face.embeddings import check_finite, compiled, digest, read_gallery
from experiments.face.trained import Embedder, read_embedder
from experiments.runtime import commands, run_folder
from experiments.runtime.errors import UserError, reason
from experiments.runtime.images import BrokenImageError, squashed

_NEAREST = 10  # images of a gallery that are printed
_LAYERS = 3  # whose guide masks are drawn


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tells whether two images are of one person, with a trained network."""

    run_dir: tyro.conf.Positional[commands.Path]
    """The run's folder."""
    images: tyro.conf.Positional[tuple[commands.Path, ...]]
    """Two files of images; one with --gallery."""
    gallery: commands.Path | None = None
    """A file of embeddings by the same run, to find the nearest in."""
    threshold: float | None = None
    """The cosine from which on two images are of one person; default: the run's."""
    out: commands.Path | None = None
    """Folder for comparison.png, which replaces one that it holds; default: a new one in the run's
    folder, comparisons/ and the time."""

    def __post_init__(self) -> None:
        wanted, where = (2, "") if self.gallery is None else (1, " with --gallery")
        if len(self.images) != wanted:
            images = "two images" if wanted == 2 else "one image"
            raise UserError(
                f"{images} must be given{where} behind the run's folder, got {len(self.images)}."
            )
        for option in ("out", "threshold"):
            if self.gallery is not None and getattr(self, option) is not None:
                raise UserError(f"--{option} is for two images; leave it out with --gallery.")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise UserError(f"--threshold must be from -1 to 1, got {self.threshold}.")


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(
            Arguments, prog="python -m experiments.face.compare", description=__doc__
        )
        embedder = read_embedder("RUN-DIR", arguments.run_dir)
        size = embedder.config.image_size
        images = np.stack([_read(path, size) for path in arguments.images])
        embeddings = np.asarray(compiled(embedder)(images))
        check_finite(embeddings, arguments.run_dir)
        if arguments.gallery is None:
            _compare(embedder, images, embeddings, arguments)
        else:
            _search(embedder, embeddings[0], arguments.gallery)


def _compare(
    embedder: Embedder,
    images: UInt8[np.ndarray, "2 height width 3"],
    embeddings: Float[np.ndarray, "2 embedding_size"],
    arguments: Arguments,
) -> None:
    """Prints and draws what two images have in common."""
    threshold = arguments.threshold
    if threshold is None:
        threshold = _threshold_of(arguments.run_dir)
    first, second = embeddings
    cosine = float(first @ second)
    decision = "the same person" if cosine >= threshold else "two people"
    verdict = f"cosine {cosine:.4f}: {decision}, by the threshold {threshold:.4f}"
    model = embedder.config.model
    masks = (
        pictures.guide_masks(embedder.model, embedder.network, images, _LAYERS)
        if model.has_guide
        else {}
    )
    one, other = (path.name for path in arguments.images)
    pair = pictures.Pair((images[0], images[1]), (one, other), cosine)
    try:
        out = run_folder.results_folder(arguments.out, arguments.run_dir / "comparisons")
        pictures.draw_comparison(out / "comparison.png", pair, verdict, masks, model.regions)
    except OSError as error:
        raise UserError(f"--out: nothing can be written there: {error}.") from None
    print(f"{verdict}; see {out / 'comparison.png'}")


def _search(
    embedder: Embedder, embedding: Float[np.ndarray, embedding_size], path: pathlib.Path
) -> None:
    """Prints the images of a gallery that are nearest to one.

    Raises:
      UserError: the gallery is of another network.
    """
    gallery = read_gallery("--gallery", path)
    size = gallery.embeddings.shape[1]
    if size != len(embedding):
        raise UserError(
            f'--gallery: "{path}" has embeddings of {size} numbers, but the run\'s have '
            f"{len(embedding)}; write it anew with python -m experiments.face.embed."
        )
    if gallery.network not in ("", digest(embedder)):
        raise UserError(
            f'--gallery: "{path}" has embeddings by another network, or by this one before it was '
            "trained on; write it anew with python -m experiments.face.embed."
        )
    cosines = gallery.embeddings @ embedding
    nearest = np.argsort(-cosines, kind="stable")[:_NEAREST]
    print(f'cosines of the nearest {len(nearest)} of {len(cosines):,} images in "{path}":')
    for place in nearest.tolist():
        print(f"{cosines[place]:7.4f}  {gallery.names[place]}")


def _read(path: pathlib.Path, size: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return squashed(path.read_bytes(), size)
    except (OSError, BrokenImageError) as error:
        raise UserError(f'"{path}" cannot be read: {reason(error)}.') from None


def _threshold_of(run_dir: pathlib.Path) -> float:
    """The threshold that a run has chosen.

    Raises:
      UserError: it has not.
    """
    path = run_dir / "report.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["threshold"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f'RUN-DIR: the run in "{run_dir}" has chosen no threshold yet, which it does in its '
            'end ("threshold" in report.json); give --threshold.'
        ) from None


if __name__ == "__main__":
    main()
