"""Who computes a region convolution: the choice, and what all implementations are given.

A convolution is one primitive until its program is lowered, and so is its gradient. Only then it
is known for which platform the program is, whether `jax.export` takes it elsewhere, and whether
XLA partitions it among devices: then an implementation is chosen.

Every implementation is given here: derivatives of every mode and order, `vmap` (which becomes a
larger batch), filters that are mixed beforehand where it takes no mixtures, and the reason why it
declined, told together with those of all others that were named.

The rule for exported programs: whatever `jax.export` takes elsewhere is made of XLA's operations
alone, so that it runs without this package, unless an implementation is named that is not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn, Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float

from drconv_jax.dtypes import accumulator
from drconv_jax.guide import softmax_vjp
from drconv_jax.region_conv import (
    cpu,
    experts_first,
    experts_first_gpu,
    experts_first_tpu,
)
from drconv_jax.region_conv.blocked import blocked
from drconv_jax.region_conv.cost_model import defaults
from drconv_jax.region_conv.derivatives import with_gradient
from drconv_jax.region_conv.mixture import Mixture, mix
from drconv_jax.region_conv.pallas_gpu import pallas_gpu
from drconv_jax.region_conv.pallas_tpu import pallas_tpu
from drconv_jax.region_conv.reference import reference
from drconv_jax.region_conv.select import select
from drconv_jax.region_conv.sharding import varying_like
from drconv_jax.region_conv.spec import ConvSpec, Filters, Implementation

Direction = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Support:
    """Where an implementation can be used.

    Attributes:
      implementation: of it.
      filters: which it takes. "given": those that are mixed already, and mixtures are mixed for it
        beforehand; "mixtures": these alone; "any": both.
      platforms: names of XLA's platforms.
      exported: whether a program that `jax.export` takes elsewhere may have it; what is not made
        of XLA's operations only where it is named.
      partitioned: whether a program that XLA partitions among devices may have it. XLA must then
        know that samples are apart, or it would gather the batch on every device. "given filters":
        it may, with mixtures that are mixed beforehand.
    """

    implementation: Implementation
    filters: Literal["given", "mixtures", "any"] = "given"
    platforms: tuple[str, ...] = ("cpu", "cuda", "rocm", "tpu")
    exported: Literal["yes", "by name", "no"] = "yes"
    partitioned: Literal["yes", "given filters", "no"] = "yes"


IMPLEMENTATIONS: Mapping[str, Support] = {
    "reference": Support(reference, partitioned="no"),  # openxla/xla#47945
    "select": Support(select),
    "blocked": Support(blocked),
    "experts_first": Support(experts_first, "mixtures"),
    "cpu": Support(cpu, "any", ("cpu",), exported="no", partitioned="given filters"),
    "pallas_tpu": Support(pallas_tpu, "given", ("cpu", "tpu"), "by name", "no"),
    "pallas_gpu": Support(pallas_gpu, "given", ("cpu", "cuda"), "no", "no"),
    "experts_first_tpu": Support(experts_first_tpu, "mixtures", ("tpu",), "by name", "no"),
    "experts_first_gpu": Support(experts_first_gpu, "mixtures", ("cuda",), "no", "no"),
}


def convolve(
    spec: ConvSpec,
    x: Float[Array, "batch *spatial in"],
    filters: Filters,
    guide_features: Float[Array, "batch *out_spatial regions"],
    implementation: str | Sequence[str] | None,
) -> Float[Array, "batch *out_spatial features"]:
    """The region convolution of arguments that are checked and not empty, differentiable.

    Args:
      spec, x, filters, guide_features: see `spec.Implementation`.
      implementation: a name, or names to try in turn, or None to choose.

    Raises:
      ValueError: a name is unknown, or none is given.
      NotImplementedError: none of the named implementations does what is asked.
    """
    names = names_of(implementation)
    if names:
        _choose(names, None, spec, x, filters, guide_features)  # to fail here, if at all
    leaves, tree = jax.tree.flatten(filters)
    call = _Call(spec, names, tree)

    def definition(x: Array, *rest: Array) -> Array:
        *leaves, guide_features = rest
        filters = _mixed(call, jax.tree.unflatten(tree, leaves))
        return select.forward(spec, x, filters, guide_features)

    if names == ("select",):  # whose operations are all that a converter may meet
        return definition(x, *leaves, guide_features)

    def forward(*args: Array) -> Array:
        (y,) = _bind("forward", call, args)
        return y

    def gradient(*args: Array) -> tuple[Array, ...]:
        *gradients, scores = _bind("backward", call, args)
        *_, guide_features, _, _ = args
        return *gradients, softmax_vjp(guide_features, scores)

    return with_gradient(forward, gradient, definition)(x, *leaves, guide_features)


def names_of(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in turn; none where it is left to the default.

    Raises:
      ValueError: a name is unknown, or the sequence is empty.
    """
    if implementation is None:
        return ()
    names = [implementation] if isinstance(implementation, str) else implementation
    if not np.iterable(names) or not names or not all(name in IMPLEMENTATIONS for name in names):
        raise ValueError(
            f"implementation must be None or made of {', '.join(IMPLEMENTATIONS)}, got "
            f"{implementation!r}."
        )
    return tuple(names)


# --- The choice.


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of a program that is lowered.

    Attributes:
      platform: it is compiled for.
      exported: whether `jax.export` takes it elsewhere.
      partitioned: whether XLA partitions it among devices. Within `shard_map` over all axes of a
        mesh a program is partitioned already, and this is False.
    """

    platform: str
    exported: bool
    partitioned: bool


def _choose(
    names: Sequence[str],
    program: Program | None,
    spec: ConvSpec,
    x: Any,
    filters: Any,
    guide_features: Any,
) -> tuple[Support, bool]:
    """The first that does what is asked, and whether filters must be mixed for it beforehand.

    Raises:
      NotImplementedError: none does; the message has the reason of each.
    """
    reasons = []
    for name in names:
        support = IMPLEMENTATIONS[name]
        try:
            _check_program(support, program)
            return support, _check_arguments(support, program, spec, x, filters, guide_features)
        except NotImplementedError as reason:
            reasons.append(f'"{name}" {reason}')
    raise NotImplementedError(f"implementation {'; '.join(reasons)}.")


def _check_program(support: Support, program: Program | None) -> None:
    if program is None:
        return
    if program.platform not in support.platforms:
        where = " and ".join(support.platforms)
        raise NotImplementedError(f"runs on {where}, and this program is for {program.platform}")
    if program.exported and support.exported == "no":
        raise NotImplementedError("cannot be in a program that jax.export takes elsewhere")
    if program.partitioned and support.partitioned == "no":
        raise NotImplementedError(
            "cannot be in a program that XLA partitions among devices (use jax.shard_map over all "
            "axes of the mesh)"
        )


def _check_arguments(
    support: Support,
    program: Program | None,
    spec: ConvSpec,
    x: Any,
    filters: Any,
    guide_features: Any,
) -> bool:
    """Whether filters must be mixed beforehand."""
    supports = support.implementation.supports
    is_mixture = isinstance(filters, Mixture)
    if support.filters == "mixtures" and not is_mixture:
        raise NotImplementedError("takes a Mixture, not filters that are mixed already")
    partitioned = program is not None and program.partitioned
    if support.filters != "given" and not (partitioned and support.partitioned != "yes"):
        try:
            supports(spec, x, filters, guide_features)
            return False
        except NotImplementedError:
            if support.filters == "mixtures" or not is_mixture:
                raise
    given = jax.ShapeDtypeStruct(filters.shape, filters.dtype)
    supports(spec, x, given, guide_features)
    return is_mixture


# --- The primitive.


@dataclasses.dataclass(frozen=True)
class _Call:
    """A region convolution, apart from its arrays."""

    spec: ConvSpec
    names: tuple[str, ...]  # none: choose by `defaults`
    filters: Any  # how their arrays are put together


_conv_p = Primitive("region_conv")
_conv_p.multiple_results = True


def _bind(direction: Direction, call: _Call, args: Sequence[Array]) -> list[Array]:
    typed: list[Array] = varying_like(_conv_p.bind(*args, direction=direction, call=call), *args)
    return typed


def _shapes(*args: Any, direction: Direction, call: _Call) -> list[ShapedArray]:
    x, *leaves = args[: 1 + call.filters.num_leaves]
    guide = args[len(leaves) + 1]
    if direction == "forward":
        filters = jax.tree.unflatten(call.filters, leaves)
        return [ShapedArray((*guide.shape[:-1], filters.shape[-1]), x.dtype)]
    scores = ShapedArray(guide.shape, accumulator(x.dtype))
    return [*(ShapedArray(a.shape, a.dtype) for a in (x, *leaves)), scores]


def _lower(
    platform: str, ctx: mlir.LoweringRuleContext, *args: Any, direction: Direction, call: _Call
) -> Any:
    module = ctx.module_context
    exported = module.lowering_parameters.for_export
    program = Program(platform, exported, _is_partitioned(module.axis_context))
    compute = functools.partial(_compute, direction, call, program)
    return mlir.lower_fun(compute, multiple_results=True)(ctx, *args)


def traced(equation: JaxprEqn, program: Program) -> Jaxpr:
    """What a primitive "region_conv" of a traced function becomes in such a program."""
    compute = functools.partial(
        _compute, equation.params["direction"], equation.params["call"], program
    )
    shapes: list[Any] = [variable.aval for variable in equation.invars]
    structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in shapes]
    return jax.make_jaxpr(compute)(*structs).jaxpr


def _is_partitioned(context: Any) -> bool:
    if hasattr(context, "manual_axes"):  # of `shard_map`, which may leave some axes to XLA
        shape = context.mesh.shape
        return any(shape[axis] > 1 for axis in set(shape) - set(context.manual_axes))
    # Of the others, only the context of a program that XLA partitions tells a number of devices.
    return getattr(context, "num_devices", None) not in (None, 1)


def _compute(direction: Direction, call: _Call, program: Program, *args: Array) -> list[Array]:
    """Either direction, by the implementation that is chosen for the program."""
    x, *leaves = args[: 1 + call.filters.num_leaves]
    guide_features, *y_and_dy = args[1 + len(leaves) :]
    filters = jax.tree.unflatten(call.filters, leaves)
    names = call.names
    if not names:
        names = defaults(program.platform, x, filters, guide_features)
        if program.exported:
            names = tuple(name for name in names if IMPLEMENTATIONS[name].exported == "yes")
    support, mixed_before = _choose(names, program, call.spec, x, filters, guide_features)

    def compute(*args: Any) -> list[Array]:
        results = getattr(support.implementation, direction)(call.spec, *args)
        return jax.tree.leaves(varying_like(results, *jax.tree.leaves(args)))

    if mixed_before:
        return _mixing_first(compute, call, args)
    return compute(x, filters, guide_features, *y_and_dy)


def _mixed(call: _Call, filters: Filters) -> Array:
    return mix(filters, call.spec.precision) if isinstance(filters, Mixture) else filters


def _mixing_first(compute: Any, call: _Call, args: Sequence[Array]) -> list[Array]:
    """`compute(x, filters, guide_features, ...)` with filters that are mixed beforehand."""
    x, *leaves = args[: 1 + call.filters.num_leaves]
    filters, pull = jax.vjp(
        lambda *leaves: _mixed(call, jax.tree.unflatten(call.filters, leaves)), *leaves
    )
    results = compute(x, filters, *args[1 + len(leaves) :])
    if len(results) == 1:
        return results
    dx, dfilters, scores = results
    return [dx, *pull(dfilters), scores]


def _map(
    args: Sequence[Array], axes: Sequence[int | None], *, direction: Direction, call: _Call
) -> tuple[list[Array], list[int]]:
    """`vmap` makes a larger batch."""
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    # The bank and the bias of a mixture have no batch axis that could become larger.
    no_batch = set(range(2, 1 + call.filters.num_leaves))
    if no_batch and (direction == "backward" or any(axes[i] is not None for i in no_batch)):
        # Each element of what is mapped has a bank, or a gradient of it, for itself: filters are
        # mixed beforehand, and "blocked" takes them where nothing that is named does.
        names = tuple(n for n in call.names if IMPLEMENTATIONS[n].filters != "mixtures")
        names = names or (("blocked",) if call.names else ())
        given = dataclasses.replace(call, names=names, filters=jax.tree.structure(0))

        def run(*args: Array) -> list[Array]:
            return _mixing_first(lambda *a: _bind(direction, given, a), call, args)

        results = jax.vmap(run, axes)(*args)
        return results, [0] * len(results)
    whole = [
        a if i in no_batch else _merged(batching.bdim_at_front(a, axis, size))
        for i, (a, axis) in enumerate(zip(args, axes, strict=True))
    ]
    results = _bind(direction, call, whole)
    return [r.reshape(size, r.shape[0] // size, *r.shape[1:]) for r in results], [0] * len(results)


def _merged(array: Array) -> Array:
    return array.reshape(-1, *array.shape[2:])


# One at a time, outside of `jit`.
@functools.partial(jax.jit, static_argnames=("direction", "call"))
def _compiled(*args: Array, direction: Direction, call: _Call) -> list[Array]:
    return _conv_p.bind(*args, direction=direction, call=call)


_conv_p.def_impl(_compiled)
_conv_p.def_abstract_eval(_shapes)
batching.primitive_batchers[_conv_p] = _map
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(_conv_p, functools.partial(_lower, _platform), platform=_platform)
