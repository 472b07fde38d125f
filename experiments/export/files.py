"""Files of networks that make an array of uint8 images: asked for, written, checked."""

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
from drconv_jax.onnx import export_onnx, quiet_session
from experiments.runtime import commands
from experiments.runtime.errors import UserError

# Another order of sums moves outputs by rounding, which grows through the layers.
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


def write(
    arguments: Arguments,
    run: Callable[[Any, Array], Array],
    variables: Any,
    size: tuple[int, int],
    outputs: str,
) -> str:
    """Writes the file and reads it back, where this machine can run it; a line about it.

    Args:
      arguments: of the command.
      run: (variables, images) to one array; images are uint8 (batch, height, width, 3).
      variables: kept in the file.
      size: height and width.
      outputs: what the array is, for people.

    Raises:
      UserError: the file cannot be written, or computes something else.
    """
    out = arguments.out or arguments.run_dir / f"model.{arguments.format}"
    onnx, shape = arguments.format == "onnx", (*size, 3)
    try:
        if onnx:
            export_onnx(out, run, variables, shape, dtype=np.uint8)
        else:
            export_model(out, run, variables, shape, dtype=np.uint8, platforms=arguments.platforms)
    except OSError as error:
        raise UserError(f'--out: "{out}" cannot be written: {error.strerror}.') from None
    except (ImportError, ValueError) as error:
        if not onnx:
            raise
        raise UserError(f"--format onnx: {error}") from None
    platforms = platform_names(arguments.platforms)
    if onnx or jax.export.default_export_platform() in platforms:
        load = _load_onnx if onnx else load_exported
        difference = _check(out, load, run, variables, shape, outputs)
        checked = f"read back, its {outputs} differ by at most {difference:.1e} of the largest"
    else:
        checked = "not read back, since this machine is none of these"
    where = "ONNX" if onnx else ", ".join(platforms)
    return f"{out}: {out.stat().st_size / 2**20:.1f} MiB for {where}; {checked}"


def _load_onnx(path: pathlib.Path) -> Callable[[Array], Any]:
    """The network in an ONNX file, by onnxruntime on a CPU."""
    session = quiet_session(path)
    return lambda inputs: session.run(["outputs"], {"inputs": np.asarray(inputs)})[0]


def _check(
    path: pathlib.Path,
    load: Callable[[pathlib.Path], Callable[[Array], Any]],
    run: Callable[[Any, Array], Array],
    variables: Any,
    shape: tuple[int, int, int],
    outputs: str,
) -> float:
    """The largest difference between the file's outputs and the network's, relative.

    Raises:
      UserError: it is more than rounding; the file is removed.
    """
    exported, difference = load(path), 0.0
    for batch in (1, 3):
        images = np.random.default_rng(batch).integers(0, 256, (batch, *shape), np.uint8)
        computed = jax.jit(run)(variables, images)
        tolerance, expected = _TOLERANCES[computed.dtype.name], np.asarray(computed, np.float32)
        error = np.abs(np.asarray(exported(jnp.asarray(images)), np.float32) - expected).max()
        difference = max(difference, float(error / np.abs(expected).max()))
    if not difference <= tolerance:
        path.unlink()
        raise UserError(
            f'"{path}" would give {outputs} that differ by {difference:.1e} of the largest from '
            "the network's, and is removed; please report this with the run's config.json."
        )
    return difference
