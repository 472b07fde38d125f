"""Every device computes on its own shard of the batch.

XLA does not know that a native kernel, or a grouped convolution made by `vmap`, treats samples
apart: left alone it gathers the batch on every device (openxla/xla#47945). `per_shard` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def per_shard(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which treats samples apart, run on every device's own samples.

    Args:
      function: of arrays whose first axis is the batch; so are its results'. It is not
        differentiated.

    Returns:
      The same function, which stays sharded along the batch under `jit` on a mesh, without any
      communication.
    """

    def call(*args: Array) -> Any:
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
        results = jax.tree.leaves(jax.eval_shape(function, *shapes))
        names = iter(f"a{i}" for i in range(1000))  # a factor a dimension: only "b" is shared
        sides = [
            ", ".join(" ".join(["b", *(next(names) for _ in a.shape[1:])]) for a in arrays)
            for arrays in (args, results)
        ]
        others = tuple(f"a{i}" for i in range(sum(a.ndim - 1 for a in (*args, *results))))
        partitioned = custom_partitioning(function)
        partitioned.def_partition(
            partition=_partition(function),
            sharding_rule=" -> ".join(sides),
            need_replication_factors=others,
        )
        return varying_like(partitioned(*args), *args)

    return call


def varying_like(values: Any, *like: Array) -> Any:
    """`values`, typed as varying over the axes of `shard_map` that any of `like` varies over."""
    axes = frozenset[Any]().union(*(jax.typeof(a).manual_axis_type.varying for a in like))

    def cast(value: Array) -> Array:
        missing = tuple(axes - jax.typeof(value).manual_axis_type.varying)
        return jax.lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(cast, values)


def _partition(function: Callable[..., Any]) -> Callable[..., Any]:
    def partition(mesh: Any, args: Any, results: Any) -> Any:
        spec = args[0].sharding.spec
        batch = NamedSharding(mesh, PartitionSpec(spec[0] if spec else None))
        return mesh, function, jax.tree.map(lambda _: batch, results), (batch,) * len(args)

    return partition
