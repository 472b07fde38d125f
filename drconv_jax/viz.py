"""Guide masks as pictures. Needs matplotlib (the "experiments" extra)."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

_TITLE = 20  # characters that have room beside an image


def region_indices(intermediates: Mapping[str, Any]) -> dict[str, Int[Array, batch * out]]:
    """The region indices that a network's DRConv layers have sown, by layer, in order of the call.

    Args:
      intermediates: the collection "intermediates" of `apply(..., mutable="intermediates")`.

    Returns:
      Layer names, joined by "/", to indices.
    """
    return {
        "/".join(path[:-1]): values[-1]
        for path, values in flatten_dict(dict(intermediates)).items()
        if path[-1] == "region_index"
    }


def save_guide_masks(
    path: pathlib.Path,
    images: Float[np.ndarray, "batch height width channels"],
    indices: Mapping[str, Int[np.ndarray, "batch out_height out_width"]],
    regions: int,
    titles: Sequence[str],
) -> None:
    """Draws every image beside its guide mask in each layer, one colour a region.

    Args:
      path: the PNG to write.
      images: values from 0 to 1, with 1 or 3 channels.
      indices: as `region_indices` returns them, for the same images.
      regions: m, for the colours.
      titles: a word for each image, shown as it is; where it is long, its beginning.
    """
    from matplotlib.figure import Figure

    columns = 1 + len(indices)
    figure = Figure(figsize=(1.25 * columns, 1.25 * len(images) + 0.6), layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray")
        label(axes[row, 0].set_ylabel, _in_one_line(titles[row]), 8)
        for column, (layer, index) in enumerate(indices.items(), start=1):
            draw_guide_mask(axes[row, column], index[row], regions, "" if row else layer)
        axes[row, 0].set_xticks([])
        axes[row, 0].set_yticks([])
    label(axes[0, 0].set_title, "input", 7)
    figure.suptitle(f"Guide masks: each colour is one of {regions} regions", fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # those that no font has are drawn as boxes
        figure.savefig(path, dpi=110)


def draw_guide_mask(
    axis: Any, index: Int[np.ndarray, "out_height out_width"], regions: int, layer: str = ""
) -> None:
    """Draws a guide mask, one colour a region.

    Args:
      axis: of matplotlib.
      index: the region of each position.
      regions: m, for the colours.
      layer: whose name is written above, and the mask's size; "" for none.
    """
    import matplotlib

    colours = matplotlib.colormaps["turbo"].resampled(max(regions, 2))
    axis.imshow(index, cmap=colours, vmin=-0.5, vmax=regions - 0.5, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    if layer:
        height, width = index.shape
        title = layer.replace("_", " ").replace("/", "\n")
        label(axis.set_title, f"{title}\n{height}x{width}", 7)


def label(write: Callable[..., Any], text: str, size: int) -> None:
    """Writes the text as it stands: matplotlib would take what is between dollars for a formula.

    Args:
      write: a method of matplotlib's that writes text, such as an axis's `set_title`.
      text: also of names that cannot be printed.
      size: in points.
    """
    drawable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    write(drawable, fontsize=size, parse_math=False, usetex=False)


def _in_one_line(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= _TITLE else f"{shown[: _TITLE - 1]}…"
