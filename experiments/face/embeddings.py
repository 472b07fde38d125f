"""Embeddings of unit length, whose products are the cosines that faces are compared by."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from experiments.face.task import unit_embeddings
from experiments.face.trained import Embedder
from experiments.runtime.errors import UserError, reason
from experiments.runtime.files import replacing
from experiments.runtime.sources.splits import digest_of
from experiments.runtime.task import Variables


class Gallery(NamedTuple):
    """Embeddings of many images, as they are kept in a file.

    Attributes:
      names: of the images.
      embeddings: of unit length.
      network: the `digest` of the network that made them; "" where the file does not tell.
    """

    names: Sequence[str]
    embeddings: Float[np.ndarray, "count embedding_size"]
    network: str


def compiled(
    embedder: Embedder,
) -> Callable[[UInt8[np.ndarray, "batch height width 3"]], Float[Array, "batch embedding_size"]]:
    """`unit_embeddings` of a run's network."""

    @jax.jit
    def embed(network: Variables, images: Array) -> Array:
        flip = embedder.config.train.flip
        return unit_embeddings(embedder.model.apply, network, images, flip=flip)

    return lambda images: embed(embedder.network, images)


def check_finite(
    embeddings: Float[np.ndarray, "count embedding_size"], run_dir: pathlib.Path
) -> None:
    """Refuses embeddings that are NaN, by which no two images would be of one person.

    Raises:
      UserError: there are such.
    """
    if not np.isfinite(embeddings).all():
        raise UserError(
            f'RUN-DIR: embeddings by the run in "{run_dir}" are no numbers (NaN); its training has '
            "diverged."
        )


def digest(embedder: Embedder) -> str:
    """The same for the same network, trained for as long."""
    arrays = jax.tree.leaves(jax.device_get(embedder.network))
    return digest_of(np.ascontiguousarray(array).tobytes() for array in arrays)


def write_gallery(path: pathlib.Path, gallery: Gallery) -> None:
    """Writes embeddings to an .npz, whose arrays are named as the attributes of `Gallery`.

    Raises:
      UserError: it cannot be written.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                embeddings=gallery.embeddings,
                names=np.array(gallery.names, np.str_),
                network=np.array(gallery.network),
            )
    except OSError as error:
        raise UserError(f'--out: "{path}" cannot be written: {reason(error)}.') from None


def read_gallery(option: str, path: pathlib.Path) -> Gallery:
    """Reads a file of `write_gallery`, or another .npz of "embeddings" and "names".

    Args:
      option: that named the file, for errors.
      path: the file.

    Raises:
      UserError: it is no such file.
    """
    try:
        # NumPy leaves a file open that it has opened itself and cannot read.
        with path.open("rb") as file, np.load(file) as arrays:
            embeddings, names = arrays["embeddings"], arrays["names"]
            network = str(arrays["network"]) if "network" in arrays else ""
        gallery = Gallery(names.tolist(), embeddings.astype(np.float32), network)
        right = embeddings.ndim == 2 and names.shape == embeddings.shape[:1] and len(names) > 0
    except FileNotFoundError:
        raise UserError(f'{option}: there is no "{path}".') from None
    except Exception:  # of many kinds, as there are wrong files
        right = False
    if not right:
        raise UserError(
            f'{option}: "{path}" is no file of embeddings and names, as python -m '
            "experiments.face.embed writes it."
        )
    return gallery
