"""How results are sharded, and how they vary within `shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


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
