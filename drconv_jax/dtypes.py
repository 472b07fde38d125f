"""The dtype that sums are taken in."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def accumulator(dtype: DTypeLike) -> np.dtype:
    """float32 for a floating-point dtype that is narrower, otherwise the dtype itself."""
    return np.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)
