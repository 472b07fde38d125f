"""What compilers for accelerators say of a layer, on a machine that has none of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from drconv_jax import DRConv
from experiments.runtime import gpu, tpu
from experiments.speed.cases import Case
from experiments.speed.measure import DIRECTIONS, Direction

Target = Literal["TPU v5e", "H100"]
TARGETS: tuple[Target, ...] = ("TPU v5e", "H100")
_HOW_TO_INSTALL = {"TPU v5e": "pip install '.[tpu]'", "H100": "pip install '.[cuda]'"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One layer in one direction, compiled, beside its standard convolution.

    Attributes:
      case: the layer, of level "compiled".
      target: the accelerator.
      direction: forward, or forward and the gradients of the input and all parameters.
      ours, standard: bytes that DRConv's and `nn.Conv`'s program access, by the compiler's account;
        None where it gives none, as that for GPUs does.
      temporary: bytes of DRConv's program beside its arguments and results.
      activations: bytes of the layer's input and of its output's gradient.
      kernels, standard_kernels: what the GPU is told to start, in that order; none for a TPU.
    """

    case: Case
    target: Target
    direction: Direction
    ours: float | None
    standard: float | None
    temporary: int
    activations: int
    kernels: Sequence[str]
    standard_kernels: Sequence[str]

    @property
    def ratio(self) -> float | None:
        """Of the bytes that are accessed."""
        return None if self.ours is None or self.standard is None else self.ours / self.standard

    @property
    def temporary_ratio(self) -> float:
        """Of temporary memory to the input and the output's gradient."""
        return self.temporary / self.activations


def measure(case: Case, implementation: str | None, target: Target) -> list[Compiled] | str:
    """A layer in both directions, or in one line why the compiler did not tell."""
    installed = {"TPU v5e": tpu.compiler_is_installed, "H100": gpu.compiler_is_installed}
    if not installed[target]():
        how = _HOW_TO_INSTALL[target]
        return f"There is no compiler for {target} here ({how}): nothing is said of it."
    compile_for = {"TPU v5e": _for_tpu, "H100": _for_gpu}[target]
    size = (case.kernel, case.kernel)
    layers = (
        DRConv(case.features, size, regions=case.regions[0], use_bias=False,
               implementation=implementation),
        nn.Conv(case.features, size, use_bias=False),
    )  # fmt: skip
    pixels = (case.batch, case.size, case.size)
    x, dy = (
        jax.ShapeDtypeStruct((*pixels, channels), jnp.dtype(case.dtype))
        for channels in (case.in_features, case.features)
    )
    found = []
    try:
        for direction in DIRECTIONS:
            ours, standard = (compile_for(*_program(layer, direction, x, dy)) for layer in layers)
            found.append(
                Compiled(
                    case,
                    target,
                    direction,
                    ours.bytes,
                    standard.bytes,
                    ours.temporary,
                    (x.size + dy.size) * x.dtype.itemsize,
                    ours.kernels,
                    standard.kernels,
                )
            )
    except Exception as error:  # a compiler and a kernel under development fail in many ways
        return f"{case.label} {target}: {str(error).splitlines()[0]}"
    return found


def _program(
    layer: nn.Module, direction: Direction, x: Any, dy: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and its arguments."""
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, x.dtype), variables)
    if direction == "forward":
        return layer.apply, (variables, x)

    def both(variables: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(layer.apply, variables, x)
        return y, pull(dy)

    return both, (variables, x, dy)


@dataclasses.dataclass(frozen=True)
class _Program:
    bytes: float | None
    temporary: int
    kernels: Sequence[str]


def _for_tpu(function: Callable[..., Any], args: tuple[Any, ...]) -> _Program:
    device = jax.sharding.SingleDeviceSharding(_a_tpu())
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), args)
    program = jax.jit(function).lower(*structs).compile()
    cost: Any = program.cost_analysis()
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    temporary = max(0, memory.peak_memory_in_bytes - held)
    return _Program(float(cost["bytes accessed"]), temporary, ())


@functools.cache
def _a_tpu() -> jax.Device:
    return tpu.devices("v5e:2x2")[0]


def _for_gpu(function: Callable[..., Any], args: tuple[Any, ...]) -> _Program:
    program = gpu.compile_for_gpu(function, *args)
    return _Program(None, program.temporary_bytes, program.kernels)
