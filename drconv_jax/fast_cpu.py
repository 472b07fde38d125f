"""Convolution, max pooling and batch norm that are fast on CPUs too.

What XLA's CPU backend is slow at is written here as what it is fast at. Every other platform gets
the operations that `jax.lax.conv_general_dilated`, `flax.linen.max_pool` and
`flax.linen.BatchNorm` give it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Num

from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import Length, Window, dilate, pad_in_reach, tap_views
from drconv_jax.region_conv.derivatives import with_gradient

Convolution = Callable[[Array, Array], Array]
"""Of an input (batch, *spatial, in) and a kernel (*kernel, in/groups, features)."""


def conv_general_dilated(
    lhs: Num[Array, "batch *spatial in"],
    rhs: Num[Array, "*kernel in_per_group features"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Num[Array, "batch *out_spatial features"]:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv`'s argument of that name.

    On a CPU, three kinds of convolution without input dilation are computed otherwise than by
    XLA's: a pointwise one is a product; a depthwise one (as many groups as channels and features)
    is a sum of shifted products, taken in float32 or wider; and one of three channels, as an image
    has, gets a fourth, of zeros. All others are left to XLA,
    but for padding that its CPU backend gets wrong (`geometry.pad_in_reach`).

    Example::

      >>> from flax import linen as nn
      >>> from drconv_jax import fast_cpu
      >>> layer = nn.Conv(
      ...     32,
      ...     (3, 3),
      ...     feature_group_count=32,
      ...     conv_general_dilated=fast_cpu.conv_general_dilated,
      ... )

    Args:
      lhs: the input, channels last.
      rhs: the kernel.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        options: as in `jax.lax.conv_general_dilated`; `dimension_numbers` those of
        `flax.linen.Conv`, channels last.

    Returns:
      The output, in the dtype of `lhs`.
    """
    convolve: Callable[..., Array] = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        **options,
    )
    *kernel_size, in_per_group, features = rhs.shape
    if (
        not _is_channels_last(dimension_numbers, lhs.shape, rhs.shape)
        or options.get("batch_group_count", 1) != 1
        or not all(isinstance(n, int) for n in lhs.shape[1:])
    ):
        return convolve(lhs, rhs)
    dilation = _integers(rhs_dilation, len(kernel_size))
    strides = _integers(window_strides, len(kernel_size))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=False)]
    if not isinstance(padding, str) and any(
        not 0 <= side < e for pair, e in zip(padding, extent, strict=True) for side in pair
    ):
        lhs, padding = pad_in_reach(dilate(lhs, lhs_dilation), padding, extent)
        convolve = functools.partial(convolve, padding=padding, lhs_dilation=None)
        lhs_dilation = None
    y = jax.eval_shape(convolve, lhs, rhs)  # which refuses what is wrong, on every platform
    by_xla: Convolution = lambda lhs, rhs: convolve(lhs, rhs)  # noqa: E731
    dilated = any(d != 1 for d in _integers(lhs_dilation, len(kernel_size)))
    if dilated or y.dtype != lhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return by_xla(lhs, rhs)
    pairs = _padding_pairs(padding, lhs.shape[1:-1], extent, strides)
    window = Window(tuple(kernel_size), strides, pairs, dilation)
    if window.is_pointwise and feature_group_count == 1:
        fast = _pointwise(by_xla, options.get("precision"))
    elif in_per_group == 1 and features == feature_group_count:
        fast = _depthwise(window, by_xla)
    elif feature_group_count == 1 and in_per_group == 3:
        fast = _of_images(by_xla)
    else:
        return by_xla(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cpu=fast, default=by_xla)


def _is_channels_last(
    dimension_numbers: Any, lhs_shape: Sequence[Length], rhs_shape: Sequence[Length]
) -> bool:
    last = len(lhs_shape) - 1
    found = jax.lax.conv_dimension_numbers(lhs_shape, rhs_shape, dimension_numbers)
    image, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    return found == jax.lax.ConvDimensionNumbers(image, kernel, image)


def _integers(values: Sequence[int] | None, count: int) -> tuple[int, ...]:
    return (1,) * count if values is None else tuple(int(value) for value in values)


def _padding_pairs(
    padding: str | Sequence[tuple[int, int]],
    spatial: Sequence[int],
    extent: Sequence[int],
    strides: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(spatial, extent, strides, padding)
    return tuple((low, high) for low, high in padding)


def _pointwise(by_xla: Convolution, precision: Any) -> Convolution:
    def product(x: Array, kernel: Array) -> Array:
        return jnp.einsum("...i,io->...o", x, _matrix(kernel), precision=precision)

    def gradient(x: Array, kernel: Array, y: Array, dy: Array) -> tuple[Array, Array]:
        del y
        matrix = _matrix(kernel)
        dx = jnp.einsum("...o,io->...i", dy, matrix, precision=precision)
        in_features, features = matrix.shape
        # On a mesh with explicit axes a sum over the parted batch must say what becomes of it.
        sharding = jax.typeof(matrix).sharding
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        sum_up = functools.partial(jnp.einsum, precision=precision)
        # XLA's CPU backend copies the left operand, transposed: x where it has far fewer channels,
        # else dy, whose copy lives shorter. The barrier keeps XLA from exchanging them.
        if 4 * in_features < features:
            out = sharding if explicit else None
            dmatrix = sum_up("...i,...o->io", x, dy, out_sharding=out)
        else:
            out = NamedSharding(sharding.mesh, P(*sharding.spec[::-1])) if explicit else None
            transposed = sum_up("...o,...i->oi", dy, x, out_sharding=out)
            dmatrix = jax.lax.optimization_barrier(transposed).T
        return dx, dmatrix.reshape(kernel.shape)

    return with_gradient(product, gradient, by_xla)


def _matrix(kernel: Array) -> Array:
    return kernel.reshape(kernel.shape[-2:])


def _of_images(by_xla: Convolution) -> Convolution:
    """XLA's CPU backend is several times faster at four channels than at three.

    It is not for the kernel's gradient.
    """

    def with_four_channels(x: Array, kernel: Array) -> Array:
        zero = jnp.zeros((), x.dtype)
        x = jax.lax.pad(x, zero, [(0, 0, 0)] * (x.ndim - 1) + [(0, 1, 0)])
        kernel = jax.lax.pad(kernel, zero, [(0, 0, 0)] * (kernel.ndim - 2) + [(0, 1, 0), (0, 0, 0)])
        return by_xla(x, kernel)

    def gradient(x: Array, kernel: Array, y: Array, dy: Array) -> tuple[Array, Array]:
        del y
        return jax.vjp(by_xla, x, kernel)[1](dy)

    return with_gradient(with_four_channels, gradient, by_xla)


def _depthwise(window: Window, by_xla: Convolution) -> Convolution:
    def forward(x: Array, kernel: Array) -> Array:
        wide = accumulator(x.dtype)
        products = (
            view.astype(wide) * tap.astype(wide)
            for view, tap in zip(tap_views(x, window), _taps(kernel), strict=True)
        )
        return functools.reduce(jnp.add, products).astype(x.dtype)

    def gradient(x: Array, kernel: Array, y: Array, dy: Array) -> tuple[Array, Array]:
        del y
        wide = accumulator(x.dtype)
        weights = kernel.astype(wide).reshape(-1, kernel.shape[-1])
        weights = jnp.concatenate([weights, jnp.zeros_like(weights[:1])])  # the tap -1 has none

        def part(tap: np.ndarray, dy: Array) -> Array:
            products = dy.astype(wide) * weights[tap[..., 0]]
            return products if (tap >= 0).all() else jnp.where(tap >= 0, products, 0)

        dx = _sum_over_windows(part, [dy], window, x.shape[1:-1])
        # One reduction of all products at once, of which none is stored. The sum over the batch is
        # one of its own, that XLA may part the batch among threads and devices.
        products = [view.astype(wide) * dy.astype(wide) for view in tap_views(x, window)]
        zeros = [jnp.zeros((), wide)] * len(products)
        by_sample = jax.lax.reduce(
            products, zeros, lambda a, b: list(map(jnp.add, a, b)), range(1, x.ndim - 1)
        )
        dkernel = jnp.stack(by_sample).sum(axis=1).reshape(kernel.shape)
        return dx.astype(x.dtype), dkernel.astype(kernel.dtype)

    return with_gradient(forward, gradient, by_xla)


def _taps(kernel: Array) -> list[Array]:
    """A depthwise kernel's taps in row-major order, of shape (1, ..., 1, channels) each."""
    ones = (1,) * (kernel.ndim - 1)
    return list(kernel.reshape(-1, *ones, kernel.shape[-1]))


def _sum_over_windows(
    part: Callable[..., Array],
    arrays: Sequence[Array],
    window: Window,
    spatial: Sequence[int],
) -> Array:
    """At every position of the input, the sum over the windows that read it.

    Positions are dealt out by their phase: a padded position is strides * u + phase, and the window
    u - back reads it by the tap of offset strides * back + phase, if there is one.

    Args:
      part: what windows give to the positions that they read. Its arguments are the tap by which
        they do, counted in row-major order, -1 where there is none, of shape
        (1, 1, phases, 1, phases, 1) in two dimensions; and `arrays` at those windows, of shape
        (batch, u, 1, u, 1, channels).
      arrays: (batch, *out_spatial, channels) each.
      window: the windows.
      spatial: shape of the input.

    Returns:
      (batch, *spatial, channels).
    """
    axes = range(len(spatial))
    counts = [-(-(window.padding[i][0] + spatial[i]) // window.strides[i]) for i in axes]
    furthest = [(window.extent[i] - 1) // window.strides[i] for i in axes]
    padded = [
        jax.lax.pad(
            a,
            jnp.zeros((), a.dtype),
            [(0, 0, 0), *((furthest[i], counts[i] - a.shape[i + 1], 0) for i in axes), (0, 0, 0)],
        )
        for a in arrays
    ]
    phase_axes = tuple(2 * i + 2 for i in axes)
    total: Any = 0
    for back in np.ndindex(*(f + 1 for f in furthest)):
        taps = _taps_by_phase(window, back)
        if (taps < 0).all():
            continue
        views = padded
        for i in axes:
            start = furthest[i] - back[i]
            views = [jax.lax.slice_in_dim(v, start, start + counts[i], axis=i + 1) for v in views]
        taps = taps.reshape(1, *(n for s in window.strides for n in (1, s)), 1)
        total = total + part(taps, *(jnp.expand_dims(v, phase_axes) for v in views))
    for i in axes:  # one by one, as a mesh with explicit axes allows
        total = jax.lax.collapse(total, i + 1, i + 3)
    start = [low for low, _ in window.padding]
    stop = [low + size for low, size in zip(start, spatial, strict=True)]
    summed: Array = jax.lax.slice(total, (0, *start, 0), (total.shape[0], *stop, total.shape[-1]))
    return summed


def _taps_by_phase(window: Window, back: Sequence[int]) -> np.ndarray:
    """At every phase, (*strides), the tap of offset strides * back + phase; -1 where none is."""
    number = np.zeros(window.strides, int)
    exists = np.ones(window.strides, bool)
    for phase in np.ndindex(*window.strides):
        for axis, (kernel, stride, dilation) in enumerate(
            zip(window.kernel_size, window.strides, window.dilation, strict=True)
        ):
            tap, between = divmod(stride * back[axis] + phase[axis], dilation)
            exists[phase] &= not between and tap < kernel
            number[phase] = number[phase] * kernel + tap
    return np.where(exists, number, -1)


def max_pool(
    inputs: Num[Array, "*batch_spatial channels"],
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> Num[Array, "*batch_out_spatial channels"]:
    """`flax.linen.max_pool`; on a CPU a maximum of shifted views.

    Its gradient goes to the first of a window's largest values, as that of XLA's does.

    Args:
      inputs, window_shape, strides, padding: as in `flax.linen.max_pool`.
    """
    window_shape = tuple(window_shape)
    strides = tuple(strides or (1,) * len(window_shape))
    by_xla = functools.partial(
        nn.max_pool, window_shape=window_shape, strides=strides, padding=padding
    )
    spatial = inputs.shape[-len(window_shape) - 1 : -1]
    known = all(isinstance(n, int) for n in inputs.shape[1:])
    floating = jnp.issubdtype(inputs.dtype, jnp.floating)
    if inputs.ndim != len(window_shape) + 2 or not known or not floating:
        return by_xla(inputs)
    jax.eval_shape(by_xla, inputs)  # which refuses what is wrong, on every platform
    pairs = _padding_pairs(padding, spatial, window_shape, strides)
    window = Window(window_shape, strides, pairs, (1,) * len(window_shape))

    def views(x: Array) -> list[Array]:
        low = jnp.asarray(-jnp.inf, x.dtype)
        x = jax.lax.pad(x, low, [(0, 0, 0), *((*pair, 0) for pair in pairs), (0, 0, 0)])
        return tap_views(x, Window(window_shape, strides, ((0, 0),) * len(pairs), window.dilation))

    def forward(x: Array) -> Array:
        return functools.reduce(jnp.maximum, views(x))

    def gradient(x: Array, y: Array, dy: Array) -> tuple[Array]:
        first, *others = views(x)
        largest, chosen = first, jnp.zeros(y.shape, jnp.int32)
        for tap, view in enumerate(others, start=1):
            is_larger = ~(largest >= view)  # as XLA decides, NaN included
            chosen = jnp.where(is_larger, tap, chosen)
            largest = jnp.where(is_larger, view, largest)

        def part(tap: np.ndarray, dy: Array, chosen: Array) -> Array:
            return jnp.where(chosen == tap, dy, jnp.zeros((), dy.dtype))

        return (_sum_over_windows(part, [dy, chosen], window, spatial),)

    fast = with_gradient(forward, gradient, by_xla)
    return jax.lax.platform_dependent(inputs, cpu=fast, default=by_xla)


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm`: the same fields, parameters, statistics and results.

    On a CPU it is computed as scale * x + shift with one scale and one shift a channel, whose
    gradient needs x alone. Flax's x - mean, which its gradient needs too, XLA would store. What is
    rarely used (a mask, other axes than the last, slow variance, no scale or no bias) is Flax's.
    """

    @nn.compact
    def __call__(
        self,
        x: Num[Array, "*batch channels"],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Num[Array, "*batch channels"]:
        """As `flax.linen.BatchNorm`."""
        usual = (
            mask is None
            and self.axis in (-1, x.ndim - 1)
            and jnp.issubdtype(x.dtype, jnp.floating)
            and self.use_fast_variance
            and self.force_float32_reductions
            and self.use_scale
            and self.use_bias
        )
        if not usual:
            result: Array = super().__call__(x, use_running_average, mask=mask)
            return result
        shape = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if nn.merge_param("use_running_average", self.use_running_average, use_running_average):
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = self._moments(x)
            if not self.is_initializing():
                for running, new in ((running_mean, mean), (running_var, var)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        functions = [
            functools.partial(function, epsilon=self.epsilon, dtype=dtype)
            for function in (_scaled_and_shifted, _normalized)
        ]
        fast, default = functions
        normalized: Array = jax.lax.platform_dependent(
            x, mean, var, scale, bias, cpu=fast, default=default
        )
        return normalized

    def _moments(self, x: Array) -> tuple[Array, Array]:
        """Mean and variance over all axes but the last, and over devices if an axis is named."""
        x = x.astype(accumulator(self.dtype or x.dtype))
        axes = tuple(range(x.ndim - 1))
        mean, square = x.mean(axes), jnp.square(x).mean(axes)
        if self.axis_name is not None and not self.is_initializing():
            mean, square = jax.lax.pmean(
                jnp.stack([mean, square]), self.axis_name, axis_index_groups=self.axis_index_groups
            )
        return mean, jnp.maximum(0.0, square - jnp.square(mean))


def _normalized(
    x: Array, mean: Array, var: Array, scale: Array, bias: Array, *, epsilon: float, dtype: Dtype
) -> Array:
    """As Flax computes it."""
    mean, var = (jnp.expand_dims(v, range(x.ndim - 1)) for v in (mean, var))
    scale, bias = (v.reshape(mean.shape) for v in (scale, bias))
    y = (x.astype(accumulator(x.dtype)) - mean) * (jax.lax.rsqrt(var + epsilon) * scale)
    return (y + bias).astype(dtype)


def _scaled_and_shifted(
    x: Array, mean: Array, var: Array, scale: Array, bias: Array, *, epsilon: float, dtype: Dtype
) -> Array:
    """The same, of which JAX's gradient needs no array of the size of x but x.

    The gradient is that of scale * x + shift, in which a mean that is many times the deviation
    cancels; the value is not.
    """
    wide = accumulator(x.dtype)
    mean, var, scale, bias = (
        jnp.expand_dims(v.astype(wide), range(x.ndim - 1)) for v in (mean, var, scale, bias)
    )
    x, scale = x.astype(wide), jax.lax.rsqrt(var + epsilon) * scale
    differentiated = x * scale + (bias - mean * scale)
    exact = (x - mean) * scale + bias
    return (differentiated + jax.lax.stop_gradient(exact - differentiated)).astype(dtype)
