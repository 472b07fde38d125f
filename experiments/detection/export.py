"""Writes a trained detector to a file that runs without its code, and checks that file.

The network of a run of experiments.detection, from its newest checkpoint, becomes a StableHLO file
for any batch size, with all that makes objects of its outputs inside. Its inputs:

- images, uint8 (batch, height, width, 3): each resized (bilinear) as large as the canvas allows
  without changing its shape, in the canvas's upper left corner, 0 elsewhere;
- sizes, int32 (batch, 2): height and width of each image on the canvas.

Its outputs, by name, with a slot for each of the objects that are found at most, by falling score:

- boxes, float32 (batch, objects, 4): x1, y1, x2, y2 in pixels of the canvas;
- scores, float32 (batch, objects);
- labels, int32 (batch, objects): from 1, in the order of the run's categories.json; 0 is an empty
  slot;
- masks, float16 (batch, objects, 28, 28), of a Mask R-CNN: probabilities within the boxes.

Batch norms are folded into the convolutions before them. `drconv_jax.export.load_exported` runs the
file, and so does jax.export without this package. There are no ONNX files of detectors: jax2onnx
cannot convert the gathers that pick every image's own proposals.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Int, UInt8

from drconv_jax.detection import normalize
from drconv_jax.detection.boxes import iou
from drconv_jax.export import PLATFORMS, export_model, load_exported, platform_names
from drconv_jax.fold import fold_batch_norm
from experiments.detection.canvases import photograph
from experiments.detection.samples import Canvas
from experiments.detection.task import named
from experiments.detection.trained import Detector, read_detector
from experiments.runtime import commands
from experiments.runtime.errors import UserError

# An object of the file's is one of the network's with the same label and nearly the same box. Of
# objects whose scores are all but equal, rounding may choose others, but few.
_SAME_BOX, _SAME_OBJECTS = 0.9, 0.95

Run = Callable[[Any, Array, Array], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a trained detector to a file that runs without its code, and checks that file."""

    run_dir: tyro.conf.Positional[commands.Path]
    """The run's folder."""
    format: Literal["stablehlo", "onnx"] = "stablehlo"
    """Of the file; onnx is refused."""
    out: commands.Path | None = None
    """The file to write; default: model.stablehlo in the run's folder."""
    canvas: tuple[int, int] | None = None
    """Height and width of the images; default: the canvas on which the run has photographs of 4:3,
    lying."""
    score: float | None = None
    """Least score of an object; default: the run's."""
    fold: bool = True
    """Whether batch norms are folded."""
    platforms: tuple[str, ...] = PLATFORMS
    """Where the file shall run, as jax.export names them; gpu is cuda."""

    def __post_init__(self) -> None:
        if self.format == "onnx":
            raise UserError(
                "--format onnx: jax2onnx cannot convert a detector, which picks other proposals in "
                "every image; leave the option out for a StableHLO file."
            )
        try:
            platform_names(self.platforms)
        except ValueError as error:
            raise UserError(f"--platforms: {error}") from None
        if self.score is not None and not 0 <= self.score <= 1:
            raise UserError(f"--score must be from 0 to 1, got {self.score}.")


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(
            Arguments, prog="python -m experiments.detection.export", description=__doc__
        )
        detector = read_detector("RUN-DIR", arguments.run_dir)
        if arguments.score is not None:
            model = detector.model.clone(box_score_thresh=arguments.score)
            detector = detector._replace(model=model)
        canvas = _canvas(arguments, detector)
        run, variables = objects_of(detector, canvas, fold=arguments.fold)
        out = arguments.out or arguments.run_dir / "model.stablehlo"
        inputs = [
            jax.ShapeDtypeStruct((*canvas, 3), jnp.uint8),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        ]
        try:
            export_model(out, run, variables, inputs, platforms=arguments.platforms)
        except OSError as error:
            raise UserError(f'--out: "{out}" cannot be written: {error.strerror}.') from None
        platforms = platform_names(arguments.platforms)
        checked = "not read back, since this machine is none of these"
        if jax.export.default_export_platform() in platforms:
            same, count = check(out, run, variables, canvas)
            checked = f"read back, it finds {same} of the {count} objects that the network finds"
        print(
            f"{out}: {out.stat().st_size / 2**20:.1f} MiB for {', '.join(platforms)} and images of "
            f"{canvas.height} x {canvas.width}; {checked}"
        )


def _canvas(arguments: Arguments, detector: Detector) -> Canvas:
    if arguments.canvas is None:
        preparation = detector.config.preparation
        return photograph(preparation.min_size, preparation.max_size)
    canvas, unit = Canvas(*arguments.canvas), max(detector.model.strides)
    if min(canvas) < 1 or canvas.height % unit or canvas.width % unit:
        raise UserError(
            f"--canvas must be a height and a width that are multiples of {unit}, got "
            f"{canvas.height} {canvas.width}."
        )
    return canvas


def objects_of(detector: Detector, canvas: Canvas, *, fold: bool) -> tuple[Run, dict[str, Any]]:
    """A function of variables, images and sizes to objects, and the variables.

    Args:
      detector: what is trained.
      canvas: of the images.
      fold: whether batch norms are folded.
    """
    apply: Callable[..., Any] = detector.model.apply
    variables = dict(detector.variables)
    if fold:
        images = jax.ShapeDtypeStruct((1, *canvas, 3), jnp.float32)
        sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        apply, variables = fold_batch_norm(detector.model, variables, images, sizes)

    def run(
        variables: Any,
        images: UInt8[Array, "batch height width 3"],
        sizes: Int[Array, "batch 2"],
    ) -> dict[str, Array]:
        return named(apply(variables, normalize(images, sizes), sizes))

    return run, variables


def check(path: pathlib.Path, run: Run, variables: Any, canvas: Canvas) -> tuple[int, int]:
    """How many of the objects that the network finds the file finds, and how many there are.

    Raises:
      UserError: too few; the file is removed.
    """
    batch, generator = 2, np.random.default_rng(0)
    # Patches of colour: of noise, a trained network makes nothing.
    cells = generator.integers(0, 256, (batch, *(-(-side // 32) for side in canvas), 3), np.uint8)
    patches = cells.repeat(32, axis=1).repeat(32, axis=2)
    images = jnp.asarray(patches[:, : canvas.height, : canvas.width])
    sizes = jnp.asarray(np.tile(np.array(canvas, np.int32), (batch, 1)))
    expected, found = jax.jit(run)(variables, images, sizes), load_exported(path)(images, sizes)
    same = int(jax.vmap(_found_again)(expected, found).sum())
    count = int((expected["labels"] > 0).sum())
    if same < _SAME_OBJECTS * count:
        path.unlink()
        raise UserError(
            f'"{path}" would find {same} of {count} objects that the network finds, and is '
            "removed; please report this with the run's config.json."
        )
    return same, count


def _found_again(expected: Mapping[str, Array], found: Mapping[str, Array]) -> Int[Array, ""]:
    """How many of one image's objects are among those that were found."""
    same_box = iou(expected["boxes"], found["boxes"]) >= _SAME_BOX
    same_label = expected["labels"][:, None] == found["labels"][None]
    return ((same_box & same_label).any(axis=1) & (expected["labels"] > 0)).sum()


if __name__ == "__main__":
    main()
