"""Derivatives of every order and mode for a function whose gradient is computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from drconv_jax.region_conv.sharding import varying_like

Arrays = tuple[Array, ...]
Function = Callable[..., Array]
Derivative = Callable[[Arrays, Arrays], tuple[Any, Any]]


def with_gradient(
    function: Function, gradient: Callable[..., Arrays], definition: Function
) -> Function:
    """`function`, whose gradient is `gradient` and whose other derivatives are the definition's.

    `jax.custom_vjp` would give the gradient alone: it has no forward mode, and what it computes
    cannot be differentiated again unless JAX can differentiate `gradient` itself.

    Args:
      function: of arrays, giving one array; need not be differentiable.
      gradient: (*args, y, dy) to the gradients of all arguments, with y the result of `function`
        and dy its gradient; need not be differentiable.
      definition: the same function of plain JAX operations, however slow. Forward mode
        differentiates it, and so does whatever differentiates a gradient.
    """

    def gradient_by_definition(*args: Array) -> Arrays:
        *inputs, _, dy = args
        return jax.vjp(definition, *inputs)[1](dy)

    def derivative_of_gradient(primals: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays]:
        return pull_back(*primals), jax.jvp(gradient_by_definition, primals, tangents)[1]

    def derivative(primals: Arrays, tangents: Arrays) -> tuple[Array, Array]:
        y = differentiable(*primals)
        functions = {"definition": definition, "pull_back": pull_back}
        return y, _differential.bind(*primals, y, *tangents, **functions)

    pull_back = with_derivative(gradient, derivative_of_gradient)
    differentiable: Function = with_derivative(function, derivative)
    return differentiable


def with_derivative(function: Callable[..., Any], derivative: Derivative) -> Callable[..., Any]:
    """`function`, with a derivative that need not be its own.

    It is `jax.custom_jvp`, but for functions that JAX cannot differentiate at all: in some
    places, as in loops, JAX forgets a custom_jvp and differentiates what is inside.

    Args:
      function: of arrays.
      derivative: (primals, tangents) to the result of `function` and its tangent.
    """

    def call(*args: Array) -> Any:
        args = varying_like(args, *args)  # in `shard_map`, a gradient has its argument's type
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _derived.bind(*args, call=traced, derivative=derivative)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


# A traced function that is differentiated by a rule of its own.
_derived = Primitive("derived")
_derived.multiple_results = True


def _call(*args: Array, call: ClosedJaxpr, derivative: Derivative) -> list[Array]:
    del derivative
    return jaxpr_as_fun(call)(*args)


def _derive(
    primals: Any, tangents: Any, *, call: ClosedJaxpr, derivative: Derivative
) -> tuple[list[Array], list[Array]]:
    del call
    results, changes = derivative(tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))
    return jax.tree.leaves(results), jax.tree.leaves(changes)


def _map_derived(
    args: Any, axes: Any, *, call: ClosedJaxpr, derivative: Derivative
) -> tuple[list[Array], list[int]]:
    whole = _with_axis_first(args, axes)
    mapped = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(call)))(*whole)
    results = _derived.bind(*whole, call=mapped, derivative=jax.vmap(derivative))
    return results, [0] * len(results)


_derived.def_impl(_call)
_derived.def_abstract_eval(lambda *avals, call, derivative: list(call.out_avals))
ad.primitive_jvps[_derived] = _derive
batching.primitive_batchers[_derived] = _map_derived
mlir.register_lowering(_derived, mlir.lower_fun(_call, multiple_results=True))

# The differential of `definition` at the first operands, applied to as many tangents, the last
# ones. JAX transposes it for the gradient, which is `pull_back`. In between stands the result.
_differential = Primitive("differential")


def _differentiated(*operands: Array, definition: Function, pull_back: Callable[..., Any]) -> Array:
    del pull_back
    primals, _, tangents = _parted(operands)
    return jax.jvp(definition, primals, tangents)[1]


def _parted(operands: Sequence[Any]) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]]:
    count = len(operands) // 2
    return tuple(operands[:count]), operands[count], tuple(operands[count + 1 :])


def _derive_differential(primals: Any, tangents: Any, **functions: Any) -> tuple[Array, Array]:
    def differentiated(*operands: Array) -> Array:
        return _differentiated(*operands, **functions)

    tangents = tuple(map(ad.instantiate_zeros, tangents))
    dy = _differential.bind(*primals, **functions)
    return dy, jax.jvp(differentiated, tuple(primals), tangents)[1]


def _transpose(
    dy: Any, *operands: Any, definition: Function, pull_back: Callable[..., Any]
) -> list[Any]:
    del definition
    primals, y, tangents = _parted(operands)
    gradients: Sequence[Any] = [None] * len(tangents)
    if not isinstance(dy, ad.Zero):
        gradients = pull_back(*primals, y, dy)
    wanted = [
        gradient if ad.is_undefined_primal(tangent) else None
        for gradient, tangent in zip(gradients, tangents, strict=True)
    ]
    return [None] * (len(primals) + 1) + wanted


def _map_differential(
    operands: Any, axes: Any, *, definition: Function, pull_back: Callable[..., Any]
) -> tuple[Array, int]:
    functions = {"definition": jax.vmap(definition), "pull_back": jax.vmap(pull_back)}
    return _differential.bind(*_with_axis_first(operands, axes), **functions), 0


def _with_axis_first(arrays: Any, axes: Any) -> list[Array]:
    """Arrays that `vmap` maps over an axis of each, or of some: over the first of all."""
    size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
    return [batching.bdim_at_front(a, axis, size) for a, axis in zip(arrays, axes, strict=True)]


_differential.def_impl(_differentiated)
_differential.def_abstract_eval(lambda *avals, **_: _parted(avals)[1])
ad.primitive_jvps[_differential] = _derive_differential
ad.primitive_transposes[_differential] = _transpose
batching.primitive_batchers[_differential] = _map_differential
mlir.register_lowering(_differential, mlir.lower_fun(_differentiated, multiple_results=False))
