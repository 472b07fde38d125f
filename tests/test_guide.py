import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drconv_jax import guide, guide_mask, region_conv, region_index
from drconv_jax.guide import grid_features


def softmax_gradient(features, cotangent):
    """Eq. 7-8 written out for one position, in float64."""
    exponentials = [np.exp(f) for f in features]
    s = [e / sum(exponentials) for e in exponentials]
    return [
        s[j] * (cotangent[j] - sum(s_i * g_i for s_i, g_i in zip(s, cotangent, strict=True)))
        for j in range(len(features))
    ]


class GuideTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_one_hot_of_the_first_maximum(self):
        features = jnp.array([[0.0, 2.0, 2.0], [3.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
        mask = self.variant(guide_mask)(features)
        np.testing.assert_array_equal(mask, [[0, 1, 0], [1, 0, 0], [1, 0, 0]])
        np.testing.assert_array_equal(self.variant(region_index)(features), [1, 0, 0])

    @chex.variants(with_jit=True, without_jit=True)
    def test_gradient_is_that_of_softmax(self):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            features, cotangent = rng.normal(size=(2, 3, 5))
            gradient = self.variant(lambda f, c: jax.vjp(guide_mask, f)[1](c)[0])(
                jnp.asarray(features), jnp.asarray(cotangent)
            )
            expected = [softmax_gradient(*pair) for pair in zip(features, cotangent, strict=True)]
            np.testing.assert_allclose(gradient, expected, rtol=1e-12)


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function])
def test_the_region_is_numpys_argmax(jit):
    """Ties and NaN included, compiled and not."""
    rng = np.random.default_rng(0)
    features = rng.integers(-2, 3, (500, 7)).astype(np.float32)
    special = rng.random(features.shape)
    features[special < 0.1] = np.nan
    features[(special > 0.1) & (special < 0.2)] = np.inf
    features[special > 0.9] = -np.inf
    index = jit(region_index)(jnp.asarray(features))
    np.testing.assert_array_equal(index, features.argmax(-1))
    elsewhere = guide.region_index_by_comparison(
        jnp.asarray(features)
    )  # op by op, XLA's CPU keeps NaN
    np.testing.assert_array_equal(elsewhere, features.argmax(-1))


def test_nan_gives_a_region_and_shows_in_the_gradient():
    features = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 1.0, 2.0]])
    index = region_index(features)
    assert index.tolist() == [1, 2]
    (gradient,) = jax.vjp(guide_mask, features)[1](jnp.ones((2, 3)))
    assert jnp.isnan(gradient[0]).all() and jnp.isfinite(gradient[1]).all()


def test_softmax_is_in_float32_for_bfloat16():
    features = jnp.array([[8.0, 0.0]], jnp.bfloat16)
    cotangent = jnp.array([[1.0, 0.0]], jnp.bfloat16)
    (gradient,) = jax.vjp(guide_mask, features)[1](cotangent)
    s = 1 / (1 + np.exp(-8.0))  # in bfloat16, s (1 - s) would be 0
    np.testing.assert_allclose(float(gradient[0, 0]), s * (1 - s), rtol=2**-8)


def test_vmap_agrees_with_the_whole():
    features = jax.random.normal(jax.random.key(0), (3, 4, 5))
    np.testing.assert_array_equal(jax.vmap(guide_mask)(features), guide_mask(features))


def test_bad_features(no_shape_checks):
    remedy = "floating point, got int32: cast .*astype.*or .*jax.nn.one_hot"
    for take in (guide_mask, region_index):
        with pytest.raises(TypeError, match=remedy):
            take(jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(TypeError, match=remedy):
        x, filters = jnp.zeros((1, 5, 5, 4)), jnp.zeros((1, 3, 3, 3, 4, 6))
        region_conv(x, filters, jnp.zeros((1, 5, 5, 3), jnp.int32))
    with pytest.raises(ValueError, match="regions must be at least 1, got 0"):
        grid_features(4, 4, 0)
    with pytest.raises(ValueError, match=r"at least one region, got \(2, 0\)"):
        region_index(jnp.zeros((2, 0)))


def test_a_grid():
    index = np.asarray(grid_features(4, 8, 8).argmax(-1))
    expected = np.arange(8).reshape(2, 4).repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(index, expected)
    assert np.unique(grid_features(9, 7, 3).argmax(-1)).tolist() == [0, 1, 2]
