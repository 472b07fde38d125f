import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.cost import multiply_adds
from drconv_jax.filters import GENERATORS
from drconv_jax.geometry import adaptive_average_pool, resize_nearest
from drconv_jax.region_conv import Mixture, mix


def filters_of(generator, params, x, kernel_size):
    return mix(generator.mixture(params, x, kernel_size))


def test_adaptive_pooling_has_overlapping_bins():
    x = jnp.arange(7.0).reshape(1, 7, 1)
    # 3 bins over 7 positions: [0, 3), [2, 5), [4, 7)
    np.testing.assert_allclose(adaptive_average_pool(x, (3,))[0, :, 0], [1.0, 3.0, 5.0], rtol=1e-6)
    # 3 bins over 2 positions: [0, 1), [0, 2), [1, 2)
    np.testing.assert_allclose(
        adaptive_average_pool(x[:, :2], (3,))[0, :, 0], [0.0, 0.5, 1.0], rtol=1e-6
    )


def test_nearest_resize_reads_the_floor():
    values = jnp.arange(5.0).reshape(1, 5, 1)
    assert resize_nearest(values, (3,))[0, :, 0].tolist() == [0.0, 1.0, 3.0]
    assert resize_nearest(values, (7,))[0, :, 0].tolist() == [0, 0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("regions", [1, 8])
@pytest.mark.parametrize("channels", [16, 256])
def test_new_layer_has_the_variance_of_a_new_convolution(generator, kernel, regions, channels):
    size = (kernel, kernel)
    layer = DRConv(64, size, regions=regions, filter_generator=generator, implementation="blocked")
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, channels))

    @functools.partial(jax.jit, static_argnums=0)
    def output(module, key):
        return module.apply(module.init(key, x), x)

    keys = [jax.random.key(seed) for seed in range(2)]
    ours = np.mean([output(layer, key).var() for key in keys])
    plain = np.mean([output(nn.Conv(64, size), key).var() for key in keys])
    assert abs(ours / plain - 1) < 0.25


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("regions", [1, 3])
def test_a_new_filter_is_one_draw_of_kernel_init(generator, regions):
    """Whatever kernel_init is: of an input of zeros, all mixing weights are at their middle."""

    def filters(kernel_init, kernel_size, features=6):
        generate = GENERATORS[generator]
        params = generate.init(
            jax.random.key(0), 4, features, kernel_size, regions, kernel_init=kernel_init
        )
        return filters_of(generate, params, jnp.zeros((1, 5, 5, 4)), kernel_size)[0]

    for value in (0.0, 0.3, -2.0):
        made = filters(nn.initializers.constant(value), (3, 3))
        np.testing.assert_allclose(made, np.full((regions, 3, 3, 4, 6), value), rtol=1e-6)
    for rotation in filters(nn.initializers.orthogonal(), (1, 1), features=4)[:, 0, 0]:
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(4), atol=1e-6)
    identity = filters(nn.initializers.delta_orthogonal(), (3, 3))
    middle = nn.initializers.delta_orthogonal()(jax.random.key(0), (3, 3, 4, 6))[1, 1]
    assert np.abs(identity[:, 1, 1]).sum() > 0.5 * np.abs(middle).sum()
    uniform = filters(nn.initializers.uniform(1.0), (1, 1), features=1000)
    assert -1e-6 < uniform.min() < 0.01 and 0.99 < uniform.max() < 1 + 1e-6
    np.testing.assert_allclose(uniform.mean(), 0.5, atol=0.02)  # 4 standard deviations
    np.testing.assert_allclose(uniform.var(), 1 / 12, atol=0.005)


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_filters_of_a_bank_vary_as_independent_draws(generator):
    kernel_init = nn.initializers.normal(1.0)
    init = GENERATORS[generator].init
    bank = init(jax.random.key(0), 10, 2000, (1, 1), 4, kernel_init=kernel_init)["bank_kernel"]
    bank = bank[0] if generator == "pooled" else bank
    bank = bank.reshape(len(bank), -1)
    scale = {"mixture": 1, "pooled": 2 / 4**0.5, "experts": 8**0.5}[generator]
    covariance = np.cov(bank / scale)
    np.testing.assert_allclose(covariance, np.eye(len(bank)), atol=0.04)  # 4 standard deviations


@pytest.mark.parametrize("generator", GENERATORS)
def test_regions_start_alike_and_samples_apart(generator):
    generate = GENERATORS[generator]
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4)) + 1
    params = generate.init(jax.random.key(0), 4, 6, (3, 3), 5)
    filters = filters_of(generate, params, x, (3, 3))
    assert filters.shape == (2, 5, 3, 3, 4, 6)
    for region in range(1, 5):
        np.testing.assert_allclose(filters[:, region], filters[:, 0], rtol=1e-6, atol=1e-7)
    assert np.abs(filters[0] - filters[1]).max() > 1e-3


@pytest.mark.parametrize("generator", GENERATORS)
def test_generator_against_loops(generator):
    m, channels, features, experts = 3, 4, 5, 2
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 3, channels)).astype(np.float32)
    generate = GENERATORS[generator]
    params = generate.init(jax.random.key(0), channels, features, (3, 3), m, experts=experts)
    params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
    filters = np.asarray(
        filters_of(generate, jax.tree.map(jnp.asarray, params), jnp.asarray(x), (3, 3))
    )
    for b, j, u, v in np.ndindex(2, m, 3, 3):
        if generator == "pooled":  # 3x3 pooled to 3x3 is itself
            context, n = x[b, u, v], m
        else:
            context, n = x[b].mean((0, 1)), experts
        logits = np.array([context @ params["mixing_kernel"][:, j, i] for i in range(n)])
        logits += params["mixing_bias"][j]
        if generator == "mixture":
            logits += context @ params["shared_mixing_kernel"] + params["shared_mixing_bias"]
        weights = 1 / (1 + np.exp(-logits))
        if generator == "pooled":
            bank, bias = params["bank_kernel"][j], params["bank_bias"][j]
        else:
            whole = n if generator == "experts" else n**0.5
            weights, bank, bias = 2 * weights / whole, params["bank_kernel"][:, u, v], 0
        expected = sum(w * e for w, e in zip(weights, bank, strict=True)) + bias
        np.testing.assert_allclose(filters[b, j, u, v], expected, rtol=2e-5, atol=2e-5)


def test_a_step_on_the_default_bank_is_one_on_the_filters():
    """So that the learning rate of nn.Conv does for DRConv."""
    generate = GENERATORS["mixture"]
    params = generate.init(jax.random.key(0), 4, 6, (1, 1), 2)
    x = jnp.zeros((1, 5, 5, 4))  # of which the mixing weights are all at their middle
    direction = jax.random.normal(jax.random.key(1), (4, 6))

    def along(bank):
        filters = filters_of(generate, {**params, "bank_kernel": bank}, x, (1, 1))
        return (filters[0, 0, 0, 0] * direction).sum()

    step = jax.grad(along)(params["bank_kernel"])
    moved = filters_of(generate, {**params, "bank_kernel": step}, x, (1, 1))
    np.testing.assert_allclose(moved[0, 0, 0, 0], direction, rtol=1e-5)


def test_what_regions_share_learns_from_all_of_them():
    """As fast with many regions as with one, which sees all of a sample's positions."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4)) + 1
    dfilters = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 4, 6))

    def gradients(regions):
        generate = GENERATORS["mixture"]
        params = generate.init(jax.random.key(2), 4, 6, (1, 1), regions)
        # Every region has an equal share of the positions, and of the gradient.
        share = jnp.repeat(dfilters / regions, regions, axis=1)
        return jax.vjp(lambda p: filters_of(generate, p, x, (1, 1)), params)[1](share)[0]

    one, many = gradients(1), gradients(8)
    for name in ("shared_mixing_kernel", "shared_mixing_bias", "bank_kernel"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-5)
    own = one["mixing_kernel"] / 8
    np.testing.assert_allclose(many["mixing_kernel"], jnp.repeat(own, 8, 1), rtol=1e-4, atol=1e-5)


def test_sigmoid_is_in_float32_for_bfloat16():
    generate = GENERATORS["experts"]
    params = generate.init(jax.random.key(0), 2, 1, (1, 1), 1, experts=1)
    params["mixing_bias"] = jnp.full((1, 1), -5.0)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    filters = filters_of(generate, params, jnp.zeros((1, 2, 2, 2), jnp.bfloat16), (1, 1))
    weight = jnp.asarray(2 / (1 + np.exp(5.0)), jnp.bfloat16)
    assert filters.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        filters[0, 0, 0, 0], (weight * params["bank_kernel"][0, 0, 0]).astype(jnp.bfloat16)
    )


@dataclasses.dataclass(frozen=True)
class OneFilter:
    """A generator of one's own: all samples and regions have one filter, that of a convolution."""

    linear: tuple[str, ...] = ("kernel",)

    def init(self, key, in_features, features, kernel_size, regions, **how):
        shape = (*kernel_size, in_features, features)
        return {"kernel": how["kernel_init"](key, shape, how["param_dtype"])}

    def mixture(self, params, x, kernel_size, *, precision=None):
        weights = jnp.ones((x.shape[0], 3, *(1,) * len(kernel_size), 1), x.dtype)
        return Mixture(weights, params["kernel"][None, None])

    def guide_kernel_size(self, kernel_size):
        return (1,) * len(kernel_size)

    def multiply_adds(self, params, kernel_size):
        return 0


def test_a_generator_of_ones_own():
    layer = DRConv(6, (3, 3), regions=3, filter_generator=OneFilter())
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    variables = layer.init(jax.random.key(1), x)
    assert variables["params"]["guide"]["kernel"].shape == (1, 1, 4, 3)
    kernel = variables["params"]["filters"]["kernel"]
    plain = nn.Conv(6, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(layer.apply(variables, x), plain, rtol=1e-5, atol=1e-5)
    count = multiply_adds(layer, x.shape).layers
    assert count == {"": 50 * 9 * 24, "filters": 0, "guide": 50 * 12}


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_sample_makes_its_own_filters(self):
        x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
        for generate in GENERATORS.values():
            params = generate.init(jax.random.key(0), 4, 6, (3, 3), 5)
            compute = functools.partial(filters_of, generate, kernel_size=(3, 3))
            filters = self.variant(compute)(params, x)
            alone = [compute(params, x[i : i + 1]) for i in range(2)]
            np.testing.assert_allclose(filters, jnp.concatenate(alone), rtol=1e-5, atol=1e-6)
