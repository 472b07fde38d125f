"""Pictures of a trained classifier."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import UInt8

from drconv_jax import viz
from experiments.classification.config import Config
from experiments.classification.feed import held_out_image
from experiments.runtime import sources
from experiments.runtime.files import replacing
from experiments.runtime.images import normalize
from experiments.runtime.task import Variables


def draw_guide_masks(
    path: pathlib.Path,
    variables: Variables,
    model: nn.Module,
    dataset: sources.Dataset,
    config: Config,
) -> None:
    """Draws which region each position of some held-out images is in, layer by layer.

    Args:
      path: the picture.
      variables: of the network.
      model: the network.
      dataset: has the images.
      config: of the run.
    """
    pixels, labels = _examples(dataset.test, config, count=6)
    apply = jax.jit(functools.partial(model.apply, train=False, mutable="intermediates"))
    _, intermediates = apply(variables, normalize(jnp.asarray(pixels)))
    with replacing(path) as temporary:
        viz.save_guide_masks(
            temporary,
            pixels / 255,
            jax.device_get(viz.region_indices(intermediates["intermediates"])),
            config.model.regions,
            [dataset.classes[label] for label in labels],
        )


def _examples(
    split: sources.Split, config: Config, count: int
) -> tuple[UInt8[np.ndarray, "count size size 3"], Sequence[int]]:
    """Some images of several classes, and their labels."""
    if isinstance(split, sources.ArraySplit):
        chosen = np.unique(split.labels, return_index=True)[1][:count]
        return split.images[chosen], split.labels[chosen].tolist()
    found: list[tuple[np.ndarray, int]] = []
    for index in np.random.default_rng(0).permutation(len(split)).tolist():
        if len(found) == count:
            break
        with contextlib.suppress(Exception):  # a broken image, which the run has named
            content, label = split[index]
            pixels = held_out_image(content, config.image_size, config.train.augment)
            found.append((pixels, label))
    return np.stack([pixels for pixels, _ in found]), [label for _, label in found]
