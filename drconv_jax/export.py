"""Networks as StableHLO files, which any process with JAX runs without the code of the network."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

PLATFORMS = ("cpu", "tpu", "cuda")
_KNOWN = (*PLATFORMS, "rocm")


def export_model(
    path: str | os.PathLike[str],
    apply: Callable[..., Any],
    variables: Any,
    input_shape: Sequence[int] | Sequence[jax.ShapeDtypeStruct],
    *,
    dtype: DTypeLike = jnp.float32,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes a network with its weights to a file, for any batch size.

    Example::

      apply, folded = fold_batch_norm(model, variables, jnp.ones((1, 224, 224, 3)))
      export_model("model.stablehlo", apply, folded, (224, 224, 3))

    Args:
      path: the file, which is there whole or not at all; one that is there is replaced.
      apply: (variables, inputs) to outputs, such as `model.apply`, at inference.
      variables: kept in the file.
      input_shape: of one sample, without the batch; or, where apply takes several inputs, the shape
        and dtype of each.
      dtype: of the input; of no meaning where there are several.
      platforms: where it will run, as `jax.export` names them; "gpu" is "cuda".

    Raises:
      ValueError: a platform is unknown, or none is given.
    """
    platforms = platform_names(platforms)
    batch = jax.export.symbolic_shape("batch")
    samples = [s for s in input_shape if isinstance(s, jax.ShapeDtypeStruct)]
    samples = samples or [jax.ShapeDtypeStruct(tuple(input_shape), dtype)]
    inputs = [jax.ShapeDtypeStruct((*batch, *sample.shape), sample.dtype) for sample in samples]
    run = jax.jit(lambda *inputs: apply(variables, *inputs))
    exported = jax.export.export(run, platforms=platforms)(*inputs)
    path = pathlib.Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(exported.serialize())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def platform_names(platforms: Sequence[str]) -> tuple[str, ...]:
    """The names that `jax.export` has for platforms, each once.

    Raises:
      ValueError: a platform is unknown, or none is given.
    """
    names = tuple(dict.fromkeys("cuda" if name == "gpu" else name for name in platforms))
    if not names or not set(names) <= set(_KNOWN):
        given = ", ".join(f'"{name}"' for name in platforms) or "none"
        raise ValueError(f"platforms must be some of {', '.join(_KNOWN)} or gpu, got {given}.")
    return names


def load_exported(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The network in a file of `export_model`, as a function of its inputs with a batch axis.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such file.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        exported = jax.export.deserialize(bytearray(data))
    except Exception as error:  # flatbuffers fails in as many ways as there are wrong bytes
        raise ValueError(f'"{path}" is no network that jax.export wrote, or not whole.') from error
    run: Callable[..., Any] = jax.jit(exported.call)
    return run
