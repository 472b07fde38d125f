"""Bytes that the real TPU compiler says a program moves, on a machine that has no TPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from drconv_jax.region_conv import IMPLEMENTATIONS, region_conv
from experiments.runtime.tpu import devices
from experiments.speed.cases import Case


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One shape on TPU v5e in bfloat16, m = 8, the 1x1 region convolution forward.

    Attributes:
      case: the shape, a case of level "tpu".
      implementation: of the region convolution.
      fused: bytes accessed by it, given filters in row-major order: the order in which a layer's
        program stores them, and in which the kernel reads them.
      relaid: bytes accessed by it where filters are arguments of a program like all others. The
        compiler lays those out with the batch innermost, and copies them for the kernel.
      convolution: bytes accessed by the 1x1 convolution.
      filters: bytes of the m filters of all samples.
      guide: bytes of the guide features.
      is_lower_bound: the program has a loop, whose body the compiler counts only once.
    """

    case: Case
    implementation: str
    fused: float
    relaid: float
    convolution: float
    filters: float
    guide: float
    is_lower_bound: bool

    @property
    def ratio(self) -> float:
        """To the convolution, the filters and the guide."""
        return self.fused / (self.convolution + self.filters + self.guide)


def implementations() -> list[str]:
    """Those that are meant for TPUs, the best first."""
    return [name for name in ("pallas", "blocked") if name in IMPLEMENTATIONS]


def measure(case: Case, implementation: str) -> Bytes | str:
    """The bytes, or in one line why the compiler did not tell."""
    pixels, channels = (case.batch, case.size, case.size), case.features
    try:
        device = jax.sharding.SingleDeviceSharding(_device())
        array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=device)
        x, kernel = array((*pixels, channels)), array((1, 1, channels, channels))
        filters = array((case.batch, *case.regions, *kernel.shape))
        row_major = array(
            filters.shape, sharding=Format(Layout(tuple(range(filters.ndim))), device)
        )
        guide = array((*pixels, *case.regions))
        op = functools.partial(region_conv, implementation=implementation)
        convolution, _ = _bytes_accessed(_convolution, x, kernel)
        fused, has_loop = _bytes_accessed(op, x, row_major, guide)
        relaid, _ = _bytes_accessed(op, x, filters, guide)
    except Exception as error:  # the compiler and a kernel under development fail in many ways
        return f"{case.label} {implementation}: {str(error).splitlines()[0]}"
    return Bytes(
        case,
        implementation,
        fused,
        relaid,
        convolution,
        filters.size * 2,
        guide.size * 2,
        has_loop,
    )


@functools.cache
def _device() -> jax.Device:
    return devices("v5e:2x2")[0]


def _bytes_accessed(function: Callable[..., Any], *args: Any) -> tuple[float, bool]:
    program = jax.jit(function).lower(*args).compile()
    cost, text = program.cost_analysis(), program.as_text()
    if cost is None or text is None:
        raise RuntimeError("the compiler tells neither costs nor the program's text.")
    return float(cost["bytes accessed"]), " while(" in text


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
