"""Pictures of what a detector finds."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from drconv_jax import viz
from drconv_jax.detection import FasterRCNN, normalize
from experiments.detection import evaluation, rle
from experiments.detection.annotations import Annotations
from experiments.runtime.files import replacing
from experiments.runtime.task import Variables


class Found(NamedTuple):
    """Objects of one image.

    Attributes:
      boxes: x1, y1, x2, y2 in pixels.
      names: of their classes, with a score where there is one.
      labels: from 1, for the colours.
      masks: at every pixel; None where there are none.
    """

    boxes: Float[np.ndarray, "n 4"]
    names: Sequence[str]
    labels: Int[np.ndarray, n]
    masks: Bool[np.ndarray, "n height width"] | None


def draw_objects(
    path: pathlib.Path,
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    rows: Mapping[str, Sequence[Found]],
    inches: float = 3.2,
) -> None:
    """Draws images with boxes, masks and names, one column an image.

    Args:
      path: the picture.
      images: in any size.
      rows: what to draw on each of them, by the title of a row.
      inches: an image's side in the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(inches * len(images), inches * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (title, founds) in enumerate(rows.items()):
        for column, (image, found) in enumerate(zip(images, founds, strict=True)):
            axis = axes[row, column]
            axis.imshow(_with_masks(image, found))
            _draw_boxes(axis, found)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(title, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def draw_curves(
    path: pathlib.Path, metrics: Mapping[evaluation.Kind, evaluation.Evaluation]
) -> None:
    """Draws precision over recall, of boxes and of masks.

    Args:
      path: the picture.
      metrics: by kind.
    """
    from matplotlib.figure import Figure

    titles = {"bbox": "boxes", "segm": "masks"}
    figure = Figure(figsize=(4.5 * len(metrics), 3.6), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, (kind, found) in zip(axes, metrics.items(), strict=True):
        for name, precision in found.curves().items():
            axis.plot(np.linspace(0, 1, 101), precision, label=f"IoU {name}")
        axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axis.set_title(f"{titles[kind]}: AP {found.summary['AP']:.3f}", fontsize=10)
        if axis.lines:
            axis.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def draw_guide_masks(
    path: pathlib.Path,
    variables: Variables,
    model: FasterRCNN,
    images: UInt8[np.ndarray, "batch height width 3"],
    sizes: Int[np.ndarray, "batch 2"],
    titles: Sequence[str],
    regions: int,
) -> None:
    """Draws which region each position of photographs is in, layer by layer.

    Args:
      path: the picture.
      variables: of the network.
      model: the network.
      images, sizes: on canvases.
      titles: a word for each image.
      regions: m.
    """
    apply = jax.jit(functools.partial(model.apply, mutable="intermediates"))
    sizes_there = jnp.asarray(sizes)
    _, intermediates = apply(variables, normalize(jnp.asarray(images), sizes_there), sizes_there)
    indices = {
        layer.removeprefix("backbone/"): index
        for layer, index in viz.region_indices(intermediates["intermediates"]).items()
        if layer.startswith("backbone/")
    }
    with replacing(path) as temporary:
        viz.save_guide_masks(
            temporary, images / 255, jax.device_get(indices), regions, list(titles)
        )


def found_in(
    detections: Sequence[Mapping[str, Any]], categories: Sequence[tuple[int, str]]
) -> Found:
    """COCO results of one image, to be drawn.

    Args:
      detections: the results, masks as compressed run-length codes.
      categories: ids and names, in the order of the labels.
    """
    places = {key: place for place, (key, _) in enumerate(categories)}
    labels = np.array([1 + places[d["category_id"]] for d in detections], np.int64)
    codes = [d["segmentation"] for d in detections if "segmentation" in d]
    return Found(
        _corners(np.array([d["bbox"] for d in detections], np.float32)),
        [
            f"{categories[label - 1][1]} {d['score']:.2f}"
            for label, d in zip(labels.tolist(), detections, strict=True)
        ],
        labels,
        np.stack([_mask(code["counts"].encode(), *code["size"]) for code in codes])
        if codes
        else None,
    )


def truth_of(annotations: Annotations, image: int) -> Found:
    """The objects of one image, to be drawn, without crowds."""
    objects = annotations.objects(image)
    own = np.flatnonzero(~objects.crowd)
    height, width = int(annotations.heights[image]), int(annotations.widths[image])
    return Found(
        _corners(objects.boxes[own]),
        [str(annotations.category_names[label - 1]) for label in objects.labels[own]],
        objects.labels[own],
        np.stack([_mask(objects.masks[j], height, width) for j in own])
        if objects.masks and len(own)
        else None,
    )


def _corners(boxes: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """Boxes x, y, width, height as x1, y1, x2, y2."""
    boxes = boxes.reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _mask(code: bytes, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    return rle.decoded(code, height, rle.Window(0, 0, height, width)).astype(bool)


def _with_masks(image: UInt8[np.ndarray, "_ _ 3"], found: Found) -> Float[np.ndarray, "_ _ 3"]:
    pixels = image / 255
    if found.masks is not None:
        for number, mask in enumerate(found.masks):
            pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(_colour(found, number))
    return pixels


def _draw_boxes(axis: Any, found: Found) -> None:
    from matplotlib.patches import Rectangle

    many = len(found.names) > 20  # names would hide the picture
    for number, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
        colour = _colour(found, number)
        box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=0.8)
        axis.add_patch(box)
        if not many:
            axis.text(
                x1, y1, found.names[number], fontsize=5, color="white", parse_math=False,
                bbox={"facecolor": colour, "pad": 0.5, "edgecolor": "none"},
            )  # fmt: skip


def _colour(found: Found, number: int) -> tuple[float, float, float]:
    """Of an object: by its class, or, where there is one class, by its place."""
    import matplotlib

    one_class = len(set(found.labels.tolist())) <= 1
    place = number if one_class else int(found.labels[number])
    red, green, blue, _ = matplotlib.colormaps["tab20"](place % 20)
    return red, green, blue
