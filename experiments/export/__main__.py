"""Writes a trained network to a file that runs without its code, and checks that file.

The network of a run of experiments.classification, from its newest checkpoint, becomes a StableHLO
or ONNX file for any batch size: uint8 images (batch, size, size, 3) in, logits (batch, classes)
out. Batch norms are folded into the convolutions before them. `drconv_jax.export.load_exported`
runs a StableHLO file, onnxruntime and others an ONNX file (pip install '.[onnx]'), which computes
in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array

from drconv_jax.fold import fold_batch_norm
from experiments.classification.trained import TrainedNetwork, trained_network
from experiments.export import files
from experiments.runtime import commands
from experiments.runtime.errors import UserError
from experiments.runtime.images import normalize

# What tells runs of other experiments, and the commands that export them.
_OTHERS = {
    "categories.json": ("a detector", "experiments.detection.export"),
    "people.json": ("face recognition", "experiments.face.export"),
}


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(
            files.Arguments, prog="python -m experiments.export", description=__doc__
        )
        run_dir = arguments.run_dir
        for name, (kind, command) in _OTHERS.items():
            if (run_dir / name).exists():
                raise UserError(
                    f'RUN-DIR: the run in "{run_dir}" is of {kind}; export it with python -m '
                    f"{command} {run_dir}."
                )
        network = trained_network(run_dir, "RUN-DIR", in_float32=arguments.format == "onnx")
        run, variables = logits_of(network, fold=arguments.fold)
        size = network.config.image_size
        print(files.write(arguments, run, variables, (size, size), "logits"))


def logits_of(
    network: TrainedNetwork, *, fold: bool
) -> tuple[Callable[[Any, Array], Array], dict[str, Any]]:
    """A function of variables and uint8 images to logits, and the variables.

    Args:
      network: what is trained.
      fold: whether batch norms are folded.
    """
    apply: Callable[..., Any] = network.model.apply
    variables, size = network.variables, network.config.image_size
    if fold:
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        apply, variables = fold_batch_norm(network.model, variables, images)
    return lambda variables, images: apply(variables, normalize(images)), variables


if __name__ == "__main__":
    main()
