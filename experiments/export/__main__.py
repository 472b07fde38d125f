"""Writes a trained network to a file that runs without its code, and checks that file.

The network of a run of experiments.classification, from its newest checkpoint, becomes a StableHLO
or ONNX file for any batch size: uint8 images (batch, size, size, 3) in, logits (batch, classes)
out. Batch norms are folded into the convolutions before them. `drconv_jax.export.load_exported`
runs a StableHLO file, onnxruntime and others an ONNX file (pip install '.[onnx]'), which computes
in float32.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

from drconv_jax.export import PLATFORMS, export_model, load_exported, platform_names
from drconv_jax.fold import fold_batch_norm
from drconv_jax.onnx import export_onnx, quiet_session
from experiments.classification.trained import TrainedNetwork, trained_network
from experiments.runtime import commands
from experiments.runtime.errors import UserError
from experiments.runtime.images import normalize

# Another order of sums moves logits by rounding, which grows through the layers.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a trained network to a file that runs without its code, and checks that file."""

    run_dir: tyro.conf.Positional[commands.Path]
    """The run's folder."""
    format: Literal["stablehlo", "onnx"] = "stablehlo"
    """Of the file. In ONNX a DRConv does m times the layer's multiply-adds."""
    out: commands.Path | None = None
    """The file to write; default: model.stablehlo or model.onnx in the run's folder."""
    fold: bool = True
    """Whether batch norms are folded."""
    platforms: tuple[str, ...] = PLATFORMS
    """Where a StableHLO file shall run, as jax.export names them; gpu is cuda."""

    def __post_init__(self) -> None:
        try:
            platform_names(self.platforms)
        except ValueError as error:
            raise UserError(f"--platforms: {error}") from None


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(Arguments, prog="python -m experiments.export", description=__doc__)
        out = arguments.out or arguments.run_dir / f"model.{arguments.format}"
        if (arguments.run_dir / "categories.json").exists():
            raise UserError(
                f'RUN-DIR: the run in "{arguments.run_dir}" is of a detector; export it with '
                f"python -m experiments.detection.export {arguments.run_dir}."
            )
        onnx = arguments.format == "onnx"
        network = trained_network(arguments.run_dir, "RUN-DIR", in_float32=onnx)
        run, variables = logits_of(network, fold=arguments.fold)
        size = network.config.image_size
        try:
            _write(out, run, variables, size, arguments)
        except OSError as error:
            raise UserError(f'--out: "{out}" cannot be written: {error.strerror}.') from None
        platforms = platform_names(arguments.platforms)
        if onnx or jax.export.default_export_platform() in platforms:
            load = _load_onnx if onnx else load_exported
            difference = check(out, load, run, variables, size)
            checked = f"read back, its logits differ by at most {difference:.1e} of the largest"
        else:
            checked = "not read back, since this machine is none of these"
        where = "ONNX" if onnx else ", ".join(platforms)
        print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB for {where}; {checked}")


def _write(
    out: pathlib.Path, run: Callable[..., Any], variables: Any, size: int, arguments: Arguments
) -> None:
    shape = (size, size, 3)
    if arguments.format == "onnx":
        try:
            export_onnx(out, run, variables, shape, dtype=np.uint8)
        except (ImportError, ValueError) as error:
            raise UserError(f"--format onnx: {error}") from None
        return
    export_model(out, run, variables, shape, dtype=np.uint8, platforms=arguments.platforms)


def _load_onnx(path: pathlib.Path) -> Callable[[Array], Any]:
    """The network in an ONNX file, by onnxruntime on a CPU."""
    session = quiet_session(path)
    return lambda inputs: session.run(["outputs"], {"inputs": np.asarray(inputs)})[0]


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


def check(
    path: pathlib.Path,
    load: Callable[[pathlib.Path], Callable[[Array], Any]],
    run: Callable[[Any, Array], Array],
    variables: Any,
    size: int,
) -> float:
    """The largest difference between the file's logits and the network's, relative.

    Raises:
      UserError: it is more than rounding; the file is removed.
    """
    exported, difference = load(path), 0.0
    for batch in (1, 3):
        images = np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3), np.uint8)
        logits = jax.jit(run)(variables, images)
        tolerance, expected = _TOLERANCES[logits.dtype.name], np.asarray(logits, np.float32)
        error = np.abs(np.asarray(exported(jnp.asarray(images)), np.float32) - expected).max()
        difference = max(difference, float(error / np.abs(expected).max()))
    if not difference <= tolerance:
        path.unlink()
        raise UserError(
            f'"{path}" would give logits that differ by {difference:.1e} of the largest from the '
            "network's, and is removed; please report this with the run's config.json."
        )
    return difference


if __name__ == "__main__":
    main()
