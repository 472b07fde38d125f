"""Blocks of arrays in kernels that Pallas compiles with Triton: what the GPU's kernels share."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX 0.12 says that it will go
    triton = None


def check_triton() -> None:
    """Raises NotImplementedError where this JAX has no Triton kernels."""
    if triton is None:
        raise NotImplementedError(
            f"is made of Triton kernels through Pallas, which JAX {jax.__version__} lacks"
        )


def block_of(channels: int, most: int = 64) -> int:
    """How many channels a program takes at once: a power of two that a product can have."""
    return min(most, max(16, 2 ** math.ceil(math.log2(channels))))


def span(block: Any, size: int, end: int) -> tuple[Any, Array]:
    """The slice of a block, and which of its entries lie before `end`."""
    return pl.ds(block * size, size), block * size + jnp.arange(size, dtype=jnp.int32) < end


def load(ref: Any, rows: Array, columns: Array) -> Array:
    """A block of a matrix, zeros outside the rows and columns named."""
    return triton.load(ref, mask=rows[:, None] & columns[None, :], other=0)


def store(ref: Any, values: Array, rows: Array, columns: Array) -> None:
    """Writes a block of a matrix where the rows and columns are named."""
    triton.store(ref, values.astype(ref.dtype), mask=rows[:, None] & columns[None, :])


def dot(a: Array, b: Array, precision: Any) -> Array:
    """The product of two blocks, summed in float32."""
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def struct(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """A result that varies over the same axes of a `shard_map` as `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
