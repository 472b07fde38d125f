"""Writes a trained network of faces to a file that runs without its code, and checks that file.

The network of a run of experiments.face, from its newest checkpoint, becomes a StableHLO or ONNX
file for any batch size: uint8 images (batch, height, width, 3) in, embeddings of unit length,
float32 (batch, size), out. Where the run adds the embedding of an image's mirror image, so does the
file. Batch norms are folded into the convolutions before them. `drconv_jax.export.load_exported`
runs a StableHLO file, onnxruntime and others an ONNX file (pip install '.[onnx]'). What ONNX cannot
do: choose the filters of a DRConv, so that every position meets all m of them and the layer does m
times the multiply-adds; and compute in bfloat16, so that the file computes in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float, UInt8

from drconv_jax.fold import fold_batch_norm
from experiments.export import files
from experiments.face.task import unit_embeddings
from experiments.face.trained import Embedder, read_embedder
from experiments.runtime import commands
from experiments.runtime.task import Variables


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(
            files.Arguments, prog="python -m experiments.face.export", description=__doc__
        )
        embedder = read_embedder("RUN-DIR", arguments.run_dir)
        if arguments.format == "onnx":
            in_float32 = dataclasses.replace(embedder.config.model, dtype="float32")
            embedder = embedder._replace(model=in_float32.build())
        run, network = embeddings_of(embedder, fold=arguments.fold)
        print(files.write(arguments, run, network, embedder.config.image_size, "embeddings"))


def embeddings_of(
    embedder: Embedder, *, fold: bool
) -> tuple[Callable[[Variables, Array], Array], Variables]:
    """A function of variables and uint8 images to embeddings of unit length, and the variables.

    Args:
      embedder: what is trained.
      fold: whether batch norms are folded.
    """
    apply: Callable[..., Any] = embedder.model.apply
    network, config = embedder.network, embedder.config
    if fold:
        images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
        apply, network = fold_batch_norm(embedder.model, network, images)

    def run(
        network: Variables, images: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch embedding_size"]:
        return unit_embeddings(apply, network, images, flip=config.train.flip)

    return run, network


if __name__ == "__main__":
    main()
