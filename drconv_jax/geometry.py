"""Where a convolution's windows lie: strides, padding and dilation, resolved once for everybody.

The region convolution and the guide convolution must agree on the positions of the output.
Both ask this module, which turns what a user may write (as in `flax.linen.Conv`) into a `Window`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from drconv_jax.dtypes import accumulator

Padding = str | int | Sequence[int | Sequence[int]]
Length = Any
"""An integer or, in a program that is exported for inputs of any size, a symbol."""

_WRAPPING_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
_PADDING_NAMES = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


@dataclasses.dataclass(frozen=True)
class Window:
    """The windows of a convolution, one entry per spatial dimension in every field.

    Attributes:
      kernel_size: taps of the kernel.
      strides: steps between windows, in positions of the input.
      padding: zeros before and after the input.
      dilation: steps between taps, in positions of the input.
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        """Positions of the input that a window spans, gaps included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    def output_shape(self, spatial: Sequence[Length]) -> tuple[Length, ...]:
        """The output's spatial shape for an input's spatial shape."""
        return tuple(
            jax.core.max_dim((n + low + high - extent) // stride + 1, 0)
            for n, (low, high), extent, stride in zip(
                spatial, self.padding, self.extent, self.strides, strict=True
            )
        )

    @property
    def is_pointwise(self) -> bool:
        """True where every output position reads just the input position of the same index."""
        ones = (1,) * len(self.kernel_size)
        return (
            self.kernel_size == ones
            and self.strides == ones
            and all(pair == (0, 0) for pair in self.padding)
        )


def canonical_tuple(name: str, value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """`value` as a tuple of `rank` positive integers; one integer stands for all, None for 1.

    Raises:
      TypeError: an entry is no integer.
      ValueError: there are not `rank` entries, or one is below 1.
    """
    if value is None:
        value = 1
    try:
        entries = list(value) if np.iterable(value) else [value] * rank
        result = tuple(_integer(entry) for entry in entries)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer or a sequence of integers, got {value!r}."
        ) from None
    if len(result) != rank:
        raise ValueError(
            f"{name} must have one entry for each of the {rank} spatial dimensions, got {value!r}."
        )
    if any(entry < 1 for entry in result):
        raise ValueError(f"{name} must be at least 1 everywhere, got {value!r}.")
    return result


def window_of(
    x: Shaped[Array, "batch *spatial in"],
    kernel_size: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    centred_on: Sequence[int] | None = None,
) -> tuple[Shaped[Array, "batch *padded in"], Window]:
    """Resolves a convolution's arguments, all with the meaning they have in `flax.linen.Conv`.

    Args:
      x: the input; padding that repeats the input ("CIRCULAR", "REFLECT") and input dilation are
        applied to it here, so that only zero padding is left to do.
      kernel_size: taps of the kernel.
      strides, padding, input_dilation, kernel_dilation: see `flax.linen.Conv`.
      centred_on: where given, the window belongs to a helper of a convolution with that kernel
        size: `padding` is read for that kernel, and the windows are laid so that each is centred
        where that convolution's is ("CAUSAL": ends where it ends). The output shapes are equal.

    Returns:
      The input and the window to use on it. What negative padding cuts off is cut off here, so
      that the window's padding never is negative.

    Raises:
      TypeError, ValueError: an argument is malformed; the message names it and its value.
    """
    rank = len(kernel_size)
    if isinstance(padding, str) and padding.upper() in _PADDING_NAMES:
        padding = padding.upper()  # as JAX takes "same" for "SAME"
    kernel_size = canonical_tuple("kernel_size", kernel_size, rank)
    strides = canonical_tuple("strides", strides, rank)
    input_dilation = canonical_tuple("input_dilation", input_dilation, rank)
    dilation = canonical_tuple("kernel_dilation", kernel_dilation, rank)
    if isinstance(padding, str) and any(d > 1 for d in input_dilation):
        raise ValueError(
            f"padding must be integers or (low, high) pairs where input_dilation={input_dilation}, "
            f"got {padding!r}."
        )
    main_size = kernel_size if centred_on is None else tuple(centred_on)
    main = tuple((k - 1) * d + 1 for k, d in zip(main_size, dilation, strict=True))
    own = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))

    pairs = _padding_pairs(padding, x.shape[1:-1], main, strides)
    if padding == "CAUSAL":
        pairs = tuple(
            (low - (m - o), high) for (low, high), m, o in zip(pairs, main, own, strict=True)
        )
    else:
        odd = padding == "SAME_LOWER"  # which puts the odd position of its padding before the input
        pairs = tuple(
            (low - (m - o + odd) // 2, high - (m - o - (m - o + odd) // 2))
            for (low, high), m, o in zip(pairs, main, own, strict=True)
        )
    if isinstance(padding, str) and padding in _WRAPPING_MODES:
        x = jnp.pad(x, ((0, 0), *pairs, (0, 0)), mode=_WRAPPING_MODES[padding])
        pairs = ((0, 0),) * rank
    x, pairs = pad_in_reach(dilate(x, input_dilation), pairs, own)
    return x, Window(kernel_size, strides, pairs, dilation)


def dilate(
    x: Shaped[Array, "batch *spatial in"], dilation: Sequence[int] | None
) -> Shaped[Array, "batch *dilated in"]:
    """Puts d - 1 zeros between the positions of every spatial dimension."""
    if dilation is None or all(d == 1 for d in dilation):
        return x
    interior = [(0, 0, 0), *((0, 0, d - 1) for d in dilation), (0, 0, 0)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), interior)


def pad_in_reach(
    x: Shaped[Array, "batch *spatial in"],
    padding: Sequence[tuple[Length, Length]],
    extent: Sequence[int],
) -> tuple[Shaped[Array, "batch *padded in"], tuple[tuple[int, int], ...]]:
    """Does that part of a convolution's padding which must not be left to the convolution.

    XLA's CPU backend reads beyond its input where a convolution has negative low padding
    (openxla/xla#48713). It has where the user's padding is negative, and so has its gradient where
    that is larger than the window's extent less one.

    Args:
      x: the input, dilated.
      padding: zeros before and after every spatial dimension; negative values cut positions off.
      extent: positions that the convolution's window spans.

    Returns:
      The input, cut and padded, and the padding that is left: from 0 to extent - 1.
    """
    left = []
    for axis, ((low, high), reach) in enumerate(zip(padding, extent, strict=True), start=1):
        size = x.shape[axis]
        known = isinstance(low, int) and isinstance(high, int)
        if known and 0 <= min(low, high) <= max(low, high) < reach:
            left.append((low, high))
            continue
        if not known or not isinstance(size, int):
            x = _padded_by_symbols(x, low, high, axis, reach)
            left.append((0, 0))
            continue
        start = min(max(-low, 0), size)
        stop = max(size + min(high, 0), start)
        zeros = max(size + low + high, 0) - (stop - start)
        before = min(max(low, 0), zeros)
        after = zeros - before
        if start or stop < size:
            x = jax.lax.slice_in_dim(x, start, stop, axis=axis)
        inside = min(before, reach - 1), min(after, reach - 1)
        x = _padded(x, before - inside[0], after - inside[1], axis)
        left.append(inside)
    return x, tuple(left)


def _padded(x: Array, before: int, after: int, axis: int) -> Array:
    if not before and not after:
        return x
    ends = [(before, after, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ends)


def _padded_by_symbols(x: Array, low: Length, high: Length, axis: int, reach: int) -> Array:
    """Pads or cuts an axis whose length, or how much is to be padded, an export leaves open.

    Even the sign of `low` and `high` may be open, as of "SAME" with strides, whose padding is
    within `reach`, the window's extent.
    """
    ends = [max(side, 0) if isinstance(side, int) else reach for side in (low, high)]
    count = jax.core.max_dim(x.shape[axis] + low + high, 0)
    return _every(_padded(x, ends[0], ends[1], axis), ends[0] - low, 1, count, axis)


def _padding_pairs(
    padding: Padding, spatial: Sequence[Length], extent: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[Length, Length], ...]:
    rank = len(extent)
    if isinstance(padding, str):
        if padding in ("SAME", "SAME_LOWER", "VALID"):
            return tuple(jax.lax.padtype_to_pads(spatial, extent, strides, padding))
        if padding in _WRAPPING_MODES:
            return tuple(((e - 1) // 2, e // 2) for e in extent)
        if padding == "CAUSAL":
            if rank != 1:
                raise ValueError(
                    f'padding="CAUSAL" is for 1 spatial dimension, the kernel has {rank}.'
                )
            return ((extent[0] - 1, 0),)
        raise ValueError(
            f"padding must be one of {', '.join(_PADDING_NAMES)}, an integer, or one integer or "
            f"(low, high) pair per spatial dimension, got {padding!r}."
        )
    try:
        entries: list[Any] = list(padding) if np.iterable(padding) else [padding] * rank
        pairs = tuple(
            tuple(_integer(side) for side in (e if np.iterable(e) else (e, e))) for e in entries
        )
    except TypeError:
        raise TypeError(
            f"padding must be made of integers or (low, high) pairs of integers, got {padding!r}."
        ) from None
    if len(pairs) != rank or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"padding must have one integer or (low, high) pair for each of the {rank} spatial "
            f"dimensions, got {padding!r}."
        )
    return pairs  # type: ignore[return-value]


def _integer(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    return operator.index(value)


def tap_views(
    x: Shaped[Array, "batch *spatial channels"], window: Window
) -> list[Shaped[Array, "batch *out_spatial channels"]]:
    """What every output position reads under each tap of the kernel, tap by tap in row-major order.

    Zeros stand where padding lies.
    """
    out = window.output_shape(x.shape[1:-1])
    if any(pair != (0, 0) for pair in window.padding):
        x = jax.lax.pad(
            x,
            jnp.zeros((), x.dtype),
            [(0, 0, 0), *((low, high, 0) for low, high in window.padding), (0, 0, 0)],
        )
    views = []
    for tap in np.ndindex(*window.kernel_size):
        view = x
        for axis, count in enumerate(out, start=1):
            start = tap[axis - 1] * window.dilation[axis - 1]
            view = _every(view, start, window.strides[axis - 1], count, axis)
        views.append(view)
    return views


def _every(x: Array, start: Length, stride: int, count: Length, axis: int) -> Array:
    """Of an axis, `count` positions from `start` on, a stride apart."""
    if isinstance(count, int) and count == 0:  # the window is larger than the input
        return jax.lax.slice_in_dim(x, 0, 0, axis=axis)
    try:
        stop = start + (count - 1) * stride + 1
        return jax.lax.slice_in_dim(x, start, stop, stride, axis)
    except jax.errors.InconclusiveDimensionOperation:  # the length of the axis is a symbol
        return jnp.take(x, _number(start) + stride * jnp.arange(count), axis=axis)


def resize_nearest(
    values: Shaped[Array, "batch *spatial channels"], spatial: Sequence[Length]
) -> Shaped[Array, "batch *resized channels"]:
    """Nearest-neighbour resize with PyTorch's rule: position p reads floor(p * old / new).

    `jax.image.resize` reads at half-pixel centres instead; the released DRConv resizes its guide
    by PyTorch's rule.
    """
    for axis, new in enumerate(spatial, start=1):
        old = values.shape[axis]
        if new != old:
            source = _arange(new) * _number(old) // _number(new)
            values = jnp.take(values, source, axis=axis)
    return values


def adaptive_average_pool(
    x: Float[Array, "batch *spatial channels"], bins: Sequence[int]
) -> Float[Array, "batch *bins channels"]:
    """Average over `bins` bins per spatial dimension, with PyTorch's bin edges.

    Bin i of k over n positions covers floor(i n / k) up to ceil((i + 1) n / k), so that bins
    overlap where k does not divide n (`torch.nn.AdaptiveAvgPool2d`). Sums are taken in float32 at
    least; the result has the dtype of `x`.
    """
    wide = accumulator(x.dtype)
    pooled = x
    for axis, count in enumerate(bins, start=1):
        size = x.shape[axis]
        first = np.arange(count) * _number(size) // count
        last = -(-(np.arange(count) + 1) * _number(size) // count)
        positions = _arange(size)[None]
        inside = (first[:, None] <= positions) & (positions < last[:, None])
        shares = inside.astype(wide) / inside.sum(axis=1, keepdims=True, dtype=wide)
        weights = jnp.asarray(shares, wide)
        pooled = jnp.moveaxis(jnp.tensordot(pooled.astype(wide), weights, axes=(axis, 1)), -1, axis)
    return pooled.astype(x.dtype)


def _number(length: Length) -> Any:
    """A length to compute with, which in an exported program may be a symbol."""
    return length if isinstance(length, int) else jnp.asarray(length)


def _arange(length: Length) -> Any:
    """The numbers below a length: constants, unless it is a symbol."""
    return np.arange(length) if isinstance(length, int) else jnp.arange(length)
