"""Networks as ONNX files, by jax2onnx (`pip install 'drconv_jax[onnx]'`).

ONNX has no loop that JAX's would fit and no native kernel. Here every DRConv is made of products
and a select (`implementation="select"`), depthwise convolutions are ONNX's own, and max pooling is
a maximum of shifted inputs; no number is changed beyond rounding.
"""

from __future__ import annotations

import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import InterceptorContext
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.typing import DTypeLike
from jaxtyping import Array

from drconv_jax import depthwise
from drconv_jax.geometry import Window, tap_views
from drconv_jax.linen import DRConv


def export_onnx(
    path: str | os.PathLike[str],
    apply: Callable[[Any, Array], Array],
    variables: Any,
    input_shape: Sequence[int],
    *,
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Writes a network of flax.linen with its weights to an ONNX file, for any batch size.

    The file has one input "inputs" (batch, *input_shape) and one output "outputs". A DRConv in it
    does m times the multiply-adds of the layer here: every position meets all filters.

    Example::

      apply, folded = fold_batch_norm(model, variables, jnp.ones((1, 224, 224, 3)))
      export_onnx("model.onnx", apply, folded, (224, 224, 3))

    Args:
      path: the file, which is there whole or not at all; one that is there is replaced.
      apply: (variables, inputs) to one array, such as `model.apply`, at inference.
      variables: kept in the file.
      input_shape: of one sample, without the batch.
      dtype: of the inputs.

    Raises:
      ImportError: jax2onnx is not installed.
      ValueError: the network has a part that jax2onnx cannot convert.
    """
    try:
        jax2onnx = importlib.import_module("jax2onnx")
    except ImportError:
        raise ImportError(
            "ONNX files need jax2onnx: pip install 'drconv_jax[onnx]', or only jax2onnx and onnx."
        ) from None
    inputs = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), *input_shape), dtype)
    # Traced before jax2onnx puts its own layers in place of flax's, which it does while converting.
    traced = jax.make_jaxpr(functools.partial(_of_plain_operations(apply), variables))(inputs)

    def network(inputs: Array) -> Array:
        (outputs,) = _evaluated(traced.jaxpr, traced.consts, [inputs])
        return outputs

    try:
        model = jax2onnx.to_onnx(
            network, [inputs], input_names=["inputs"], output_names=["outputs"]
        )
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"jax2onnx cannot convert the network: {error}") from error
    path = pathlib.Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(model.SerializeToString())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _of_plain_operations(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply`, whose layers use operations that ONNX has."""

    def plainly(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        layer = context.module
        if context.method_name == "__call__":
            # A bound module is this trace's own copy, and no other call sees the change.
            if isinstance(layer, DRConv):
                object.__setattr__(layer, "implementation", "select")
            elif getattr(layer, "conv_general_dilated", None) is depthwise.conv_general_dilated:
                object.__setattr__(layer, "conv_general_dilated", None)
        return call(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(plainly):
            return apply(*args, **kwargs)

    return run


def _evaluated(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """A traced function's results, with max pooling in another form."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        operands = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            results = _evaluated(inner.jaxpr, inner.consts, operands)
        elif eqn.primitive.name == "reduce_window_max":
            results = [_max_pool(*operands, **eqn.params)]
        elif eqn.primitive.name == "pad":
            results = [_pad(*operands, **eqn.params)]
        else:
            variables = [v for v in eqn.invars if not isinstance(v, Literal)]
            alone = Jaxpr([], variables, eqn.outvars, [eqn], eqn.effects)
            results = jaxpr_as_fun(ClosedJaxpr(alone, []))(*(values[v] for v in variables))
        values.update(zip(eqn.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _max_pool(
    x: Array,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Array:
    """The maximum of the inputs under each tap; pooling of (batch, *spatial, channels)."""
    if any(d != 1 for d in base_dilation):
        raise NotImplementedError("max pooling of dilated inputs")
    lowest = jnp.full((), -jnp.inf, x.dtype)
    x = _pad(x, lowest, padding_config=[(low, high, 0) for low, high in padding])
    inner = slice(1, -1)
    window = Window(
        tuple(window_dimensions[inner]),
        tuple(window_strides[inner]),
        ((0, 0),) * (x.ndim - 2),
        tuple(window_dilation[inner]),
    )
    return functools.reduce(jnp.maximum, tap_views(x, window))


def _pad(x: Array, value: Any, *, padding_config: Sequence[tuple[int, int, int]]) -> Array:
    """`jax.lax.pad` by concatenation, because jax2onnx wants to know the batch size there."""
    for axis, (low, high, interior) in enumerate(padding_config):
        if interior or low < 0 or high < 0:
            raise NotImplementedError("padding between values or by less than nothing")

        def block(length: int, axis: int = axis, x: Array = x) -> Array:
            return jnp.broadcast_to(value, (*x.shape[:axis], length, *x.shape[axis + 1 :]))

        parts = [block(low)] * (low > 0) + [x] + [block(high)] * (high > 0)
        x = jnp.concatenate(parts, axis) if len(parts) > 1 else x
    return x
