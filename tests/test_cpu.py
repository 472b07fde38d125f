"""The native kernels, called without the dispatcher; that they refuse what is malformed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from drconv_jax import native
from drconv_jax.dtypes import accumulator
from drconv_jax.geometry import Window
from drconv_jax.region_conv import cpu
from drconv_jax.region_conv.mixture import Mixture, mix
from drconv_jax.region_conv.spec import ConvSpec

needs_kernels = pytest.mark.skipif(not native.available(), reason="there are no native kernels")


def spec_of(kernel, strides=1, dilation=1, groups=1):
    """With padding on either side that differs."""
    rank = len(kernel)
    padding = tuple(((k - 1) * dilation // 2, (k - 1) * dilation) for k in kernel)
    return ConvSpec(Window(kernel, (strides,) * rank, padding, (dilation,) * rank), groups, None)


def draw(spec, *, batch=5, size=5, channels=4, features=6, regions=3, dtype=np.float32):
    """x, filters, guide features and dy."""
    window, rng = spec.window, np.random.default_rng(0)
    spatial = (size,) * len(window.kernel_size)
    out = window.output_shape(spatial)
    shapes = (
        (batch, *spatial, channels),
        (batch, regions, *window.kernel_size, channels // spec.groups, features),
        (batch, *out, regions),
        (batch, *out, features),
    )
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def draw_mixture(filters, *, of_weights, of_bank, bank_regions, n=4, bias=True):
    """A mixture of the shape of `filters`."""
    rng = np.random.default_rng(1)
    batch, regions, *_, in_per_group, features = filters.shape
    size = (*of_bank, in_per_group, features)
    shapes = (batch, regions, *of_weights, n), (bank_regions, n, *size), (bank_regions, *size)
    weights, bank, added = (jnp.asarray(rng.normal(size=s), filters.dtype) for s in shapes)
    return Mixture(weights, bank, added if bias else None)


@functools.partial(jax.jit, static_argnums=0)
def definition(spec, x, filters, guide_features, dy):
    """y, dx, dfilters and scores by convolving with every filter."""
    window, groups = spec.window, spec.groups
    kernel, spatial = window.kernel_size, "DHW"[-len(window.kernel_size) :]
    mask = jax.nn.one_hot(guide_features.argmax(-1), guide_features.shape[-1], dtype=x.dtype)

    def convolve(x, filters):
        filters = mix(filters) if isinstance(filters, Mixture) else filters
        patches = jax.lax.conv_general_dilated_patches(
            x,
            kernel,
            window.strides,
            window.padding,
            rhs_dilation=window.dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        )
        taps, (in_per_group, features) = math.prod(kernel), filters.shape[-2:]
        patches = patches.reshape(*patches.shape[:-1], groups, in_per_group, taps)
        matrices = filters.reshape(*filters.shape[:2], taps, in_per_group, groups, -1)
        every = jnp.einsum("b...gct,bmtcgf->b...gfm", patches, matrices)
        every = every.reshape(*every.shape[:-3], features, -1)
        return jnp.einsum("...fm,...m->...f", every, mask), every

    (y, every), pull = jax.vjp(convolve, x, filters)
    return y, *pull((dy, jnp.zeros_like(every))), jnp.einsum("...fm,...f->...m", every, dy)


def assert_as_defined(spec, x, filters, guide_features, dy, tolerance):
    cpu.supports(spec, x, filters, guide_features)
    y = jax.jit(cpu.forward, static_argnums=0)(spec, x, filters, guide_features)
    gradients = jax.jit(cpu.backward, static_argnums=0)(spec, x, filters, guide_features, y, dy)
    assert y.dtype == gradients[0].dtype == x.dtype
    assert gradients[2].dtype == accumulator(x.dtype)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)), (x, filters, guide_features, dy)
        )
        expected = definition(spec, *wide)
    ours, expected = (jax.tree.flatten_with_path(t)[0] for t in ((y, *gradients), expected))
    for (path, a), (_, b) in zip(ours, expected, strict=True):
        assert a.shape == b.shape, path
        error = np.abs(np.asarray(a, np.float64) - np.asarray(b)).max()
        assert error <= tolerance * np.abs(b).max(), (path, error)


GIVEN = {
    "pointwise": (spec_of((1, 1)), {"features": 40, "regions": 5}),
    "3x3": (spec_of((3, 3)), {"channels": 3, "features": 17}),
    "one dimension, two groups": (spec_of((4,), strides=2, groups=2), {}),
    "three dimensions, dilated": (spec_of((2, 1, 3), dilation=2), {"batch": 2}),
    "one large sample": (spec_of((1, 1)), {"batch": 1, "size": 20}),
}


@needs_kernels
@pytest.mark.parametrize("case", GIVEN)
def test_given_filters(case):
    spec, sizes = GIVEN[case]
    assert_as_defined(spec, *draw(spec, **sizes), 2e-6)


MIXED = {
    "a bank for all": dict(of_weights=(1, 1), of_bank=(3, 2), bank_regions=1),
    "a bank a region": dict(of_weights=(1, 1), of_bank=(3, 2), bank_regions=3),
    "taps of one bank": dict(of_weights=(3, 2), of_bank=(1, 1), bank_regions=1, bias=False),
    "taps of a bank a region": dict(of_weights=(3, 2), of_bank=(1, 1), bank_regions=3),
    "pointwise": dict(of_weights=(1, 1), of_bank=(1, 1), bank_regions=1, n=13, bias=False),
}


@needs_kernels
@pytest.mark.parametrize("sizes", [{}, {"batch": 1, "size": 20}], ids=["batch", "one large sample"])
@pytest.mark.parametrize("case", MIXED)
def test_mixed_filters(case, sizes):
    layout = MIXED[case]
    kernel = np.broadcast_shapes(layout["of_weights"], layout["of_bank"])
    spec = spec_of(kernel, groups=2)
    x, filters, guide_features, dy = draw(spec, **sizes)
    mixture = draw_mixture(filters, **layout)
    assert_as_defined(spec, x, mixture, guide_features, dy, 2e-6)


@needs_kernels
@pytest.mark.parametrize("dtype,tolerance", [(jnp.float64, 1e-14), (jnp.bfloat16, 2**-7)])
def test_other_dtypes(dtype, tolerance):
    spec = spec_of((3, 2))
    with jax.enable_x64(dtype == jnp.float64):
        x, filters, guide_features, dy = draw(spec, dtype=dtype)
        assert_as_defined(spec, x, filters, guide_features, dy, tolerance)
        mixture = draw_mixture(filters, **MIXED["a bank a region"])
        assert_as_defined(spec, x, mixture, guide_features, dy, tolerance)


@needs_kernels
def test_a_gradient_of_some_samples_at_a_time(monkeypatch):
    monkeypatch.setattr(cpu, "_CACHED", 0)
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 1)
    spec = spec_of((3, 2))
    x, filters, guide_features, dy = draw(spec, batch=7)
    mixture = draw_mixture(filters, **MIXED["a bank a region"], n=1)
    assert cpu._scratch(mixture).shape[1] < len(x)
    assert_as_defined(spec, x, mixture, guide_features, dy, 2e-6)


@needs_kernels
def test_given_filters_stay_on_their_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = spec_of((1, 1))
    arrays = draw(spec, batch=8)
    sharded = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))

    def both(x, filters, guide_features, dy):
        y = cpu.forward(spec, x, filters, guide_features)
        return y, *cpu.backward(spec, x, filters, guide_features, y, dy)

    compiled = jax.jit(both).lower(*sharded).compile()
    assert "all-" not in compiled.as_text()  # as in all-gather
    for a, b in zip(compiled(*sharded), jax.jit(both)(*arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_declined(monkeypatch):
    spec = spec_of((3, 2))
    x, filters, guide_features, _ = draw(spec)
    if native.available():
        cpu.supports(spec, x, filters, guide_features)
        with pytest.raises(NotImplementedError, match="float16"):
            cpu.supports(spec, *(a.astype(jnp.float16) for a in (x, filters, guide_features)))
        for of_weights, of_bank in [((3, 1), (1, 2)), ((3, 2), (3, 2))]:
            mixture = draw_mixture(filters, of_weights=of_weights, of_bank=of_bank, bank_regions=1)
            with pytest.raises(NotImplementedError, match="whole filters or single taps"):
                cpu.supports(spec, x, mixture, guide_features)
    why_not = "drconv_jax was installed without its native CPU kernels"
    monkeypatch.setattr(native, "_library", why_not)
    native.available.cache_clear()
    try:
        with pytest.warns(UserWarning, match=why_not) as said:
            for _ in range(2):
                with pytest.raises(NotImplementedError, match="C\\+\\+ compiler"):
                    cpu.supports(spec, x, filters, guide_features)
        assert len(said) == 1
    finally:
        native.available.cache_clear()


# A call of every handler that is right: the shapes of its arguments, and those of its results.
SIZE = 3 * 2 * 2 * 6  # of a filter
X, GUIDE, Y = (2, 5, 4, 4), (2, 4, 3, 3), (2, 4, 3, 6)
FILTERS, WEIGHTS, BANK, BIAS = (2, 3, 3, 2, 2, 6), (2, 3, 1, 5), (3, 5, SIZE), (3, SIZE)
GIVEN_FILTERS = {"x": X, "filters": FILTERS, "guide": GUIDE}
MIXTURE = {"x": X, "weights": WEIGHTS, "bank": BANK, "bias": BIAS, "guide": GUIDE}
HANDLERS = {
    "drconv_region_conv_forward": (GIVEN_FILTERS, {"y": Y}),
    "drconv_region_conv_backward": (
        {**GIVEN_FILTERS, "y": Y, "dy": Y},
        {"dx": X, "dfilters": FILTERS, "scores": GUIDE},
    ),
    "drconv_mixed_region_conv_forward": (MIXTURE, {"y": Y}),
    "drconv_mixed_region_conv_backward": (
        {**MIXTURE, "y": Y, "dy": Y},
        {
            "dx": X,
            "dweights": WEIGHTS,
            "dbank": BANK,
            "dbias": BIAS,
            "scores": GUIDE,
            "scratch": (2, 2, 3 * SIZE),
        },
    ),
}
ATTRIBUTES = {"kernel": (3, 2), "strides": (1, 1), "low": (1, 0), "dilation": (1, 1), "groups": 2}


def call(name, changed=(), **attributes):
    """Calls a handler as it should be called, but for what is changed."""
    arguments, results = (
        [jax.ShapeDtypeStruct(*dict(changed).get(k, (s, jnp.float32))) for k, s in part.items()]
        for part in HANDLERS[name]
    )
    numbers = {
        k: v if isinstance(v, np.generic | np.ndarray) else np.asarray(v, np.int64)[()]
        for k, v in {**ATTRIBUTES, **attributes}.items()
    }
    arrays = [jnp.zeros(a.shape, a.dtype) for a in arguments]
    return jax.block_until_ready(jax.ffi.ffi_call(name, results)(*arrays, **numbers))


@needs_kernels
@pytest.mark.parametrize("name", HANDLERS)
def test_malformed_buffers_are_refused(name):
    call(name)
    arguments, results = HANDLERS[name]
    for key, shape in {**arguments, **results}.items():
        wrong = [
            (shape, jnp.int32),
            (shape, jnp.bfloat16),
            (shape[:-1], jnp.float32),
            ((*shape, 1), jnp.float32),
        ]
        for axis, length in enumerate(shape):
            # Windows may lie anywhere; any number of samples may have their filters at once.
            free = (key == "x" and "dx" not in results and 0 < axis < 3) or (
                (key, axis) == ("scratch", 1)
            )
            # XLA does not call what has nothing to compute.
            others = ([] if results.keys() == {key} else [0]) + ([] if free else [length + 1])
            for other in others:
                wrong.append(((*shape[:axis], other, *shape[axis + 1 :]), jnp.float32))
        for change in wrong:
            with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*(expect|got)"):
                call(name, {key: change})
                pytest.fail(f"accepted {key} of {change}")


@needs_kernels
@pytest.mark.parametrize("name", HANDLERS)
def test_malformed_attributes_are_refused(name):
    wrong = [(key, numbers) for key in ATTRIBUTES for numbers in [(), (1,), (1, 1, 1), (1,) * 4]]
    wrong += [
        ("kernel", (3, 3)),
        ("kernel", (3, 0)),
        ("kernel", (1 << 62, 1 << 62)),
        ("strides", (1, 0)),
        ("strides", (-1, 1)),
        ("strides", (1 << 31, 1)),
        ("low", (1 << 31, 0)),
        ("low", (-1 << 63, 0)),
        ("dilation", (0, 1)),
        ("dilation", (1, 1 << 62)),
        ("groups", 0),
        ("groups", -2),
        ("groups", 3),
        ("groups", np.float32(1.5)),
        ("kernel", np.array([3, 2], np.int32)),
        ("low", np.array([1, 0], np.float32)),
        ("another", 1),
    ]
    for key, numbers in wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call(name, **{key: numbers})
            pytest.fail(f"accepted {key} of {numbers}")
