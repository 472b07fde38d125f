"""Pictures of how well faces are told apart, and of what a network looks at."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from drconv_jax import viz
from drconv_jax.models import EmbeddingNetwork, MobileFaceNet
from experiments.face import protocols
from experiments.runtime.files import replacing
from experiments.runtime.images import normalize
from experiments.runtime.sources.splits import evenly_spread
from experiments.runtime.task import Variables

_ONE, _TWO = "tab:blue", "tab:orange"  # colours of pairs of one person and of two
_NAME = 52  # characters that have room beside two images
_LAYERS = 8  # that have room beside an image

Pixels = UInt8[np.ndarray, "height width 3"]
Masks = dict[str, Int[np.ndarray, "batch out_height out_width"]]


class Pair(NamedTuple):
    """Two images that were compared.

    Attributes:
      images: of one size.
      names: of the images.
      similarity: their cosine.
    """

    images: tuple[Pixels, Pixels]
    names: tuple[str, str]
    similarity: float


def draw_roc(
    path: pathlib.Path,
    similarities: Float[np.ndarray, pairs],
    same: Bool[np.ndarray, pairs],
    threshold: float,
) -> None:
    """Draws the receiver operating characteristic: TAR over FAR, on a logarithmic axis.

    TAR is the share of the pairs of one person that are taken for such, FAR that of the pairs of
    two people.

    Args:
      path: the picture.
      similarities: cosines of pairs.
      same: which pairs are of one person.
      threshold: the run's, whose point is marked.
    """
    from matplotlib.figure import Figure

    curve = protocols.roc(similarities, same)
    least = 1 / np.count_nonzero(~same)  # the lowest FAR that so many pairs can show, but for 0
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.step(np.maximum(curve.far, least / 2), curve.tar, where="post", color=_ONE)
    tar, far = (np.mean(similarities[kind] >= threshold) for kind in (same, ~same))
    axis.plot(
        [max(far, least / 2)], [tar], "o", color="black", markersize=5, clip_on=False,
        label=f"threshold {threshold:.3f}:\nTAR {tar:.4f} at FAR {far:.4f}",
    )  # fmt: skip
    chance = np.geomspace(least / 2, 1)
    axis.plot(chance, chance, ":", color="gray", label="chance")
    axis.set(
        xscale="log", xlim=(least / 2, 1), ylim=(0, 1.02),
        xlabel="FAR: pairs of two people taken for one", ylabel="TAR: pairs of one person found",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(_counts(same), fontsize=9)
    _save(figure, path)


def draw_similarities(
    path: pathlib.Path,
    similarities: Float[np.ndarray, pairs],
    same: Bool[np.ndarray, pairs],
    threshold: float,
) -> None:
    """Draws histograms of the cosines of pairs of one person, and of two.

    Args:
      path: the picture.
      similarities: cosines of pairs.
      same: which pairs are of one person.
      threshold: from which on two images are taken to be of one person.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    edges = np.linspace(similarities.min(), similarities.max() + 1e-6, 61).tolist()
    for kind, colour, title, error, wrong in (
        (same, _ONE, "one person", "below", similarities < threshold),
        (~same, _TWO, "two people", "above", similarities >= threshold),
    ):
        count = np.count_nonzero(kind)
        share = np.count_nonzero(wrong & kind) / count
        axis.hist(
            similarities[kind], edges, weights=np.full(count, 100 / count), color=colour,
            alpha=0.6, label=f"{title} ({count:,} pairs): {share:.1%} {error}",
        )  # fmt: skip
    axis.axvline(threshold, color="black", linewidth=1, label=f"threshold {threshold:.3f}")
    axis.set(xlabel="cosine of the two embeddings", ylabel="pairs of a kind (%)")
    axis.margins(y=0.35)  # room for the legend
    axis.legend(fontsize=8)
    _save(figure, path)


def hardest_pairs(
    similarities: Float[np.ndarray, pairs], same: Bool[np.ndarray, pairs], count: int = 6
) -> tuple[Int[np.ndarray, of_one], Int[np.ndarray, of_two]]:
    """The pairs of one person with the lowest cosines, and of two with the highest.

    Args:
      similarities: cosines of pairs.
      same: which pairs are of one person.
      count: of each kind, at most.

    Returns:
      Places of pairs, the hardest first.
    """
    order = np.argsort(similarities, kind="stable")
    return order[same[order]][:count], order[~same[order]][::-1][:count]


def draw_hardest_pairs(
    path: pathlib.Path, of_one: Sequence[Pair], of_two: Sequence[Pair], threshold: float
) -> None:
    """Draws the pairs that `hardest_pairs` finds.

    Args:
      path: the picture.
      of_one: pairs of one person.
      of_two: pairs of two people.
      threshold: from which on two images are taken to be of one person.
    """
    from matplotlib.figure import Figure

    columns = max(len(of_one), len(of_two))
    figure = Figure(figsize=(2.5 * columns, 4.1), layout="constrained")
    figure.suptitle(
        f"Hardest pairs; red: on the wrong side of the threshold {threshold:.3f}", fontsize=10
    )
    rows: Any = figure.subfigures(2, 1)
    for row, pairs, title, is_one in (
        (rows[0], of_one, "one person, the lowest cosines", True),
        (rows[1], of_two, "two people, the highest cosines", False),
    ):
        row.suptitle(title, fontsize=9)
        axes = row.subplots(1, columns, squeeze=False)[0]
        for axis in axes[len(pairs) :]:
            axis.set_visible(False)
        for axis, pair in zip(axes, pairs, strict=False):
            _draw_pair(axis, pair, wrong=(pair.similarity >= threshold) != is_one)
    _save(figure, path)


def guide_masks(
    model: MobileFaceNet | EmbeddingNetwork,
    network: Variables,
    images: UInt8[np.ndarray, "batch height width 3"],
    most: int = _LAYERS,
) -> Masks:
    """Guide masks of a network with DRConv, by layer.

    Where the convolutions of a block have the same masks, as they share its guide, these are the
    block's. Of many layers, some at even distances are taken.

    Args:
      model: the network.
      network: its variables.
      images: of faces.
      most: layers that are taken.
    """
    called: list[str] = []

    @jax.jit
    def indices(network: Variables, images: Array) -> list[Array]:
        _, sown = model.apply(network, normalize(images), mutable="intermediates")
        found = viz.region_indices(sown["intermediates"])
        called.extend(found)  # in order of the call, which a dict does not keep that leaves jit
        return list(found.values())

    found = jax.device_get(indices(network, jnp.asarray(images)))
    masks: Masks = {}
    for layer, mask in zip(called, found, strict=True):
        block, _, _ = layer.rpartition("/")
        before = next(reversed(masks), "")
        if before.startswith(f"{block}/") and np.array_equal(masks[before], mask):
            masks[block] = masks.pop(before)
        else:
            masks[layer] = mask
    layers = list(masks)
    return {layers[i]: masks[layers[i]] for i in evenly_spread(len(layers), most)}


def draw_guide_masks(
    path: pathlib.Path,
    images: UInt8[np.ndarray, "batch height width 3"],
    masks: Masks,
    names: Sequence[str],
    regions: int,
) -> None:
    """Draws faces beside their guide masks.

    Args:
      path: the picture.
      images: of faces.
      masks: of `guide_masks`, for the same images.
      names: of the images.
      regions: m.
    """
    with replacing(path) as temporary:
        viz.save_guide_masks(temporary, images / 255, masks, regions, list(names))


def draw_comparison(
    path: pathlib.Path,
    pair: Pair,
    verdict: str,
    masks: Mapping[str, Int[np.ndarray, "2 out_height out_width"]],
    regions: int,
) -> None:
    """Draws two images that were compared, what came of it, and their guide masks beneath.

    Args:
      path: the picture.
      pair: the images.
      verdict: what came of it, in words.
      masks: guide masks of both, by layer; there may be none.
      regions: m.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.4 if masks else 4.2), layout="constrained")
    figure.suptitle(verdict, fontsize=11)
    sides: Any = figure.subfigures(1, 2)
    for side, part in enumerate(sides):
        columns = max(len(masks), 1)
        grid = part.add_gridspec(
            1 + bool(masks), columns, height_ratios=[2.4, 1][: 1 + bool(masks)]
        )
        axis = part.add_subplot(grid[0, :])
        axis.imshow(pair.images[side])
        axis.set_xticks([])
        axis.set_yticks([])
        viz.label(axis.set_title, _shortened(pair.names[side]), 9)
        for column, (layer, mask) in enumerate(masks.items()):
            axis = part.add_subplot(grid[1, column])
            viz.draw_guide_mask(axis, mask[side], regions, layer)
    _save(figure, path)


def _draw_pair(axis: Any, pair: Pair, *, wrong: bool) -> None:
    """Two images side by side, their cosine above, and below their names, the left one's first."""
    left, right = pair.images
    height, width = left.shape[:2]
    gap = np.full((height, max(width // 28, 1), 3), 255, np.uint8)
    axis.imshow(np.concatenate([left, gap, right], axis=1))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    colour = "tab:red" if wrong else "black"
    axis.set_title(f"{pair.similarity:.3f}", fontsize=9, color=colour)
    viz.label(axis.set_xlabel, "\n".join(map(_shortened, pair.names)), 6)


def _counts(same: Bool[np.ndarray, pairs]) -> str:
    of_one = int(np.count_nonzero(same))
    return f"{of_one:,} pairs of one person, {len(same) - of_one:,} of two"


def _shortened(name: str) -> str:
    """A name whose middle is left out where it is long: both ends of a path tell something."""
    name, half = " ".join(name.split()), _NAME // 2
    return name if len(name) <= _NAME else f"{name[: half - 1]}…{name[-half:]}"


def _save(figure: Any, path: pathlib.Path) -> None:
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # those that no font has are drawn as boxes
        figure.savefig(temporary, dpi=110, format="png")
