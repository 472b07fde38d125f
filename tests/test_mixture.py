import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from test_region_conv import ALL, PALLAS, derivatives, few

from drconv_jax import region_conv
from drconv_jax.region_conv import Mixture, mix


def draw_mixture(seed, batch, kernel, m, n, shared, in_per_group=3, features=4, dtype=jnp.float32):
    """Of one bank that all regions share, or of one for each, which its taps share."""
    keys = jax.random.split(jax.random.key(seed), 3)
    ones = (1,) * len(kernel)
    in_weights, in_bank = (ones, kernel) if shared else (kernel, ones)
    bank = (1 if shared else m, n, *in_bank, in_per_group, features)
    shapes = (batch, m, *in_weights, n), bank, (bank[0], *bank[2:])
    arrays = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]
    return Mixture(*arrays)


def in_float64(mixture):
    weights, bank, bias = (np.asarray(a, np.float64) for a in mixture)
    kernel = np.broadcast_shapes(weights.shape[2:-1], bank.shape[2:-2])
    weights = np.broadcast_to(weights, (*weights.shape[:2], *kernel, weights.shape[-1]))
    bank = np.broadcast_to(bank, (weights.shape[1], bank.shape[1], *kernel, *bank.shape[-2:]))
    bank = np.moveaxis(bank, 1, -3)
    return (weights[..., None, None] * bank[None]).sum(-3) + bias[None]


@few(6)
@given(
    seed=st.integers(0, 2**32 - 1),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    m=st.integers(1, 4),
    n=st.sampled_from([1, 3, 8]),
    shared=st.booleans(),
)
def test_mixing(seed, kernel, m, n, shared):
    mixture = draw_mixture(seed, 2, kernel, m, n, shared)
    filters = mix(mixture)
    expected = in_float64(mixture)
    assert filters.shape == mixture.shape == expected.shape
    assert mixture.kernel_size == kernel
    np.testing.assert_allclose(filters, expected, rtol=1e-5, atol=1e-5)
    without = mix(mixture._replace(bias=None))
    np.testing.assert_allclose(without, expected - np.asarray(mixture.bias), rtol=1e-5, atol=1e-5)


def test_mixing_in_bfloat16_sums_in_float32():
    mixture = draw_mixture(1, 2, (1, 1), 3, 33, True, dtype=jnp.bfloat16)
    filters = mix(mixture)
    assert filters.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(filters, np.float64), in_float64(mixture), rtol=2**-8, atol=1e-5
    )


def draw_layer(
    seed, batch, size, kernel, m, n, shared, *, groups=1, in_per_group=5, features=6, strides=1,
    dtype=jnp.float32, guide_dtype=jnp.float32,
):  # fmt: skip
    """x, a mixture of m filters and guide features; the output's gradient; keywords."""
    keys = jax.random.split(jax.random.key(seed), 3)
    out = -(-size // strides)
    x = jax.random.normal(keys[0], (batch, size, size, groups * in_per_group)).astype(dtype)
    mixture = draw_mixture(seed, batch, (kernel,) * 2, m, n, shared, in_per_group, features, dtype)
    guide = jax.random.normal(keys[1], (batch, out, out, m)).astype(guide_dtype)
    dy = jax.random.normal(keys[2], (batch, out, out, features)).astype(dtype)
    return (x, mixture, guide), dy, {"feature_group_count": groups, "strides": strides}


def with_gradients(args, dy, how, implementation=None):
    y, pull = jax.vjp(lambda *args: region_conv(*args, implementation=implementation, **how), *args)
    return y, *pull(dy)


def assert_like_reference(args, dy, how, tolerance, implementation=None):
    ours, expected = (
        jax.jit(lambda args, dy, name=name: with_gradients(args, dy, how, name))(args, dy)
        for name in (implementation, "reference")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=1)


@few(3)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 9),
    size=st.integers(1, 8),
    kernel=st.sampled_from([1, 3]),
    m=st.integers(1, 13),
    n=st.sampled_from([1, 3, 8, 13]),
    shared=st.booleans(),
    groups=st.integers(1, 3),
    in_per_group=st.sampled_from([1, 5, 33]),
    features=st.sampled_from([6, 36, 102]),
    strides=st.integers(1, 2),
)
def test_convolving_with_a_mixture(seed, batch, size, kernel, m, n, shared, **shapes):
    assert_like_reference(*draw_layer(seed, batch, size, kernel, m, n, shared, **shapes), 1e-5)


@pytest.mark.parametrize(
    "implementation", [*(name for name in ALL if name not in PALLAS), "experts_first"]
)
def test_every_implementation_takes_mixtures(implementation):
    shared = draw_layer(4, 3, 5, 3, 4, 3, True, groups=2, strides=2)
    assert_like_reference(*shared, 1e-5, implementation)
    if implementation != "experts_first":
        own = draw_layer(5, 3, 5, 3, 4, 3, False, groups=2, strides=2)
        assert_like_reference(*own, 1e-5, implementation)


@pytest.mark.parametrize("shared,implementation", [(True, None), (False, "cpu")])
@pytest.mark.parametrize(
    "dtype,guide_dtype,tolerance",
    [
        (jnp.float64, jnp.float64, 1e-13),
        (jnp.float32, jnp.bfloat16, 2**-7),  # that of the guide's gradient
        # The reference rounds filters, of which there are n = 4 terms, and their gradients.
        (jnp.bfloat16, jnp.float32, 2**-6),
    ],
)
def test_convolving_in_other_dtypes(dtype, guide_dtype, tolerance, shared, implementation):
    with jax.enable_x64(dtype == jnp.float64):
        layer = draw_layer(0, 5, 7, 3, 4, 4, shared, groups=2, dtype=dtype, guide_dtype=guide_dtype)
        assert_like_reference(*layer, tolerance, implementation)


def test_some_samples_at_a_time():
    # 9 MB of filters and a small bank: the backward kernel takes more than one turn.
    layer = draw_layer(0, 9, 3, 1, 8, 1, True, in_per_group=180, features=180)
    assert_like_reference(*layer, 1e-5)


@pytest.mark.parametrize("size", [7, 20])
def test_nothing_as_large_as_the_filters_is_needed(size):
    args, dy, how = draw_layer(0, 32, size, 1, 8, 8, True, in_per_group=192, features=192)
    step = jax.jit(lambda args, dy: with_gradients(args, dy, how)).lower(args, dy)
    compiled = step.compile()
    names = ["drconv_mixed_region_conv_forward", "drconv_mixed_region_conv_backward"]
    assert all(name in compiled.as_text() for name in names)
    filters = 4 * 32 * 8 * 192 * 192
    assert compiled.memory_analysis().temp_size_in_bytes < filters


def test_second_derivatives_and_forward_mode():
    (x, mixture, guide), _, how = draw_layer(6, 2, 4, 3, 3, 2, True)
    arrays = (x, mixture.weights, mixture.bank)
    keys = jax.random.split(jax.random.key(0), 3)
    directions = tuple(jax.random.normal(key, a.shape) for key, a in zip(keys, arrays, strict=True))

    def convolve(x, weights, bank):
        return region_conv(x, Mixture(weights, bank, mixture.bias), guide, **how)

    def definition(x, weights, bank):
        filters = mix(Mixture(weights, bank, mixture.bias))
        return region_conv(x, filters, guide, implementation="select", **how)

    ours, expected = (
        jax.jit(functools.partial(derivatives, function))(arrays, directions)
        for function in (convolve, definition)
    )
    for name in expected:
        for a, b in zip(*map(jax.tree.leaves, (ours[name], expected[name])), strict=True):
            scale = float(np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("implementation", [None, "experts_first"])
@pytest.mark.parametrize("bank_too", [True, False])
def test_many_convolutions_with_mixtures_at_once(bank_too, implementation):
    (x, mixture, guide), dy, how = draw_layer(1, 3, 4, 3, 4, 2, True)
    twice = lambda a: jnp.stack([a, 2 * a])  # noqa: E731
    if bank_too:
        axes, many = Mixture(0, 0, 0), jax.tree.map(twice, mixture)
    else:
        axes, many = Mixture(0, None, None), mixture._replace(weights=twice(mixture.weights))
    together = jax.vmap(
        lambda x, mixture, guide, dy: with_gradients((x, mixture, guide), dy, how, implementation),
        (0, axes, 0, 0),
    )(twice(x), many, twice(guide), twice(dy))
    for i, factor in enumerate((1, 2)):
        own = jax.tree.map(lambda a, f=factor: f * a, mixture)
        if not bank_too:
            own = mixture._replace(weights=own.weights)
        args = factor * x, own, factor * guide
        expected = with_gradients(args, factor * dy, how, "reference")
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [3, 12])
def test_a_mesh_sums_the_gradients_of_the_bank_alone(size, mesh):
    (x, mixture, guide), dy, how = draw_layer(2, 16, size, 1, 2, 3, True)
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    x, weights, guide, dy = jax.device_put((x, mixture.weights, guide, dy), by_batch)
    bank, bias = jax.device_put((mixture.bank, mixture.bias), whole)
    args = x, Mixture(weights, bank, bias), guide
    run = jax.jit(lambda args, dy: with_gradients(args, dy, how)).lower(args, dy).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in run.as_text()
    y, dx, dmixture, dguide = run(args, dy)
    for a in (y, dx, dmixture.weights, dguide):
        assert a.sharding.is_equivalent_to(by_batch, a.ndim)
    for a in (dmixture.bank, dmixture.bias):
        assert a.sharding.is_equivalent_to(whole, a.ndim)
    args, alone = jax.tree.map(jnp.asarray, jax.device_get((args, dy)))
    expected = with_gradients(args, alone, how, "reference")
    for a, b in zip(
        jax.tree.leaves((y, dx, dmixture, dguide)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_exported_programs_are_made_of_xlas_operations(shared):
    (x, mixture, guide), dy, how = draw_layer(7, 3, 5, 3, 4, 2, shared)
    (batch,) = jax.export.symbolic_shape("b")
    per_sample = lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype)  # noqa: E731

    def run(x, weights, guide, dy):
        args = x, mixture._replace(weights=weights), guide
        return jax.tree.leaves(with_gradients(args, dy, how))

    given = x, mixture.weights, guide, dy
    exported = jax.export.export(jax.jit(run), platforms=["cpu", "tpu", "cuda"])(
        *map(per_sample, given)
    )
    calls = set(re.findall(r"custom_call @(\w+)", exported.mlir_module()))
    assert calls <= {"shape_assertion"}  # JAX's own, of the batch size
    ours = jax.export.deserialize(exported.serialize()).call(*given)
    expected = with_gradients((x, mixture, guide), dy, how, "reference")
    for a, b in zip(ours, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_function_of_a_mixture_is_exported_and_read_again():
    _, mixture, _ = draw_layer(7, 3, 5, 3, 4, 2, True)[0]
    exported = jax.export.export(jax.jit(mix))(mixture)
    filters = jax.export.deserialize(exported.serialize()).call(mixture)
    np.testing.assert_allclose(filters, mix(mixture), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_any_bytes_may_be_guide_features(shared):
    (x, mixture, guide), _, how = draw_layer(3, 4, 5, 1, 6, 3, shared)
    bits = np.random.default_rng(0).integers(0, 2**32, guide.shape, np.uint32)
    guide = jnp.asarray(bits.view(np.float32))
    y, expected = (
        region_conv(x, mixture, guide, implementation=name, **how) for name in (None, "reference")
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(weights=(2, 4, 2, 1, 3)), ValueError, r"got shapes \(2, 4, 2, 1, 3\), \(1, 3, 3, 3"),
        (dict(weights=(2, 4, 1, 3)), ValueError, "a Mixture must have weights .* 2 kernel dim"),
        (dict(bank=(2, 3, 3, 3, 5, 6)), ValueError, r"\(regions or 1, n"),
        (dict(weights=(2, 4, 1, 1, 0), bank=(1, 0, 3, 3, 5, 6)), ValueError, "n at least 1"),
        (dict(bank=(1, 4, 3, 3, 5, 6)), ValueError, r"\(regions or 1, n"),
        (dict(bias=(1, 1, 3, 5, 6)), ValueError, "bias like the bank without n"),
        (dict(weights=(3, 4, 1, 1, 3)), ValueError, "batch 2 and 2 kernel dimensions"),
    ],
)
def test_bad_mixtures(no_shape_checks, change, error, message):
    (x, mixture, guide), _, how = draw_layer(0, 2, 4, 3, 4, 3, True)
    mixture = mixture._replace(**{name: jnp.zeros(shape) for name, shape in change.items()})
    with pytest.raises(error, match=message):
        region_conv(x, mixture, guide, **how)


def test_a_bank_of_another_dtype():
    (x, mixture, guide), _, how = draw_layer(0, 2, 4, 3, 4, 3, True)
    mixture = mixture._replace(bank=mixture.bank.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="the bank of a Mixture .* float32, got bfloat16"):
        region_conv(x, mixture, guide, **how)
