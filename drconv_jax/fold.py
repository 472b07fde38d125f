"""Batch norms folded into the convolutions before them, for inference.

At inference a batch norm is y * s + t with s = scale / sqrt(var + epsilon) and t = bias - mean * s.
A convolution's kernel takes the factor s; in a DRConv the filter generator's last layer does, since
filters are linear in it. What remains, t, is a bias.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array

from drconv_jax.linen import DRConv

_CONVOLUTIONS = (nn.Conv, nn.ConvLocal, nn.Dense, DRConv)
# What of a convolution's parameters its output is linear in, besides the bias; features are last.
_LINEAR = (("kernel",), ("filters", "bank_kernel"), ("filters", "bank_bias"))

Path = tuple[str, ...]
Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Folded:
    """A network without the batch norms that could be folded.

    Attributes:
      model: the network as it was.
      variables: its variables without those norms', their effect in the convolutions'.
      norms: the path of every norm that is gone, to that of the convolution that took it.
    """

    model: nn.Module
    variables: Variables
    norms: dict[Path, Path]

    def apply(self, variables: Variables, x: Array, **arguments: Any) -> Any:
        """As `model.apply`, at inference, with variables like those here.

        Raises:
          ValueError: train=True is asked for.
        """
        if arguments.get("train"):
            raise ValueError(
                "train must be False for a network with folded batch norms, got True; train the "
                "network that was folded."
            )

        def without_norms(
            call: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            module: Any = context.module
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if module.path in self.norms:
                return args[0]
            y = call(*args, **kwargs)
            if module.path in self.norms.values() and not module.use_bias:
                bias = module.variables["params"]["bias"].astype(y.dtype)
                y = y + jnp.expand_dims(bias, range(y.ndim - 1))
            return y

        with nn.intercept_methods(without_norms):
            return self.model.apply(variables, x, **arguments)


def fold_batch_norm(
    model: nn.Module, variables: Variables, input_shape: Sequence[int], **arguments: Any
) -> Folded:
    """Folds every batch norm that reads the output of a convolution that nothing else reads.

    It finds them by tracing, in any flax.linen module; convolutions are `nn.Conv`, `nn.ConvLocal`,
    `nn.Dense` and `DRConv`. All other norms stay.

    Example::

      folded = fold_batch_norm(model, variables, (1, 224, 224, 3))
      logits = jax.jit(folded.apply)(folded.variables, images)

    Args:
      model: the network.
      variables: its "params" and "batch_stats".
      input_shape: of a float32 input, the batch included.
      **arguments: more arguments of the call, with which norms use their running statistics.

    Raises:
      ValueError: train=True is among the arguments.
    """
    if arguments.get("train"):
        raise ValueError("train must be False to fold batch norms, got True.")
    found = _foldable_norms(model, variables, input_shape, arguments)
    flat: dict[Path, Array] = flatten_dict(dict(variables))
    for norm, (convolution, epsilon) in found.items():
        mean, variance = (flat.pop(("batch_stats", *norm, name)) for name in ("mean", "var"))
        factor = jax.lax.rsqrt(variance + epsilon)
        factor = factor * flat.pop(("params", *norm, "scale"), jnp.ones_like(factor))
        shift = flat.pop(("params", *norm, "bias"), jnp.zeros_like(mean)) - mean * factor
        params = ("params", *convolution)
        for name in _LINEAR:
            if (path := (*params, *name)) in flat:
                flat[path] = _scaled(flat[path], factor)
        bias = flat.get((*params, "bias"), jnp.zeros_like(shift))
        flat[(*params, "bias")] = _scaled(bias, factor) + jnp.expand_dims(
            shift, range(bias.ndim - 1)
        )
    return Folded(
        model, unflatten_dict(flat), {norm: convolution for norm, (convolution, _) in found.items()}
    )


def _scaled(values: Array, factor: Array) -> Array:
    return values * jnp.expand_dims(factor, range(values.ndim - 1))


def _foldable_norms(
    model: nn.Module, variables: Variables, input_shape: Sequence[int], arguments: dict[str, Any]
) -> dict[Path, tuple[Path, float]]:
    """For every norm that can be folded, the convolution before it, and its epsilon."""
    calls: Counter[Path] = Counter()
    outputs: dict[int, tuple[Path, Any]] = {}  # by identity; held, so that none is used again
    norms: dict[Path, tuple[Path, float]] = {}

    def record(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module: Any = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        calls[module.path] += 1
        if isinstance(module, nn.BatchNorm) and id(args[0]) in outputs:
            running = kwargs.get("use_running_average", module.use_running_average)
            if running and module.axis in (-1, args[0].ndim - 1):
                norms[module.path] = (outputs[id(args[0])][0], module.epsilon)
        y = call(*args, **kwargs)
        if isinstance(module, _CONVOLUTIONS):
            y = checkpoint_name(y, _marker(module.path))
            outputs[id(y)] = (module.path, y)
        return y

    def run(variables: Variables, x: Array) -> Any:
        with nn.intercept_methods(record):
            return model.apply(variables, x, **arguments)

    x = jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32)
    readers = Counter[str]()
    for name, count in _readers(jax.make_jaxpr(run)(variables, x).jaxpr):
        readers[name] += count
    return {
        norm: (convolution, epsilon)
        for norm, (convolution, epsilon) in norms.items()
        if calls[norm] == calls[convolution] == readers[_marker(convolution)] == 1
    }


def _marker(path: Path) -> str:
    return "/".join(("output of", *path))


def _readers(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """How often every named value is read."""
    reads = Counter(
        id(v) for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")
    ) + Counter(id(v) for v in jaxpr.outvars)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            yield eqn.params["name"], reads[id(eqn.outvars[0])]
        for inner in jaxprs_in_params(eqn.params):
            yield from _readers(inner)
