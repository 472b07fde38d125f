"""Every device computes on its own shard of the batch.

XLA does not know that a kernel, or a grouped convolution made by `vmap`, treats samples
apart: left alone it gathers the batch on every device (openxla/xla#47945). `per_shard` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def per_shard(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which treats samples apart, run on every device's own samples.

    For programs that XLA partitions, on CPUs and GPUs. JAX puts a pointer into such a program: it
    can not be serialized, and is compiled anew in every process.

    Args:
      function: of arrays whose first axis is the batch; so are its results'. It is not
        differentiated.

    Returns:
      The same function, which stays sharded along the batch without any communication.
    """

    def call(*args: Array) -> Any:
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
        results = jax.tree.leaves(jax.eval_shape(function, *shapes))
        names = [f"a{i}" for i in range(sum(a.ndim - 1 for a in (*args, *results)))]
        fresh = iter(names)  # a factor a dimension: samples alone share one

        def factors(arrays: Sequence[Any]) -> str:
            return ", ".join(
                " ".join(["b", *(next(fresh) for _ in range(a.ndim - 1))]) for a in arrays
            )

        partitioned = custom_partitioning(function)
        partitioned.def_partition(
            partition=functools.partial(_partition, function),
            sharding_rule=f"{factors(args)} -> {factors(results)}",
            need_replication_factors=tuple(names),
        )
        return varying_like(partitioned(*args), *args)

    return call


def along_batch(function: Callable[..., Any], *, batch_dims: int = 1) -> Callable[..., Any]:
    """`function`, its results sharded along the batch as its first argument is, and no other way.

    Axes of a mesh that are Explicit, as `jax.make_mesh` makes them, want the sharding of every
    operation's result known. Within `function` they are Auto: there XLA finds it.

    Args:
      function: of an array whose first dimensions are the batch, and of anything else; the first
        dimensions of its results are the same.
      batch_dims: how many dimensions those are.
    """

    def call(x: Array, *args: Any) -> Any:
        meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves((x, args)))
        mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if mesh is None:
            return function(x, *args)
        spec = PartitionSpec(*jax.typeof(x).sharding.spec[:batch_dims])
        run = jax.sharding.auto_axes(
            function, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, spec)
        )
        return run(x, *args)

    return call


def varying_like(values: Any, *like: Array) -> Any:
    """`values`, typed as varying over the axes of `shard_map` that any of `like` varies over."""
    axes = frozenset[Any]().union(*(jax.typeof(a).manual_axis_type.varying for a in like))

    def cast(value: Array) -> Array:
        missing = tuple(axes - jax.typeof(value).manual_axis_type.varying)
        return jax.lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(cast, values)


def _partition(function: Callable[..., Any], mesh: Any, args: Any, results: Any) -> Any:
    if mesh.empty:  # no array of the program names its mesh: none is parted
        by_batch = args[0].sharding
    else:
        by_batch = NamedSharding(mesh, PartitionSpec(*args[0].sharding.spec[:1]))

    def on_shard(*args: Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # not one that the caller set
            return function(*args)

    return mesh, on_shard, jax.tree.map(lambda _: by_batch, results), (by_batch,) * len(args)
