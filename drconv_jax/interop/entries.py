"""One array of a state dict, and how a whole state dict is held to what a module needs.

A state dict is often wrapped: the checkpoint of a training script has it beside other things, and
DistributedDataParallel, torch.compile and modules around a network put a prefix before every name.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from drconv_jax.weights import in_plain_memory

UNKNOWN = 0  # channels that no weight tells, because it is missing itself
# Under what name checkpoints keep the state dict, the likeliest first.
_KEPT_AS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array: its path and dtype in the variables, and its name and shape in PyTorch."""

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    dtype: DTypeLike = jnp.float32


def converted(entry: Entry, array: np.ndarray) -> Array:
    """An array as the variable that it becomes.

    Raises:
      ValueError: a number of it is larger than the variable's dtype can hold.
    """
    with np.errstate(over="ignore"):
        variable = jnp.asarray(entry.convert(array), entry.dtype)
    if np.isfinite(array).all() and not jnp.isfinite(variable).all():
        raise ValueError(
            f"{entry.name} has numbers that {jnp.dtype(entry.dtype).name} cannot hold, up to "
            f"{np.abs(array).max():.3g}; give the module a wider param_dtype."
        )
    return variable


def converted_back(entry: Entry, variable: Array | np.ndarray) -> np.ndarray:
    """The array that `converted` makes this variable of, where it only moves numbers."""
    size = math.prod(entry.shape)
    places = entry.convert(np.arange(size).reshape(entry.shape))
    array = np.empty(size, variable.dtype)
    array[places.ravel()] = np.asarray(variable).ravel()
    return array.reshape(entry.shape)


def oihw_to_hwio(kernel: np.ndarray) -> np.ndarray:
    """PyTorch keeps kernels as (out, in, *kernel), Flax as (*kernel, in, out)."""
    return np.moveaxis(kernel, (0, 1), (-1, -2))


def arrays_of(state_dict: Any) -> dict[str, np.ndarray]:
    """The arrays of a state dict, or of a checkpoint that holds one, which is said in a warning.

    Raises:
      TypeError: it is no mapping of names to arrays.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must be a mapping of names to arrays, as a PyTorch module's state_dict() "
            f"returns it, got {type(state_dict).__name__}."
        )
    inner = [name for name, value in state_dict.items() if isinstance(value, Mapping)]
    if name := next((name for name in _KEPT_AS if name in inner), None):
        warnings.warn(f'The weights are those in the checkpoint\'s "{name}".', stacklevel=3)
        return arrays_of(state_dict[name])
    if inner and not any(np.ndim(value) for name, value in state_dict.items() if name not in inner):
        raise TypeError(
            "state_dict must map names to arrays, but holds the mappings "
            f"{', '.join(map(repr, inner))}; pass the one that is the network's state dict."
        )
    # Beside arrays, a mapping says something about them, as "_metadata" does.
    state_dict = {name: value for name, value in state_dict.items() if name not in inner}
    return {str(name): _as_numpy(str(name), value) for name, value in state_dict.items()}


def prefix_of(names: Collection[str], entries: Sequence[Entry]) -> str:
    """What stands before every name, such as "module."; empty where the names are the entries'.

    Raises:
      ValueError: it stands before some names only, of which the module has its arrays.
    """
    expected = {entry.name for entry in entries}
    counts: collections.Counter[str] = collections.Counter()
    for name in sorted(names, key=len):
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        counts.update(name.removesuffix(end) for end in ends if end in expected)
    prefix, count = next(iter(counts.most_common(1)), ("", 0))
    if 2 * count < len(expected):  # a state dict of something else
        return ""
    if not all(name.startswith(prefix) for name in names):
        raise ValueError(
            f"the state dict has {count} of {len(expected)} arrays under names that begin with "
            f'"{prefix}", and others besides; pass {{k.removeprefix("{prefix}"): v for k, v in '
            f'state_dict.items() if k.startswith("{prefix}")}}.'
        )
    return prefix


def check_names(entries: Sequence[Entry], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where entries are missing, unexpected or misshapen, listing all."""
    expected = {entry.name: entry.shape for entry in entries}
    problems = [f"missing: {name}" for name in expected if name not in arrays]
    problems += [
        f"unexpected: {name} {array.shape}"
        for name, array in arrays.items()
        if name not in expected and not name.endswith("num_batches_tracked")
    ]
    problems += [
        f"not floating-point: {name} is {arrays[name].dtype.name}"
        for name in expected
        if name in arrays and not jnp.issubdtype(arrays[name].dtype, jnp.floating)
    ]
    problems += [
        f"misshapen: {name} is {arrays[name].shape}, must be {_shown(shape)}"
        for name, shape in expected.items()
        if name in arrays and not _fits(arrays[name].shape, shape)
    ]
    if problems:
        raise ValueError("the state dict does not fit the module; " + "; ".join(problems) + ".")


def _as_numpy(name: str, value: Any) -> np.ndarray:
    """A tensor of PyTorch, wherever it lies, or anything that numpy takes for an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which numpy does not have
            value = value.float()
    array = in_plain_memory(value)
    if array.dtype == object:
        raise TypeError(
            f'state_dict["{name}"] must be an array, got {type(value).__name__}; of a whole '
            "PyTorch module, pass what its state_dict() returns."
        )
    return array


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(
        e in (UNKNOWN, n) for n, e in zip(shape, expected, strict=True)
    )


def _shown(shape: tuple[int, ...]) -> str:
    return (
        str(shape)
        if UNKNOWN not in shape
        else "(" + ", ".join("any" if n == UNKNOWN else str(n) for n in shape) + ")"
    )
