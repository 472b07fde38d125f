"""The kernel that fits the platform, chosen when the program is lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from drconv_jax.region_conv import blocked, cpu
from drconv_jax.region_conv.fused import Statics
from drconv_jax.region_conv.sharding import varying


def forward(statics: Statics, x: Array, filters: Array, guide_features: Array) -> Array:
    """See `fused.Kernel.forward`."""
    return _by_platform("forward", statics, x, filters, guide_features)


def backward(
    statics: Statics, x: Array, filters: Array, guide_features: Array, y: Array, dy: Array
) -> tuple[Array, Array, Array]:
    """See `fused.Kernel.backward`."""
    return _by_platform("backward", statics, x, filters, guide_features, y, dy)


def _by_platform(direction: str, statics: Statics, *arrays: Array) -> Any:
    default = functools.partial(getattr(blocked, direction), statics)
    if not cpu.does(arrays[0].dtype):
        return default(*arrays)
    native = functools.partial(getattr(cpu, direction), statics)
    here = varying(functools.partial(unless_exported, native, default))
    return jax.lax.platform_dependent(*arrays, cpu=here, default=default)


def unless_exported(inside: Callable[..., Any], exported: Callable[..., Any], *args: Array) -> Any:
    """`inside(*args)`, but `exported(*args)` in a program that `jax.export` takes elsewhere.

    A native kernel is a custom call that only this package knows; an exported program must run
    without it. Both functions return the same shapes.
    """
    return _unless(("exported",), inside, exported, inside, *args)


def unless_exported_or_partitioned(
    inside: Callable[..., Any], otherwise: Callable[..., Any], *args: Array
) -> Any:
    """`inside(*args)`, but `otherwise(*args)` in a program that is either of both."""
    return _unless(("exported", "partitioned"), inside, otherwise, inside, *args)


def unless_partitioned(
    inside: Callable[..., Any], partitioned: Callable[..., Any], *args: Array
) -> Any:
    """`inside(*args)`, but `partitioned(*args)` in a program that XLA parts among devices.

    XLA cannot part a TPU kernel, nor be told how: it would gather the batch on every device. Within
    `shard_map` over all axes of a mesh a program is parted already. Both functions return the same
    shapes.
    """
    return _unless(("partitioned",), inside, partitioned, partitioned, *args)


def _unless(
    conditions: tuple[str, ...],
    inside: Callable[..., Any],
    otherwise: Callable[..., Any],
    shaped: Callable[..., Any],
    *args: Array,
) -> Any:
    """`shaped` is the one of the two that is traced faster."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(shaped, *args))
    results = _unless_p.bind(
        *args,
        conditions=conditions,
        inside=inside,
        otherwise=otherwise,
        shapes=tuple(ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves),
    )
    return jax.tree.unflatten(tree, results)


def _lower_unless(
    ctx: mlir.LoweringRuleContext,
    *args: Any,
    conditions: tuple[str, ...],
    inside: Any,
    otherwise: Any,
    shapes: Any,
) -> Any:
    del shapes
    module = ctx.module_context
    holds = {
        "exported": module.lowering_parameters.for_export,
        "partitioned": _is_partitioned(module.axis_context),
    }
    function = otherwise if any(holds[name] for name in conditions) else inside
    return mlir.lower_fun(lambda *a: jax.tree.leaves(function(*a)), multiple_results=True)(
        ctx, *args
    )


def _is_partitioned(context: Any) -> bool:
    if hasattr(context, "manual_axes"):  # of `shard_map`, which may leave some axes to XLA
        return set(context.manual_axes) != set(context.mesh.axis_names)
    # Of the others, only the context of a program that XLA parts tells a number of devices.
    return getattr(context, "num_devices", None) not in (None, 1)


_unless_p = Primitive("unless")
_unless_p.multiple_results = True
_unless_p.def_impl(lambda *args, inside, **_: jax.tree.leaves(jax.jit(inside)(*args)))
_unless_p.def_abstract_eval(lambda *avals, shapes, **_: list(shapes))
mlir.register_lowering(_unless_p, _lower_unless)
