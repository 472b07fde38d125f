"""The library of native CPU kernels, and how its functions are called from a JAX program.

The headers here are what all kernels have in common; the kernels themselves lie with the Python
that calls them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.machinery
import itertools
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array


def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    here = pathlib.Path(__file__).parent
    paths = (here / f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return "drconv_jax was installed without its native CPU kernels, for want of a C++ compiler"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return f"drconv_jax's native CPU kernels cannot be loaded ({error}); install it again"


_library = _load()


@functools.cache
def available() -> bool:
    """Whether the package has its native kernels; the first call warns where it has not."""
    if isinstance(_library, str):
        warnings.warn(f"{_library}; on CPUs it is slower without them.", stacklevel=2)
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A function of the library, known to JAX where there is a library.

    Make it when a module is imported, so that a process can load an executable which another one
    has serialized.

    Attributes:
      name: of the function.
      by_batch: whether the first axis of all its arguments and results is one batch, whose samples
        it treats apart; XLA can then partition it along that axis.
    """

    name: str
    by_batch: bool = False

    def __post_init__(self) -> None:
        """Makes it known to JAX."""
        if isinstance(_library, str):
            return
        function = jax.ffi.pycapsule(getattr(_library, self.name))
        jax.ffi.register_ffi_target(self.name, function, platform="cpu")
        if self.by_batch:
            jax.ffi.register_ffi_target_as_batch_partitionable(self.name)

    def __call__(
        self, results: Sequence[jax.ShapeDtypeStruct], *arrays: Array, **attributes: Any
    ) -> list[Array]:
        """Calls the function, in a program for CPUs.

        Args:
          results: their shapes and dtypes.
          arrays: the arguments.
          attributes: integers or tuples of them.

        Returns:
          The results. `shard_map` takes them for the same on every device: who calls within it
          must type them as varying.
        """
        shapes = tuple(ShapedArray(result.shape, result.dtype) for result in results)
        named = tuple(attributes.items())
        return _native.bind(*arrays, kernel=self, results=shapes, attributes=named)


# As `jax.ffi.ffi_call`, which cannot tell XLA how a call is partitioned among devices.
_native = Primitive("drconv_native")
_native.multiple_results = True


def _lower(
    ctx: mlir.LoweringRuleContext, *args: Any, kernel: Kernel, results: Any, attributes: Any
) -> Any:
    del results
    extra = None
    if kernel.by_batch:
        shapes = [aval.shape for aval in (*ctx.avals_in, *ctx.avals_out)]
        extra = {
            "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": "1"}),
            "sdy.sharding_rule": mlir.ir.Attribute.parse(_rule_by_batch(shapes, len(args))),
        }
    numbers = {name: np.array(value, np.int64)[()] for name, value in attributes}
    return jax.ffi.ffi_lowering(kernel.name, extra_attributes=extra)(ctx, *args, **numbers)


def _rule_by_batch(shapes: Sequence[Sequence[int]], arguments: int) -> str:
    """Shardy's rule for arrays that are partitioned along their first axis, all of them alike."""
    symbols = itertools.chain("jklmnopqrstuvwxyz", (f"z_{i}" for i in itertools.count(1)))
    rest = [[(next(symbols), length) for length in shape[1:]] for shape in shapes]
    sides = [f"[{', '.join(['i', *(name for name, _ in axes)])}]" for axes in rest]
    factors = list(itertools.chain(*rest))
    mapping = f"({', '.join(sides[:arguments])})->({', '.join(sides[arguments:])})"
    sizes = ", ".join(f"{name}={length}" for name, length in [("i", shapes[0][0]), *factors])
    whole = ", ".join(name for name, _ in factors)
    return f"#sdy.op_sharding_rule<{mapping} {{{sizes}}} need_replication={{{whole}}}, custom>"


_native.def_impl(lambda *args, **params: jax.jit(functools.partial(_native.bind, **params))(*args))
_native.def_abstract_eval(lambda *avals, results, **_: list(results))
mlir.register_lowering(_native, _lower, platform="cpu")
