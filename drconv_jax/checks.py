"""Checks of arguments that several parts share; every message names the argument and its value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises where an argument that counts something is no integer of at least `least`.

    Raises:
      TypeError: it is no integer; True and False are none either.
      ValueError: it is too small.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_counts(name: str, values: Sequence[Any], number: int, least: int = 1) -> None:
    """Raises where an argument is no sequence of that many integers of at least `least` each.

    Raises:
      TypeError: it is no sequence, or an entry is no integer.
      ValueError: it has another number of entries, or one is too small.
    """
    if np.ndim(values) == 0:
        raise TypeError(f"{name} must be a sequence of {number} integers, got {values!r}.")
    if len(values) != number:
        raise ValueError(f"{name} must have {number} entries, got {tuple(values)}.")
    for value in values:
        check_count(f"every entry of {name}", value, least)


def check_precision(precision: Any) -> None:
    """Raises ValueError where `precision` is not one for all operands of a product."""
    try:
        jax.lax.Precision(precision)
    except ValueError:
        names = ", ".join(repr(member.name.lower()) for member in jax.lax.Precision)
        raise ValueError(
            f"precision must be None, a jax.lax.Precision or one of {names}, got {precision!r}."
        ) from None


def check_guide_dtype(guide_features: Any) -> None:
    """Raises TypeError where guide features are of a type that no gradient could reach."""
    if not jnp.issubdtype(guide_features.dtype, jnp.floating):
        raise TypeError(
            f"guide features must be floating point, got {guide_features.dtype}: cast them with "
            ".astype(jnp.float32), or make them of region indices with "
            "jax.nn.one_hot(indices, regions)."
        )
