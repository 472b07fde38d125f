"""Weights from public PyTorch implementations, as variables of the Flax modules here.

Each module has a table that says, for every array it needs, the foreign name and how its values
are laid out there. Importing is nothing but renaming and transposing, so gradients import the same
way as weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from drconv_jax.functional import Hyperparameters
from drconv_jax.linen import DRConv

StateDict = Mapping[str, Any]
_UNKNOWN = 0  # channels that no weight tells, because it is missing itself


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array: its path in the variables, and its name and shape in PyTorch."""

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]


def import_torch(module: nn.Module, state_dict: StateDict) -> dict[str, Any]:
    """Flax variables for `module` from a PyTorch state dict of the same network.

    Known: `DRConv` with filter_generator="pooled" from the names of shallowtoil/DRConv-PyTorch's
    `DRConv2d`, which has no bias after the region convolution (use_bias=False); `DRConv` with
    "experts" from megvii-research/DRConv's `DRConv`. The latter's guide comes from a mask network
    of its own, without bias: its `masknet.weight` becomes the layer's guide convolution where the
    state dict has it, and is not needed where every call gives a guide.

    Args:
      module: the Flax module that the weights are for.
      state_dict: PyTorch names to arrays (anything that `np.asarray` takes).

    Returns:
      {"params": ...}, as `module.init` lays them out.

    Raises:
      TypeError: no table is known for this kind of module.
      ValueError: entries are missing, unexpected or misshapen; the message lists all of them.
    """
    table = next((t for kind, t in _TABLES.items() if isinstance(module, kind)), None)
    if table is None:
        known = ", ".join(kind.__name__ for kind in _TABLES)
        raise TypeError(f"module must be one of {known}, got {type(module).__name__}.")
    arrays = {name: np.asarray(value) for name, value in state_dict.items()}
    entries = table(module, arrays)
    _check_names(entries, arrays)
    flat = {
        ("params", *entry.path): jnp.asarray(entry.convert(arrays[entry.name])) for entry in entries
    }
    return unflatten_dict(flat)


def _check_names(entries: list[Entry], arrays: Mapping[str, np.ndarray]) -> None:
    expected = {entry.name: entry.shape for entry in entries}
    problems = [f"missing: {name}" for name in expected if name not in arrays]
    problems += [
        f"unexpected: {name} {array.shape}"
        for name, array in arrays.items()
        if name not in expected and not name.endswith("num_batches_tracked")
    ]
    problems += [
        f"misshapen: {name} is {arrays[name].shape}, must be {_shown(shape)}"
        for name, shape in expected.items()
        if name in arrays and not _fits(arrays[name].shape, shape)
    ]
    if problems:
        raise ValueError("the state dict does not fit the module; " + "; ".join(problems) + ".")


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(
        e in (_UNKNOWN, n) for n, e in zip(shape, expected, strict=True)
    )


def _shown(shape: tuple[int, ...]) -> str:
    return (
        str(shape)
        if _UNKNOWN not in shape
        else "(" + ", ".join("any" if n == _UNKNOWN else str(n) for n in shape) + ")"
    )


def _drconv(layer: DRConv, arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    hyper = Hyperparameters.of(layer)
    return _TABLES_OF_DRCONV[layer.filter_generator](hyper, arrays)


def _drconv_pooled(hyper: Hyperparameters, arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    """shallowtoil/DRConv-PyTorch, class DRConv2d."""
    m, rank = hyper.regions, len(hyper.kernel)
    channels = _channels(arrays, "conv_kernel.1.weight", axis=1)
    per_group = channels // hyper.feature_group_count
    filter_size, ones = hyper.features * per_group, (1,) * rank
    entries = [
        _convolution("guide", "conv_guide", (m, channels, *hyper.guide_kernel)),
        _vector(("guide", "bias"), "conv_guide.bias", m),
        Entry(
            ("filters", "mixing_kernel"),
            "conv_kernel.1.weight",
            (m * m, channels, *ones),
            lambda w: w.reshape(m, m, channels).transpose(2, 0, 1),
        ),
        Entry(
            ("filters", "mixing_bias"), "conv_kernel.1.bias", (m * m,), lambda b: b.reshape(m, m)
        ),
        Entry(
            ("filters", "bank_kernel"),
            "conv_kernel.3.weight",
            (m * filter_size, m, *ones),
            lambda w: w.reshape(m, hyper.features, per_group, m).transpose(0, 3, 2, 1),
        ),
        Entry(
            ("filters", "bank_bias"),
            "conv_kernel.3.bias",
            (m * filter_size,),
            lambda b: b.reshape(m, hyper.features, per_group).transpose(0, 2, 1),
        ),
    ]
    return entries + ([_vector(("bias",), "bias", hyper.features)] if hyper.use_bias else [])


def _drconv_experts(hyper: Hyperparameters, arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    """megvii-research/DRConv, class DRConv."""
    m, count, kernel = hyper.regions, hyper.experts, hyper.kernel
    channels = _channels(arrays, "routing_fc.weight", axis=1)
    per_group = channels // hyper.feature_group_count
    filter_size = hyper.features * per_group * int(np.prod(kernel))

    def bank(w: np.ndarray) -> np.ndarray:
        return np.moveaxis(
            w.reshape(hyper.features, per_group, *kernel, count), (-1, 0, 1), (0, -1, -2)
        )

    entries = [
        Entry(
            ("filters", "mixing_kernel"),
            "routing_fc.weight",
            (m * count, channels),
            lambda w: w.reshape(m, count, channels).transpose(2, 0, 1),
        ),
        Entry(
            ("filters", "mixing_bias"),
            "routing_fc.bias",
            (m * count,),
            lambda b: b.reshape(m, count),
        ),
        Entry(("filters", "bank_kernel"), "weight", (filter_size, count), bank),
    ]
    if hyper.use_bias:
        entries.append(_vector(("bias",), "bias", hyper.features))
    if "masknet.weight" in arrays:
        entries += [
            _convolution("guide", "masknet", (m, channels, *hyper.guide_kernel)),
            Entry(
                ("guide", "bias"),
                "masknet.weight",
                (m, channels, *hyper.guide_kernel),
                lambda w: np.zeros(m, w.dtype),
            ),
        ]
    return entries


def _convolution(path: str, name: str, shape: tuple[int, ...]) -> Entry:
    """PyTorch keeps (out, in, *kernel), Flax (*kernel, in, out)."""
    return Entry(
        (path, "kernel"), f"{name}.weight", shape, lambda w: np.moveaxis(w, (0, 1), (-1, -2))
    )


def _vector(path: tuple[str, ...], name: str, size: int) -> Entry:
    return Entry(path, name, (size,), lambda values: values)


def _channels(arrays: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    """The input's channels, which a Flax module learns from its input, read off a weight."""
    array = arrays.get(name)
    return _UNKNOWN if array is None or array.ndim <= axis else int(array.shape[axis])


_TABLES_OF_DRCONV = {"pooled": _drconv_pooled, "experts": _drconv_experts}
_TABLES: Mapping[type[nn.Module], Callable[[Any, Mapping[str, np.ndarray]], list[Entry]]] = {
    DRConv: _drconv,
}
