"""Networks as ONNX files, by jax2onnx (`pip install '.[onnx]'` in a clone of this repository).

ONNX has no loop that JAX's would fit and no native kernel. Here every DRConv is made of products
and a select (`implementation="select"`), convolutions are ONNX's own and not what is made for one
platform, max pooling is a maximum of shifted inputs, and what narrow numbers are summed up in wide
ones is made wide before; no number is changed beyond rounding.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.module import InterceptorContext
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.typing import DTypeLike
from jaxtyping import Array

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
      ValueError: the network has an operation that jax2onnx cannot convert, or that onnxruntime
        (asked where it is installed) cannot run, such as any in bfloat16; or apply returns more
        than one array, or looks at the batch size.
    """
    try:
        jax2onnx = importlib.import_module("jax2onnx")
    except ImportError:
        raise ImportError(
            "ONNX files need jax2onnx and onnxruntime: pip install '.[onnx]' in a clone of "
            "drconv_jax's repository."
        ) from None
    inputs = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), *input_shape), dtype)
    # Traced before jax2onnx puts its own layers in place of flax's, which it does while converting.
    try:
        traced = jax.make_jaxpr(functools.partial(_of_plain_operations(apply), variables))(inputs)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(
            f"an ONNX file is for any batch size, but the network is not: {_first_line(error)}; "
            "write inputs.shape[0] for the batch size, and branch on nothing that depends on it."
        ) from error
    if len(traced.jaxpr.outvars) != 1:
        raise ValueError(f"apply must return one array, got {len(traced.jaxpr.outvars)}.")

    def network(inputs: Array) -> Array:
        (outputs,) = _evaluated(traced.jaxpr, traced.consts, [inputs])
        return outputs

    try:
        with _kept_as_it_was():
            model = jax2onnx.to_onnx(
                network, [inputs], input_names=["inputs"], output_names=["outputs"]
            )
        content = model.SerializeToString()
    except Exception as error:  # of jax2onnx, jax, onnx and protobuf, each in its own ways
        name = _operation_at(error.__traceback__)
        operation = f'the operation "{name}"' if name else "the network"
        raise ValueError(
            f"jax2onnx cannot convert {operation}: {_first_line(error)}; {_REMEDY}"
        ) from error
    _check(content, input_shape, dtype)
    path = pathlib.Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_REMEDY = (
    'leave it out of the network (to a DRConv outside flax.linen give implementation="select"), or '
    "write a StableHLO file with drconv_jax.export.export_model."
)


def _check(content: bytes, input_shape: Sequence[int], dtype: DTypeLike) -> None:
    """Refuses a file that ONNX does not allow or that onnxruntime, if it is there, does not run."""
    try:
        importlib.import_module("onnx").checker.check_model(content)
        with contextlib.suppress(ImportError):
            session = quiet_session(content)
            for batch in (1, 2):
                session.run(None, {"inputs": np.zeros((batch, *input_shape), dtype)})
    except Exception as error:  # onnxruntime has a type for each of its error codes, with no base
        raise ValueError(
            f"the network's ONNX file would not run: {_first_line(error)}; compute in float32 "
            f"(build the network with dtype=jnp.float32), {_REMEDY}"
        ) from error


def quiet_session(model: str | os.PathLike[str] | bytes) -> Any:
    """An onnxruntime session on the CPU that raises errors and prints nothing.

    Args:
      model: an ONNX file, or what it contains.

    Raises:
      ImportError: onnxruntime is not installed.
    """
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _kept_as_it_was() -> Iterator[None]:
    """Undoes what jax2onnx does to other packages; and onnx_ir says nothing of unknown types."""
    logger = logging.getLogger("onnx_ir.serde")
    level, cumsum = logger.level, jnp.cumsum
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        jnp.cumsum = cumsum  # jax2onnx leaves its own, which takes fewer arguments


def _operation_at(stack: TracebackType | None) -> str | None:
    """The innermost operation of JAX that was being converted when an error was raised."""
    found = (frame.f_locals.get("eqn") for frame, _ in traceback.walk_tb(stack))
    names = [eqn.primitive.name for eqn in found if isinstance(eqn, JaxprEqn)]
    return names[-1] if names else None


def _of_plain_operations(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply`, whose layers use operations that ONNX has."""

    def plainly(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, DRConv):
            # A bound module is this trace's own copy, and no other call sees the change.
            object.__setattr__(layer, "implementation", "select")
        return call(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(plainly):
            return apply(*args, **kwargs)

    return run


def _evaluated(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """A traced function's results, with the operations of `_RULES` in another form."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        operands = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        if eqn.primitive.name in _CALLS:
            results = _call(eqn, *operands)
        elif (rule := _RULES.get(eqn.primitive.name)) and _has_rules(eqn):
            results = rule(eqn, *operands)
        else:
            variables = [v for v in eqn.invars if not isinstance(v, Literal)]
            alone = Jaxpr([], variables, eqn.outvars, [eqn], eqn.effects)
            results = jaxpr_as_fun(ClosedJaxpr(alone, []))(*(values[v] for v in variables))
        values.update(zip(eqn.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _has_rules(eqn: JaxprEqn) -> bool:
    """Whether this operation, or one within it, must be in another form."""
    if eqn.primitive.name in _RULES and eqn.primitive.name not in _CONTROL:
        return True
    values = jax.tree.leaves(list(eqn.params.values()))
    inner = [getattr(value, "jaxpr", value) for value in values]
    return any(_has_rules(e) for jaxpr in inner if isinstance(jaxpr, Jaxpr) for e in jaxpr.eqns)


def _function(inner: Jaxpr | ClosedJaxpr) -> Callable[..., list[Any]]:
    """A traced function that is part of another, evaluated in the same way."""
    jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, [])
    return lambda *args: _evaluated(jaxpr, consts, args)


def _call(eqn: JaxprEqn, *operands: Any) -> list[Any]:
    """What only differs from its inner function in training, or in how it is compiled."""
    return _function(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])(*operands)


def _cond(eqn: JaxprEqn, index: Any, *operands: Any) -> Any:
    if isinstance(index, np.integer):  # of `_platform_index`
        return _function(eqn.params["branches"][index])(*operands)
    return jax.lax.switch(
        index, [_function(branch) for branch in eqn.params["branches"]], *operands
    )


def _platform_index(eqn: JaxprEqn) -> list[Any]:
    """Of the functions for several platforms, the one for all that are not named."""
    return [np.int32(eqn.params["platforms"].index(None))]


def _while(eqn: JaxprEqn, *operands: Any) -> Any:
    in_cond, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    goes_on, body = _function(eqn.params["cond_jaxpr"]), _function(eqn.params["body_jaxpr"])
    of_cond, of_body = operands[:in_cond], operands[in_cond : in_cond + in_body]
    return jax.lax.while_loop(
        lambda carry: goes_on(*of_cond, *carry)[0],
        lambda carry: body(*of_body, *carry),
        list(operands[in_cond + in_body :]),
    )


def _scan(eqn: JaxprEqn, *operands: Any) -> list[Any]:
    body, count = _function(eqn.params["jaxpr"]), eqn.params["num_carry"]
    fixed, rest = operands[: eqn.params["num_consts"]], operands[eqn.params["num_consts"] :]

    def step(carry: list[Any], x: Any) -> tuple[list[Any], list[Any]]:
        results = body(*fixed, *carry, *x)
        return results[:count], results[count:]

    carry, stacked = jax.lax.scan(
        step,
        list(rest[:count]),
        list(rest[count:]),
        eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    return [*carry, *stacked]


def _summed_up_wide(eqn: JaxprEqn, *operands: Any) -> list[Any]:
    """A product or a convolution, whose result in ONNX has the dtype of its operands."""
    result: Any = eqn.outvars[0].aval
    return [eqn.primitive.bind(*(jnp.asarray(o, result.dtype) for o in operands), **eqn.params)]


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
        if interior:
            raise NotImplementedError("padding between values")
        if low < 0 or high < 0:
            x = jax.lax.slice_in_dim(x, -min(low, 0), x.shape[axis] + min(high, 0), axis=axis)
            low, high = max(low, 0), max(high, 0)

        def block(length: int, axis: int = axis, x: Array = x) -> Array:
            return jnp.broadcast_to(value, (*x.shape[:axis], length, *x.shape[axis + 1 :]))

        parts = [block(low)] * (low > 0) + [x] + [block(high)] * (high > 0)
        x = jnp.concatenate(parts, axis) if len(parts) > 1 else x
    return x


_CALLS = frozenset(
    ("jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
)
_CONTROL: Mapping[str, Callable[..., Any]] = {"cond": _cond, "while": _while, "scan": _scan}
_RULES: Mapping[str, Callable[..., Any]] = {
    **_CONTROL,
    "dot_general": _summed_up_wide,
    "conv_general_dilated": _summed_up_wide,
    "reduce_window_max": lambda eqn, x: [_max_pool(x, **eqn.params)],
    "platform_index": _platform_index,
    "pad": lambda eqn, x, value: [_pad(x, value, **eqn.params)],
}
