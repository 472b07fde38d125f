import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_region_conv import few

from drconv_jax.mixing import mix


def draw(seed, batch, taps, regions, n, size, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (batch, taps, regions, n), (regions, n, size), (regions, size)
    args = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=False)]
    return args, jax.random.normal(keys[3], (batch, regions, taps, size)).astype(dtype)


def with_gradients(weights, bank, bias, cotangent):
    guide = jnp.zeros((len(weights), 1, 1))  # of one region: every filter is needed
    filters, vjp = jax.vjp(lambda *args: mix(*args, guide_features=guide), weights, bank, bias)
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


@few(12)
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
def test_without_a_guide_xla_does_it(dtype, tolerance):
    args, cotangent = draw(1, 5, 9, 3, 4, 70, dtype)
    filters, vjp = jax.vjp(mix, *args)
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


@pytest.mark.parametrize("taps,regions", [(1, 5), (9, 5), (5, 1)])
def test_filters_of_chosen_regions_are_made(taps, regions):
    (weights, bank, bias), _ = draw(4, 6, taps, regions, 3, 40)
    m = regions if regions > 1 else taps
    guide = jax.random.normal(jax.random.key(5), (6, 2, 2, m)).at[1:].set(jnp.nan)
    chosen = np.asarray(jax.nn.one_hot(guide.argmax(-1), m)).any(axis=(1, 2))
    assert not chosen.all()
    filters = np.asarray(jax.jit(mix)(weights, bank, bias, guide_features=guide))
    expected = in_float64(weights, bank, bias, np.zeros(filters.shape))[0]
    if regions == 1:
        filters, expected = np.moveaxis(filters, 2, 1), np.moveaxis(expected, 2, 1)
    np.testing.assert_allclose(filters[chosen], expected[chosen], rtol=1e-5, atol=1e-5)


def test_every_filter_is_made_for_the_gradient():
    args, cotangent = draw(6, 3, 1, 4, 2, 20)
    guide = jnp.zeros((3, 7, 4))  # all choose the first region
    filters, vjp = jax.vjp(lambda *args: mix(*args, guide_features=guide), *args)
    assert_close((filters, *vjp(cotangent)), args, cotangent, 1e-6)
