"""Arrays in boxes: what an initializer gives that says more of an array than its values.

`flax.linen.with_partitioning` and its kin wrap an array in `AxisMetadata`, `flax.nnx.with_metadata`
in `VariableMetadata`. Both say, among other things, over which axes of a mesh an array is split.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

# What linen's transformations call the name of an axis that they add.
_NAME = nn.meta.PARTITION_NAME


def unboxed(value: Any) -> Array:
    """The array itself, where an initializer made it."""
    if isinstance(value, nnx.VariableMetadata):
        return value.raw_value
    (array,) = jax.tree.leaves(value)  # `nn.unbox` would split it over a mesh as well
    return array


def boxed_as(like: Any, array: Array, kept: int) -> Any:
    """An array made of others, in the box of one of them, if that is in a box.

    Args:
      like: what an initializer gave.
      array: what was made of it and of others like it.
      kept: how many of the last axes are those of `like`. They keep their names in the box; other
        axes of `array` have none there, so that they are not split over a mesh.
    """
    dropped, added = unboxed(like).ndim - kept, array.ndim - kept
    if isinstance(like, nnx.VariableMetadata):
        metadata = dict(like.metadata)
        older = metadata.pop("sharding_names", None)  # flax's name of it before
        if sharding := metadata.get("out_sharding") or older:
            named = isinstance(sharding, NamedSharding)
            names = tuple(sharding.spec if named else sharding)
            names += (None,) * (dropped + kept - len(names))
            spec = PartitionSpec(*(None,) * added, *names[dropped:])
            metadata["out_sharding"] = NamedSharding(sharding.mesh, spec) if named else tuple(spec)
        return dataclasses.replace(like, raw_value=array, metadata=metadata)
    if isinstance(like, nn.meta.AxisMetadata):
        box = like.replace_boxed(array)
        for name in getattr(like, "names", (None,) * dropped)[:dropped]:
            box = box.remove_axis(0, {_NAME: name})
        for _ in range(added):
            box = box.add_axis(0, {_NAME: None})
        return box
    return array
