"""What the Pallas kernels share: where they run, and in which dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def interpreted_on_cpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(precision, *arrays, interpret=...)`, compiled but on a CPU, where it is for tests."""

    def run(precision: Any, *arrays: Array) -> Any:
        return jax.lax.platform_dependent(
            *arrays,
            cpu=functools.partial(kernel, precision, interpret=True),
            default=functools.partial(kernel, precision, interpret=False),
        )

    return run


def check_dtype(x: Any) -> None:
    """Raises NotImplementedError where x is in neither float32 nor bfloat16."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"does not compute in {x.dtype}")
