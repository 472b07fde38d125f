"""Weights of the two public DRConv layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from drconv_jax.filters import GENERATORS, ExpertsGenerator, PooledGenerator
from drconv_jax.functional import Hyperparameters
from drconv_jax.interop.entries import UNKNOWN, Entry, oihw_to_hwio
from drconv_jax.linen import DRConv


def entries_of_drconv(layer: DRConv, arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    """What a DRConv needs of a state dict, by the names of the code with its filter generator.

    Raises:
      ValueError: no public code has this filter generator.
    """
    hyper = Hyperparameters.of(layer)
    if type(hyper.generator) not in _TABLES_OF_DRCONV:
        known = " or ".join(
            f'"{name}"'
            for name, generator in GENERATORS.items()
            if type(generator) in _TABLES_OF_DRCONV
        )
        raise ValueError(
            f"filter_generator must be {known}, as in the code the weights are from, got "
            f'"{layer.filter_generator}".'
        )
    entries = _TABLES_OF_DRCONV[type(hyper.generator)](hyper, arrays)
    return [dataclasses.replace(entry, dtype=hyper.param_dtype) for entry in entries]


def _drconv_pooled(hyper: Hyperparameters, arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    """shallowtoil/DRConv-PyTorch, class DRConv2d."""
    m, rank = hyper.regions, len(hyper.kernel)
    channels = _channels(arrays, "conv_kernel.1.weight", axis=1)
    per_group = channels // hyper.feature_group_count
    filter_size, ones = hyper.features * per_group, (1,) * rank
    entries = [
        _convolution("guide", "conv_guide", (m, channels, *hyper.guide_kernel)),
        _vector(("params", "guide", "bias"), "conv_guide.bias", m),
        Entry(
            ("params", "filters", "mixing_kernel"),
            "conv_kernel.1.weight",
            (m * m, channels, *ones),
            lambda w: w.reshape(m, m, channels).transpose(2, 0, 1),
        ),
        Entry(
            ("params", "filters", "mixing_bias"),
            "conv_kernel.1.bias",
            (m * m,),
            lambda b: b.reshape(m, m),
        ),
        Entry(
            ("params", "filters", "bank_kernel"),
            "conv_kernel.3.weight",
            (m * filter_size, m, *ones),
            lambda w: w.reshape(m, hyper.features, per_group, m).transpose(0, 3, 2, 1),
        ),
        Entry(
            ("params", "filters", "bank_bias"),
            "conv_kernel.3.bias",
            (m * filter_size,),
            lambda b: b.reshape(m, hyper.features, per_group).transpose(0, 2, 1),
        ),
    ]
    return entries + (
        [_vector(("params", "bias"), "bias", hyper.features)] if hyper.use_bias else []
    )


def _drconv_experts(hyper: Hyperparameters, arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    """megvii-research/DRConv, class DRConv."""
    m, count = hyper.regions, hyper.experts
    channels = _channels(arrays, "routing_fc.weight", axis=1)
    per_group = channels // hyper.feature_group_count
    shapes = {
        "mixing_kernel": (channels, m, count),
        "mixing_bias": (m, count),
        "bank_kernel": (count, *hyper.kernel, per_group, hyper.features),
    }
    entries = [
        entry_of_experts(("params", "filters", name), "", shape) for name, shape in shapes.items()
    ]
    if hyper.use_bias:
        entries.append(_vector(("params", "bias"), "bias", hyper.features))
    if "masknet.weight" in arrays:
        entries += [
            _convolution("guide", "masknet", (m, channels, *hyper.guide_kernel)),
            Entry(
                ("params", "guide", "bias"),
                "masknet.weight",
                (m, channels, *hyper.guide_kernel),
                lambda w: np.zeros(m, w.dtype),
            ),
        ]
    return entries


def entry_of_experts(path: tuple[str, ...], prefix: str, shape: tuple[int, ...]) -> Entry:
    """A parameter of the filter generator of megvii-research/DRConv.

    Args:
      path: its own; the last part is its name.
      prefix: before the PyTorch name.
      shape: its own.
    """
    if path[-1] == "mixing_kernel":
        channels, m, count = shape
        return Entry(
            path,
            f"{prefix}routing_fc.weight",
            (m * count, channels),
            lambda w: w.reshape(m, count, channels).transpose(2, 0, 1),
        )
    if path[-1] == "mixing_bias":
        m, count = shape
        return Entry(path, f"{prefix}routing_fc.bias", (m * count,), lambda b: b.reshape(m, count))
    count, *kernel, per_group, features = shape

    def bank(w: np.ndarray) -> np.ndarray:
        w = w.reshape(features, per_group, *kernel, count)
        return np.moveaxis(w, (-1, 0, 1), (0, -1, -2))

    size = features * per_group * int(np.prod(kernel))
    return Entry(path, f"{prefix}weight", (size, count), bank)


def _convolution(path: str, name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(("params", path, "kernel"), f"{name}.weight", shape, oihw_to_hwio)


def _vector(path: tuple[str, ...], name: str, size: int) -> Entry:
    return Entry(path, name, (size,), lambda values: values)


def _channels(arrays: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    """The input's channels, which a Flax module learns from its input, read off a weight."""
    array = arrays.get(name)
    return UNKNOWN if array is None or array.ndim <= axis else int(array.shape[axis])


_TABLES_OF_DRCONV = {PooledGenerator: _drconv_pooled, ExpertsGenerator: _drconv_experts}
