"""Batch norms folded into the layers before them, for inference.

With its running statistics, a batch norm multiplies every channel by a number and adds another. The
layer in front can do both: the number scales what its output is linear in (a DRConv: the last layer
of its filter generator), the other is its bias.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.module import InterceptorContext
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Var

from drconv_jax import fast_cpu
from drconv_jax.boxes import unboxed
from drconv_jax.dtypes import accumulator
from drconv_jax.functional import Hyperparameters
from drconv_jax.linen import DRConv

_NORMS = (nn.BatchNorm, fast_cpu.BatchNorm)

Path = tuple[str, ...]
_Shape = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A layer or a norm as it was called: its variables' shapes, its result's dtype."""

    module: Any
    shapes: dict[Path, _Shape]
    dtype: np.dtype


def fold_batch_norm(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Folds the batch norms of any flax.linen model into the layers before them.

    The model is traced once, without computing anything, to find every `nn.BatchNorm` that reads
    the very output of an `nn.Conv` (of any kind), `nn.Dense` or `DRConv` which nothing else reads.
    Other batch norms stay as they are: behind another layer (a subclass counts as another), behind
    an activation, of another axis than the last, called twice, or in an `nn.scan`.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from drconv_jax.fold import fold_batch_norm
      >>> from drconv_jax.models import ShuffleNetV2
      >>> model = ShuffleNetV2(width=0.5, num_classes=10, blocks=(1, 1, 1))
      >>> x = jnp.ones((1, 32, 32, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), x)
      >>> apply, folded = fold_batch_norm(model, variables, x, train=False)
      >>> list(folded)  # no running statistics: all norms are folded
      ['params']
      >>> jax.jit(apply)(folded, x).shape
      (1, 10)

    Args:
      model: the model.
      variables: its variables.
      *args: of `model.apply` after the variables: arrays, or their shapes and dtypes.
      **kwargs: of `model.apply`, whatever is no array, such as train=False.

    Returns:
      A function that is called as `model.apply` is, in evaluation mode, with the variables that
      are returned with it. It does not run the folded norms, nor do the variables have their
      arrays; the layers before them have a "bias".

    Raises:
      ValueError: a batch norm would use the batch's statistics. So does the returned function.
    """
    calls, pairs = _trace(model, variables, args, kwargs)
    flat = flatten_dict(variables)
    folded: dict[Path, np.dtype] = {}
    biased: set[Path] = set()
    for layer, norm in pairs:
        if any(_shapes_at(flat, path) != calls[path].shapes for path in (layer, norm)):
            continue  # one of many, under a transformation such as nn.vmap
        scale, shift = _scale_and_shift(calls[norm].module, flat, norm)
        for name in _linear_in(calls[layer].module):
            key = ("params", *layer, *name)
            flat[key] = jax.tree.map(functools.partial(_multiplied, scale), flat[key])
        key = ("params", *layer, "bias")
        if key in flat:
            flat[key] = jax.tree.map(functools.partial(_multiplied, scale, plus=shift), flat[key])
        else:
            biased.add(layer)
            flat[key] = shift.astype(calls[layer].module.param_dtype)
        folded[norm] = calls[norm].dtype
        for key in [key for key in flat if key[1 : len(norm) + 1] == norm]:
            del flat[key]

    def without_norms(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module, path = context.module, context.module.path
        if context.method_name == "__call__" and path in folded:
            _check_evaluation(module, args, kwargs)
            return args[0].astype(folded[path])
        y = call(*args, **kwargs)
        if context.method_name == "__call__" and path in biased:
            bias = unboxed(module.get_variable("params", "bias"))
            y = y + _over(bias.astype(y.dtype), y)
        return y

    def apply(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(without_norms):
            return model.apply(variables, *args, **kwargs)

    return apply, unflatten_dict(flat)


def _trace(
    model: nn.Module, variables: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any]
) -> tuple[dict[Path, _Call], list[tuple[Path, Path]]]:
    """All layers and norms, and the pairs of a layer and a norm that alone reads its output."""
    calls: dict[Path, _Call] = {}
    paths: dict[str, Path] = {}  # by the names that they have in the trace

    def mark(values: Any, path: Path) -> Any:
        name = "/".join((__name__, *path))
        paths[name] = path
        return checkpoint_name(values, name)

    def observe(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module, path = context.module, context.module.path
        is_norm = type(module) in _NORMS
        if context.method_name != "__call__" or not (is_norm or _linear_in(module)):
            return call(*args, **kwargs)
        if is_norm:
            _check_evaluation(module, args, kwargs)
            if not args or module.axis not in (-1, args[0].ndim - 1):
                return call(*args, **kwargs)
            y = call(mark(args[0], path), *args[1:], **kwargs)
        else:
            y = mark(call(*args, **kwargs), path)
        seen = flatten_dict(module.variables)
        shapes = {key: _shape(v) for key, v in seen.items()}
        calls[path] = _Call(module, shapes, y.dtype)
        return y

    def run(variables: Mapping[str, Any], *args: Any) -> Any:
        with nn.intercept_methods(observe):
            return model.apply(variables, *args, **kwargs)

    jaxpr = jax.make_jaxpr(run)(variables, *args).jaxpr
    is_norm = {name: type(calls[path].module) in _NORMS for name, path in paths.items()}
    times: Counter[str] = Counter()
    chains: list[tuple[str, str]] = []
    for marks, chained in _marks_and_chains(jaxpr, paths):
        times.update(marks)
        chains += chained
    return calls, [
        (paths[layer], paths[norm])
        for layer, norm in chains
        if times[layer] == times[norm] == 1 and is_norm[norm] and not is_norm[layer]
    ]


def _marks_and_chains(
    jaxpr: Jaxpr, marks: Mapping[str, Path]
) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    """The marks in a program, and those whose result is read by one other mark and nothing else."""
    readers: dict[Var, list[Any]] = {}
    for reader, variables in [*((e, e.invars) for e in jaxpr.eqns), (None, jaxpr.outvars)]:
        for variable in variables:
            if isinstance(variable, Var):
                readers.setdefault(variable, []).append(reader)
    marked = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") in marks]
    chains = []
    for eqn in marked:
        match readers.get(eqn.outvars[0]):
            case [reader] if reader in marked:
                chains.append((eqn.params["name"], reader.params["name"]))
    yield [eqn.params["name"] for eqn in marked], chains
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "remat2"):  # what runs once, on values as they are
            inner = eqn.params["jaxpr"]
            yield from _marks_and_chains(getattr(inner, "jaxpr", inner), marks)


def _linear_in(module: nn.Module) -> list[Path]:
    """The parameters that the output, but for its bias, is linear in; features on the last axis."""
    if type(module) in (nn.Conv, nn.Dense):
        return [("kernel",)]
    if type(module) is DRConv:
        return [("filters", name) for name in Hyperparameters.of(module).generator.linear]
    return []


def _scale_and_shift(
    norm: Any, flat: Mapping[Path, jax.Array], path: Path
) -> tuple[jax.Array, jax.Array]:
    """What a norm multiplies every channel by, and what it adds."""
    mean, variance = (unboxed(flat["batch_stats", *path, name]) for name in ("mean", "var"))
    wide = accumulator(mean.dtype)
    scale = jax.lax.rsqrt(variance.astype(wide) + norm.epsilon)
    if norm.use_scale:
        scale = scale * unboxed(flat["params", *path, "scale"]).astype(wide)
    shift = -mean.astype(wide) * scale
    if norm.use_bias:
        shift = shift + unboxed(flat["params", *path, "bias"]).astype(wide)
    return scale, shift


def _shapes_at(flat: Mapping[Path, jax.Array], path: Path) -> dict[Path, _Shape]:
    """The shapes of a module's variables, by their collections and names in it."""
    end = len(path) + 1
    return {(key[0], *key[end:]): _shape(v) for key, v in flat.items() if key[1:end] == path}


def _shape(variable: Any) -> _Shape:
    """The shape of every array in a variable, which is one array or a box of one."""
    return tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(variable))


def _multiplied(scale: jax.Array, values: jax.Array, plus: jax.Array | float = 0.0) -> jax.Array:
    """Values times a number for every channel, computed as widely as that number is."""
    wide = values.astype(scale.dtype)
    return (wide * _over(scale, wide) + plus).astype(values.dtype)


def _over(channels: jax.Array, values: jax.Array) -> jax.Array:
    """A number for every channel, to go with the last axis of `values`."""
    return jnp.expand_dims(channels, range(values.ndim - 1))


def _check_evaluation(norm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    if not nn.merge_param("use_running_average", norm.use_running_average, given):
        raise ValueError(
            f"a folded network runs in evaluation mode only, but the BatchNorm at "
            f"{'/'.join(norm.path)!r} is called to use the batch's statistics; call the model with "
            "an argument such as train=False."
        )
