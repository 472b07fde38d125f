"""One array of a state dict, and how a whole state dict is held to what a module needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

UNKNOWN = 0  # channels that no weight tells, because it is missing itself


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array: its path in the variables, and its name and shape in PyTorch."""

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]


def oihw_to_hwio(kernel: np.ndarray) -> np.ndarray:
    """PyTorch keeps kernels as (out, in, *kernel), Flax as (*kernel, in, out)."""
    return np.moveaxis(kernel, (0, 1), (-1, -2))


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
        f"misshapen: {name} is {arrays[name].shape}, must be {_shown(shape)}"
        for name, shape in expected.items()
        if name in arrays and not _fits(arrays[name].shape, shape)
    ]
    if problems:
        raise ValueError("the state dict does not fit the module; " + "; ".join(problems) + ".")


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
