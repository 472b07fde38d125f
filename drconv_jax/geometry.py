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

_WRAPPING_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
_PADDING_NAMES = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


@dataclasses.dataclass(frozen=True)
class Window:
    """The windows of a convolution, one entry per spatial dimension in every field.

    Attributes:
      kernel_size: taps of the kernel.
      strides: steps between windows, in positions of the input.
      padding: zeros before and after the input; negative values cut positions off.
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

    def output_shape(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The output's spatial shape for an input's spatial shape."""
        return tuple(
            max(0, (n + low + high - extent) // stride + 1)
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
      The input and the window to use on it.

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
    if any(d > 1 for d in input_dilation):
        interior = [(0, 0, 0), *((0, 0, d - 1) for d in input_dilation), (0, 0, 0)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), interior)
    return x, Window(kernel_size, strides, pairs, dilation)


def _padding_pairs(
    padding: Padding, spatial: Sequence[int], extent: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
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
    strides = (1, *window.strides, 1)
    views = []
    for tap in np.ndindex(*window.kernel_size):
        start = [offset * d for offset, d in zip(tap, window.dilation, strict=True)]
        stop = [s + (n - 1) * t + 1 for s, n, t in zip(start, out, window.strides, strict=True)]
        views.append(jax.lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), strides))
    return views


def resize_nearest(
    values: Shaped[Array, "batch *spatial channels"], spatial: Sequence[int]
) -> Shaped[Array, "batch *resized channels"]:
    """Nearest-neighbour resize with PyTorch's rule: position p reads floor(p * old / new).

    `jax.image.resize` reads at half-pixel centres instead; the released DRConv resizes its guide
    by PyTorch's rule.
    """
    for axis, new in enumerate(spatial, start=1):
        old = values.shape[axis]
        if new != old:
            values = jnp.take(values, np.arange(new) * old // new, axis=axis)
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
        first = np.arange(count) * size // count
        last = -(-(np.arange(count) + 1) * size // count)
        positions = np.arange(size)
        inside = (first[:, None] <= positions) & (positions < last[:, None])
        weights = jnp.asarray(inside / inside.sum(axis=1, keepdims=True), wide)
        pooled = jnp.moveaxis(jnp.tensordot(pooled.astype(wide), weights, axes=(axis, 1)), -1, axis)
    return pooled.astype(x.dtype)
