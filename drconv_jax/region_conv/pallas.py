"""What the Pallas kernels share: where they run, and in which dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def interpreted_on_cpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which takes `interpret`, compiled for accelerators; slow on a CPU, for tests."""

    def run(*args: Any) -> Any:
        arrays = [i for i, arg in enumerate(args) if isinstance(arg, jax.Array)]

        def called(*values: Any, interpret: bool) -> Any:
            given = dict(zip(arrays, values, strict=True))
            return kernel(*(given.get(i, arg) for i, arg in enumerate(args)), interpret=interpret)

        return jax.lax.platform_dependent(
            *(args[i] for i in arrays),
            cpu=functools.partial(called, interpret=True),
            default=functools.partial(called, interpret=False),
        )

    return run


def check_dtype(x: Any) -> None:
    """Raises NotImplementedError where x is in neither float32 nor bfloat16."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"does not compute in {x.dtype}")
