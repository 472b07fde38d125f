"""Weights in safetensors files, and weights of one network as the start of another.

Arrays are known by their path in the variables, as in "params/stem_conv/kernel".
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Variables = TypeVar("Variables")

# What safetensors calls the dtypes that it keeps exactly.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}
_RESERVED = "__metadata__"
_LISTED = 20


def in_plain_memory(array: Any) -> np.ndarray:
    """A numpy array whose memory is its values in C order and this machine's byte order.

    safetensors writes memory as it lies, and JAX takes no other byte order.
    """
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("="), order="C", copy=False)


def save_weights(path: str | os.PathLike[str], variables: Any) -> None:
    """Writes variables to a safetensors file, which is there whole or not at all.

    Args:
      path: the file; one that is there is replaced.
      variables: arrays in nested dictionaries (or any pytree), as `module.init` returns them.

    Raises:
      TypeError: a leaf is no array, or of a dtype that safetensors does not keep.
      ValueError: two arrays have the same path, there is none, or one has safetensors' own name.
    """
    path = pathlib.Path(path)
    named = _named("variables", variables)
    if not named:
        raise ValueError("there must be at least one array to save, got none.")
    if _RESERVED in named:
        raise ValueError(f'no array can be named "{_RESERVED}", a name that safetensors keeps.')
    for name, leaf in named.items():
        holds_values = not isinstance(leaf, jax.ShapeDtypeStruct)
        dtype = leaf.dtype.name if holds_values else "a shape without values"
        if dtype not in _DTYPES.values():
            raise TypeError(
                f"weights must be arrays of {', '.join(_DTYPES.values())}; {name} is {dtype}."
            )
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        save_file({name: in_plain_memory(leaf) for name, leaf in named.items()}, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(path: str | os.PathLike[str], like: Variables) -> Variables:
    """Reads variables from a safetensors file.

    Such a file holds names, shapes and numbers, nothing that could run.

    Example::

      variables = load_weights(
          "model.safetensors", jax.eval_shape(model.init, jax.random.key(0), x)
      )

    Args:
      path: the file, as `save_weights` writes it.
      like: variables of the model, or their shapes and dtypes.

    Returns:
      The weights in the structure of `like`.

    Raises:
      OSError: the file cannot be read.
      TypeError: a leaf of `like` has no shape and dtype.
      ValueError: it is no whole safetensors file, its arrays are not those of `like` by name,
        shape and dtype (the message lists the differences), or they have 64 bits and JAX is set to
        keep 32.
    """
    named = _named("like", like)
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            problems = mismatches(
                {name: f"{leaf.shape} {leaf.dtype.name}" for name, leaf in named.items()},
                {
                    name: f"{tuple(s.get_shape())} {_DTYPES.get(s.get_dtype(), s.get_dtype())}"
                    for name, s in slices.items()
                },
            )
            if problems:
                raise ValueError(f'"{path}" holds weights of another model; {problems}.')
            arrays = [jnp.asarray(file.get_tensor(name)) for name in named]
    except SafetensorError as error:
        raise ValueError(
            f'"{path}" is no safetensors file, or not a whole one ({error}).'
        ) from None
    for array, (name, leaf) in zip(arrays, named.items(), strict=True):
        if array.dtype.name != leaf.dtype.name:
            raise ValueError(
                f'{name} in "{path}" is {leaf.dtype.name}, of which JAX would drop half the bits; '
                'call jax.config.update("jax_enable_x64", True) before.'
            )
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def mismatches(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """How two sets of named arrays differ, in words; empty where they do not.

    Args:
      expected: the arrays that must be there, described by their shapes.
      found: those that are there.
    """
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unexpected: {name} {found[name]}" for name in found if name not in expected]
    problems += [
        f"mismatched: {name} is {found[name]}, must be {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    more = len(problems) - _LISTED
    return "; ".join(problems[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load_matching` did; printed, it tells so in a few lines, a star for every number.

    Attributes:
      loaded: names of the arrays that were taken from the source.
      initial: names of those that the source does not have.
      mismatched: of those that the source has in another shape: ours and the source's.
      unused: names of the source's arrays that have no place.
      values: numbers in the arrays that were loaded.
      all_values: numbers in all arrays of the result.
    """

    loaded: tuple[str, ...]
    initial: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unused: tuple[str, ...]
    values: int
    all_values: int

    def __str__(self) -> str:
        arrays = len(self.loaded) + len(self.initial) + len(self.mismatched)
        return "\n".join(
            [
                f"loaded {len(self.loaded)} of {arrays} arrays "
                f"({self.values:,} of {self.all_values:,} values)",
                *(f"  initial     {alike}" for alike in _alike(self.initial)),
                *(
                    f"  initial     {name}: {ours} here, {theirs} in the source"
                    for name, (ours, theirs) in self.mismatched.items()
                ),
                *(f"  unused      {alike}" for alike in _alike(self.unused)),
            ]
        )


def load_matching(variables: Variables, source: Any) -> tuple[Variables, LoadReport]:
    """Starts a network from another's weights: those of the same name and shape are taken.

    A network with DRConv gets from its plain twin whatever DRConv does not replace: stem, depthwise
    convolutions, norms, head.

    Example::

      variables, report = load_matching(dr_model.init(key, x), import_torch(plain_model, weights))
      print(report)

    Args:
      variables: of the network to start, with their initial values.
      source: variables of the other network.

    Returns:
      The new variables, in the dtypes of `variables`, and a report.

    Raises:
      TypeError: `variables` or `source` is not made of arrays.
      ValueError: no array fits.
    """
    ours, theirs = _named("variables", variables), _named("source", source)
    common = [name for name in ours if name in theirs]
    loaded = tuple(name for name in common if np.shape(ours[name]) == np.shape(theirs[name]))
    if not loaded:
        raise ValueError(_why_nothing_fits(ours, theirs, common))
    taken = {
        name: leaf if isinstance(leaf := theirs[name], jax.Array) else in_plain_memory(leaf)
        for name in loaded
    }
    values = [
        jnp.asarray(taken[name], leaf.dtype) if name in taken else leaf
        for name, leaf in ours.items()
    ]
    report = LoadReport(
        loaded=loaded,
        initial=tuple(name for name in ours if name not in theirs),
        mismatched={
            name: (np.shape(ours[name]), np.shape(theirs[name]))
            for name in common
            if name not in loaded
        },
        unused=tuple(name for name in theirs if name not in ours),
        values=sum(math.prod(np.shape(ours[name])) for name in loaded),
        all_values=sum(math.prod(np.shape(leaf)) for leaf in ours.values()),
    )
    return jax.tree.unflatten(jax.tree.structure(variables), values), report


def _why_nothing_fits(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], common: Sequence[str]
) -> str:
    for argument, named in (("variables", ours), ("source", theirs)):
        if not named:
            return f"{argument} must hold arrays, got none."
    if common:
        name = common[0]
        return (
            f"none of the source's {len(theirs)} arrays has the shape that it has in the network; "
            f"{name} is {np.shape(theirs[name])} in the source and {np.shape(ours[name])} in the "
            "network."
        )
    return (
        f"the source must have arrays of the network's names, none of its {len(theirs)} does; the "
        f"network's first is {next(iter(ours))}, the source's {next(iter(theirs))}."
    )


def _named(argument: str, tree: Any) -> dict[str, Any]:
    """The leaves by their paths, in the order in which `jax.tree` has them.

    Args:
      argument: what the caller calls the tree, for errors.
      tree: arrays, or shapes and dtypes.
    """
    leaves = jax.tree.leaves_with_path(tree)
    for path, leaf in leaves:
        if not (path and hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            place = jax.tree_util.keystr(path, simple=True, separator="/") or argument
            raise TypeError(
                f"{argument} must be arrays in nested dictionaries, as module.init returns them; "
                f"{place} is {type(leaf).__name__}."
            )
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError('two arrays have the same path: names must not contain "/".')
    return named


def _alike(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only, as one with stars and how many they are."""
    counts = collections.Counter(re.sub(r"\d+", "*", name) for name in names)
    return [f"{name} ({count})" for name, count in counts.items()]
