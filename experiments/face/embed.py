"""Writes embeddings of all images in a folder, or a zip, with a trained network.

The network of a run of experiments.face, from its newest checkpoint, looks at images of any format
that Pillow reads, resized to the run's size, upright where their EXIF block says how they are
turned. They should show faces as those that the run was trained on do: see experiments.face.align.
An image that cannot be read is named and left out. The file --out, an .npz, gets the arrays

- embeddings, float32 (images, size): of unit length, so that the product of two is their cosine;
- names: the images' paths within the folder;
- network: which network made them, for `python -m experiments.face.compare --gallery`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tyro
from jaxtyping import Array, Float, UInt8
from rich.progress import track

from experiments.face.embeddings import (
    Gallery,
    check_finite,
    compiled,
    digest,
    write_gallery,
)
from experiments.face.trained import Embedder, read_embedder
from experiments.runtime import commands
from experiments.runtime.errors import DataLost, UserError, reason
from experiments.runtime.images import squashed
from experiments.runtime.sources.splits import count_of
from experiments.runtime.sources.trees import Reader, images_of

_BATCH = 64  # images

Pixels = UInt8[np.ndarray, "height width 3"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes embeddings of all images in a folder, or a zip, with a trained network."""

    run_dir: tyro.conf.Positional[commands.Path]
    """The run's folder."""
    images: tyro.conf.Positional[commands.Path]
    """A folder of images in any tree, or a zip of one."""
    out: commands.Path = pathlib.Path("embeddings.npz")
    """The file to write."""
    threads: int = os.cpu_count() or 1
    """Images that are read at once."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}.")
        if not self.out.absolute().parent.is_dir():  # which would show only when all is done
            raise UserError(f'--out: there is no folder "{self.out.parent}".')


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(
            Arguments, prog="python -m experiments.face.embed", description=__doc__
        )
        paths, reader, left_out = images_of(arguments.images)
        for line in left_out:
            print(f"left out: {line}", file=sys.stderr)
        if not paths:
            raise UserError(f'"{arguments.images}" holds no images.')
        embedder = read_embedder("RUN-DIR", arguments.run_dir)
        read, embeddings = embedded(paths, reader, embedder, arguments.threads)
        if not read:
            raise UserError(f"none of the {len(paths):,} images can be read; see above.")
        check_finite(embeddings, arguments.run_dir)
        names = ["/".join(reader.parts(path)) for path in read]
        write_gallery(arguments.out, Gallery(names, embeddings, digest(embedder)))
        print(
            f"{count_of(len(names), 'image')} embedded in {embeddings.shape[1]} numbers each, "
            f"{len(paths) - len(names):,} skipped; see {arguments.out}"
        )


def embedded(
    paths: Sequence[str], reader: Reader, embedder: Embedder, threads: int
) -> tuple[list[str], Float[np.ndarray, "count embedding_size"]]:
    """Embeddings of unit length of images, and which those are; the others are named on stderr.

    Args:
      paths: of the images, as the reader knows them.
      reader: reads them.
      embedder: the network.
      threads: that read and decode.

    Raises:
      DataLost: the images cannot be read any more.
    """
    batch, size = min(len(paths), _BATCH), embedder.config.image_size
    embed = compiled(embedder)

    def decoded(path: str) -> Pixels | str:
        """The image, or why it cannot be read."""
        try:
            return squashed(reader.read(path), size)
        except DataLost:
            raise
        except Exception as error:  # of any kind: one broken image never stops the command
            return reason(error)

    read: list[str] = []
    parts: list[tuple[int, Array]] = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for begin in track(range(0, len(paths), batch), "embedding images"):
            some = paths[begin : begin + batch]
            images, count = np.zeros((batch, *size, 3), np.uint8), 0
            for path, image in zip(some, pool.map(decoded, some), strict=True):
                if isinstance(image, str):
                    print(f"skipped {path}: {image}", file=sys.stderr)
                    continue
                read.append(path)
                images[count] = image
                count += 1
            parts.append((count, embed(images)))
            # The device computes while the next images are read, and is one batch behind at most.
            jax.block_until_ready([embeddings for _, embeddings in parts[-2:-1]])
    return read, np.concatenate([np.asarray(embeddings)[:count] for count, embeddings in parts])


if __name__ == "__main__":
    main()
