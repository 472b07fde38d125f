import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from test_region_conv import few

from drconv_jax.mixing import Factors, mix, mixed_region_conv


def draw(seed, batch, taps, regions, n, size, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (batch, taps, regions, n), (regions, n, size), (regions, size)
    args = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=False)]
    return args, jax.random.normal(keys[3], (batch, regions, taps, size)).astype(dtype)


def with_gradients(weights, bank, bias, cotangent):
    filters, vjp = jax.vjp(lambda *args: mix(Factors(*args), native=True), weights, bank, bias)
    return filters, *vjp(cotangent)


def in_float64(weights, bank, bias, cotangent):
    w, v, b, d = (np.asarray(a, np.float64) for a in (weights, bank, bias, cotangent))
    return (
        np.einsum("btrn,rnf->brtf", w, v) + b[None, :, None],
        np.einsum("brtf,rnf->btrn", d, v),
        np.einsum("brtf,btrn->rnf", d, w),
        d.sum((0, 2)),
    )


def assert_close(ours, args, cotangent, tolerance):
    """Errors are as small as rounding makes them: a share of the sum of the terms' magnitudes."""
    expected = in_float64(*args, cotangent)
    magnitudes = in_float64(*(np.abs(np.asarray(a, np.float64)) for a in (*args, cotangent)))
    for a, b, magnitude in zip(ours, expected, magnitudes, strict=True):
        assert a.shape == b.shape
        assert (np.abs(np.asarray(a, np.float64) - b) <= tolerance * magnitude).all()


@few(8)
@given(
    batch=st.integers(1, 15),
    taps=st.sampled_from([1, 9]),
    regions=st.integers(1, 5),
    n=st.sampled_from([1, 2, 8, 13, 33]),
    size=st.sampled_from([1, 7, 16, 255, 256, 300, 600]),
)
def test_products_and_gradients(batch, taps, regions, n, size):
    args, cotangent = draw(0, batch, taps, regions, n, size)
    ours = jax.jit(with_gradients)(*args, cotangent)
    assert_close(ours, args, cotangent, 1e-6)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float64, 1e-13), (jnp.bfloat16, 2**-8)])
def test_other_dtypes(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        args, cotangent = draw(1, 5, 9, 3, 4, 70, dtype)
        ours = with_gradients(*args, cotangent)
        assert all(a.dtype == dtype for a in ours)
        assert_close(ours, args, cotangent, tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_xla_does_it(dtype, tolerance):
    args, cotangent = draw(1, 5, 9, 3, 4, 70, dtype)
    filters, vjp = jax.vjp(lambda *args: mix(Factors(*args)), *args)
    assert_close((filters, *vjp(cotangent)), args, cotangent, tolerance)


def test_many_mixtures_at_once():
    args, cotangent = draw(2, 3, 1, 2, 4, 20)
    banks = jnp.stack([args[1], 2 * args[1]])
    together = jax.vmap(with_gradients, (None, 0, None, None))(args[0], banks, args[2], cotangent)
    for i in range(2):
        alone = args[0], banks[i], args[2]
        assert_close([leaf[i] for leaf in together], alone, cotangent, 1e-6)


def test_an_empty_batch_has_zero_gradients():
    args, cotangent = draw(3, 0, 1, 2, 4, 20)
    filters, _, dbank, dbias = with_gradients(*args, cotangent)
    assert filters.shape == (0, 2, 1, 20)
    assert not dbank.any() and not dbias.any()


def draw_layer(
    seed, batch, size, kernel, m, n, shared, *, groups=1, in_per_group=5, features=6, strides=1,
    dtype=jnp.float32, guide_dtype=jnp.float32,
):  # fmt: skip
    """x, the factors of m filters (of one bank or of m) and guide features; how to use them."""
    keys = jax.random.split(jax.random.key(seed), 6)
    in_features, taps = groups * in_per_group, kernel**2
    out = -(-size // strides)
    weights = (batch, m, 1, n) if shared else (batch, taps, m, n)
    bank = (1, n, taps * in_per_group * features) if shared else (m, n, in_per_group * features)
    shapes = (batch, size, size, in_features), weights, bank, (bank[0], bank[2])
    args = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=False)]
    guide = jax.random.normal(keys[4], (batch, out, out, m)).astype(guide_dtype)
    dy = jax.random.normal(keys[5], (batch, out, out, features)).astype(dtype)
    how = {"features": features, "kernel_size": (kernel, kernel), "feature_group_count": groups}
    return (*args, guide), dy, how | {"strides": strides}


def convolve(args, how, implementation=None):
    x, weights, bank, bias, guide = args
    factors = Factors(weights, bank, bias)
    return mixed_region_conv(x, factors, guide, implementation=implementation, **how)


def convolve_with_gradients(args, dy, how, implementation=None):
    y, vjp = jax.vjp(lambda *args: convolve(args, how, implementation), *args)
    return y, *vjp(dy)


def assert_like_reference(args, dy, how, tolerance, implementation=None):
    ours, expected = (
        jax.jit(lambda args, dy, name=name: convolve_with_gradients(args, dy, how, name))(args, dy)
        for name in (implementation, "reference")
    )
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=1)


@few(5)
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
def test_convolving_with_mixtures(seed, batch, size, kernel, m, n, shared, **shapes):
    assert_like_reference(*draw_layer(seed, batch, size, kernel, m, n, shared, **shapes), 1e-5)


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


def test_nothing_as_large_as_the_filters_is_needed():
    args, dy, how = draw_layer(0, 32, 7, 1, 8, 8, True, in_per_group=192, features=192)
    step = jax.jit(lambda args, dy: convolve_with_gradients(args, dy, how)).lower(args, dy)
    compiled = step.compile()
    names = ["drconv_mixed_region_conv_forward", "drconv_mixed_region_conv_backward"]
    assert all(name in compiled.as_text() for name in names)
    filters = 4 * 32 * 8 * 192 * 192
    assert compiled.memory_analysis().temp_size_in_bytes < filters


def test_filters_that_serve_many_positions_are_kept_for_the_gradient():
    args, dy, how = draw_layer(0, 1, 12, 1, 2, 3, True)  # 144 positions, more than 2 x 64
    forward = jax.jit(lambda args: convolve(args, how)).lower(args).as_text()
    both = (
        jax.jit(lambda args, dy: convolve_with_gradients(args, dy, how)).lower(args, dy).as_text()
    )
    assert "drconv_mixed_region_conv_forward" in forward
    assert "drconv_region_conv_backward" in both and "drconv_mixed" not in both
    assert_like_reference(args, dy, how, 1e-5)
    np.testing.assert_allclose(
        convolve(args, how), convolve(args, how, "reference"), rtol=1e-5, atol=1e-5
    )


def test_many_convolutions_with_mixtures_at_once():
    args, dy, how = draw_layer(1, 3, 4, 3, 4, 2, True)
    two = [jnp.stack([a, 2 * a]) for a in (*args, dy)]
    together = jax.vmap(lambda *a: convolve_with_gradients(a[:-1], a[-1], how))(*two)
    for i in range(2):
        *alone, dy = (a[i] for a in two)
        expected = convolve_with_gradients(alone, dy, how, "reference")
        for a, b in zip(together, expected, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [3, 12])  # filters are mixed on the way, and kept
def test_a_mesh_sums_the_gradients_of_the_bank_alone(size, mesh):
    (x, weights, bank, bias, guide), dy, how = draw_layer(2, 16, size, 1, 2, 3, True)
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    x, weights, guide, dy = jax.device_put((x, weights, guide, dy), by_batch)
    args = x, weights, *jax.device_put((bank, bias), whole), guide
    run = jax.jit(lambda args, dy: convolve_with_gradients(args, dy, how)).lower(args, dy).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in run.as_text()
    ours = run(args, dy)
    args, dy = jax.tree.map(jnp.asarray, jax.device_get((args, dy)))
    expected = convolve_with_gradients(args, dy, how, "reference")
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.sharding.is_equivalent_to(whole if i in (3, 4) else by_batch, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_any_bytes_may_be_guide_features(shared):
    args, _, how = draw_layer(3, 4, 5, 1, 6, 3, shared)
    bits = np.random.default_rng(0).integers(0, 2**32, args[4].shape, np.uint32)
    args = (*args[:4], jnp.asarray(bits.view(np.float32)))
    y, expected = (convolve(args, how, name) for name in (None, "reference"))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
