"""Derivatives of every order and mode for a function whose gradient is computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from drconv_jax.region_conv.sharding import varying_like

Function = Callable[..., Array]
Gradient = Callable[..., tuple[Array, ...]]


def with_gradient(function: Function, gradient: Gradient, definition: Function) -> Function:
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

    @jax.custom_jvp
    def pull_back(*args: Array) -> tuple[Array, ...]:
        return gradient(*args)

    @pull_back.defjvp
    def derivative_of_gradient(
        primals: Sequence[Array], tangents: Sequence[Array]
    ) -> tuple[Any, Any]:
        def by_definition(*args: Array) -> tuple[Array, ...]:
            *inputs, _, dy = args
            return jax.vjp(definition, *inputs)[1](dy)

        return pull_back(*primals), jax.jvp(by_definition, tuple(primals), tuple(tangents))[1]

    @jax.custom_jvp
    def differentiable(*args: Array) -> Array:
        return function(*args)

    @differentiable.defjvp
    def derivative(primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
        y = differentiable(*primals)
        dy = _differential.bind(*primals, y, *tangents, definition=definition, pull_back=pull_back)
        return y, dy

    # Within `shard_map`, gradients have the type of the arguments that they belong to.
    return lambda *args: differentiable(*varying_like(args, *args))


# The differential of `definition` at the first operands, applied to as many tangents, the last
# ones. JAX transposes it for the gradient, which is `pull_back`. In between stands the result.
_differential = Primitive("differential")


def _differentiated(*operands: Array, definition: Function, pull_back: Gradient) -> Array:
    del pull_back
    primals, _, tangents = _parted(operands)
    return jax.jvp(definition, primals, tangents)[1]


def _parted(operands: Sequence[Any]) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]]:
    count = len(operands) // 2
    return tuple(operands[:count]), operands[count], tuple(operands[count + 1 :])


def _derivative(primals: Any, tangents: Any, **functions: Any) -> tuple[Array, Array]:
    def differentiated(*operands: Array) -> Array:
        return _differentiated(*operands, **functions)

    tangents = tuple(map(ad.instantiate_zeros, tangents))
    dy = _differential.bind(*primals, **functions)
    return dy, jax.jvp(differentiated, tuple(primals), tangents)[1]


def _transposed(dy: Any, *operands: Any, definition: Function, pull_back: Gradient) -> list[Any]:
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


def _mapped(
    operands: Any, axes: Any, *, definition: Function, pull_back: Gradient
) -> tuple[Array, int]:
    size = next(o.shape[a] for o, a in zip(operands, axes, strict=True) if a is not None)
    whole = [batching.bdim_at_front(o, a, size) for o, a in zip(operands, axes, strict=True)]
    functions = {"definition": jax.vmap(definition), "pull_back": jax.vmap(pull_back)}
    return _differential.bind(*whole, **functions), 0


_differential.def_impl(_differentiated)
_differential.def_abstract_eval(lambda *avals, **_: _parted(avals)[1])
ad.primitive_jvps[_differential] = _derivative
ad.primitive_transposes[_differential] = _transposed
batching.primitive_batchers[_differential] = _mapped
mlir.register_lowering(_differential, mlir.lower_fun(_differentiated, multiple_results=False))
