import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from drconv_jax import DRConv, fast_cpu, region_conv
from drconv_jax.geometry import pad_in_reach

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 7, 6, 4))
SIDES = st.integers(-9, 9)


def padded(x, pairs):
    """Zeros before and after every spatial axis; of negative lengths, positions cut off."""
    x = np.asarray(x)
    for axis, (low, high) in enumerate(pairs, start=1):
        length = max(x.shape[axis] + low + high, 0)
        shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
        result = np.zeros(shape, x.dtype)
        for old in range(x.shape[axis]):
            if 0 <= old + low < length:
                at = (slice(None),) * axis
                result[(*at, old + low)] = x[(*at, old)]
        x = result
    return x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pairs=st.tuples(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES)))
def test_what_padding_is_left_to_a_convolution(pairs):
    x, left = pad_in_reach(X, pairs, (3, 2))
    assert all(0 <= side < e for pair, e in zip(left, (3, 2), strict=True) for side in pair)
    np.testing.assert_array_equal(jnp.pad(x, ((0, 0), *left, (0, 0))), padded(X, pairs))


PADDINGS = [
    ((1, 1), (0, 2)),
    ((2, 0), (2, 0)),
    ((0, 2), (0, 2)),
    ((-1, 3), (3, -1)),
    ((-2, 2), (-1, -1)),
    ((5, -3), (1, 1)),
]


def plain(**fields):
    return nn.Conv(4, (2, 2), conv_general_dilated=fast_cpu.conv_general_dilated, **fields)


@pytest.mark.parametrize(
    "layer,shape",
    [
        (DRConv(6, (3, 3), padding=((1, 1), (0, 2)), guide_kernel_size=1), (7, 6, 4)),
        (DRConv(6, (3, 3), 2, padding=((-1, 3), (3, -1)), guide_kernel_size=1), (7, 6, 4)),
        (DRConv(6, (3, 3), 2, padding=((5, -3), (-2, 2)), guide_kernel_size=1), (7, 6, 4)),
        # The gradient's padding is negative where this is larger than the window less one.
        (DRConv(6, (2, 2), padding=((3, 0), (3, 0))), (7, 6, 4)),
        (DRConv(6, 3, padding=((4, 0),)), (9, 4)),
        (DRConv(6, 2, padding=((3, 0),), guide_kernel_size=1, implementation="reference"), (9, 4)),
        (plain(padding=((3, 0), (3, 0))), (7, 6, 4)),
        (plain(padding=((-1, 2), (3, -1)), strides=2), (7, 6, 4)),
    ],
)
def test_samples_do_not_see_each_other(layer, shape):
    x = jax.random.normal(KEY, (3, *shape))
    variables = layer.init(KEY, x)

    def run(x):
        y, pull = jax.vjp(lambda x: layer.apply(variables, x), x)
        return y, *pull(jnp.cos(jnp.arange(y[0].size, dtype=y.dtype)).reshape(y[:1].shape) + 0 * y)

    together = jax.jit(run)(x)
    alone = [jax.jit(run)(x[i : i + 1]) for i in range(3)]
    for whole, *parts in zip(together, *alone, strict=True):
        np.testing.assert_allclose(whole, jnp.concatenate(parts), rtol=0, atol=2e-5)


def windows(x, kernel, strides, pairs):
    """What a 1x1 guide of a kernel reads: the middle of the kernel's window."""
    x = padded(x, pairs)
    for axis, size in enumerate(kernel, start=1):
        middle = (size - 1) // 2
        x = np.take(x, range(middle, x.shape[axis] - (size - 1 - middle), strides), axis)
    return x


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("strides", [1, 2])
def test_a_small_guide_reads_the_middle_of_the_windows(padding, strides):
    layer = DRConv(6, (3, 3), strides, padding=padding, regions=4, guide_kernel_size=1)
    params = layer.init(KEY, X)["params"]
    kernel, bias = params["guide"]["kernel"][0, 0], params["guide"]["bias"]
    # The reading is linear, so its matrix says all of it, forward and backward.
    basis = np.eye(X[0].size, dtype=np.float32).reshape(-1, *X.shape[1:])
    matrix = windows(basis, (3, 3), strides, padding)

    def with_guide_by_hand(x):
        read = jnp.einsum("bp,phwc->bhwc", x.reshape(x.shape[0], -1), matrix)
        guide = jnp.einsum("bhwc,cm->bhwm", read, kernel) + bias[None, None, None]
        variables = {"params": {k: v for k, v in params.items() if k != "guide"}}
        return layer.apply(variables, x, guide)

    y, pull = jax.vjp(lambda x: layer.apply({"params": params}, x), X)
    expected, expected_pull = jax.vjp(with_guide_by_hand, X)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
    dy = jax.random.normal(jax.random.key(1), y.shape)
    (dx,), (expected_dx,) = pull(dy), expected_pull(dy)
    np.testing.assert_allclose(dx, expected_dx, rtol=0, atol=2e-5)


def test_a_causal_layer_of_a_small_guide_reads_no_future():
    layer = DRConv(6, 3, padding=((2, 0),), guide_kernel_size=1, filter_generator="experts")
    x, dy = jax.random.normal(KEY, (2, 9, 4)), jnp.zeros((2, 9, 6)).at[:, 3].set(1.0)
    variables = layer.init(KEY, x)
    # Filters know all of x by its mean; a change that leaves the mean alone moves no output.
    later = x.at[:, 5].add(1.0).at[:, 6].add(-1.0)
    np.testing.assert_allclose(
        layer.apply(variables, later)[:, :5], layer.apply(variables, x)[:, :5], rtol=0, atol=2e-6
    )
    (dx,) = jax.vjp(lambda x: layer.apply(variables, x), x)[1](dy)
    np.testing.assert_allclose(dx[:, 5:], dx[:, 4:5].repeat(4, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "select", "blocked", None])
@pytest.mark.parametrize("padding", [((1, -1), (-2, 3)), ((3, 1), (-4, -1))])
def test_gradients_under_negative_padding_by_finite_differences(
    implementation, padding, no_shape_checks
):
    filters = jax.random.normal(KEY, (3, 2, 2, 2, 4, 5))
    out = padded(X, padding).shape[1:3]
    guide = jax.random.normal(KEY, (3, out[0] - 1, out[1] - 1, 2))
    with jax.enable_x64(True):
        x, filters, guide = (jnp.asarray(a, jnp.float64) for a in (X, filters, guide))
        function = lambda x, w: region_conv(  # noqa: E731
            jnp.asarray(x), jnp.asarray(w), guide, padding=padding, implementation=implementation
        )
        check_grads(function, (x, filters), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [((-1, 3), (3, -1)), ((2, -2), (-2, 2))])
def test_a_convolution_for_flax_under_negative_padding(groups, dilation, padding):
    layer = nn.Conv(
        8 if groups == 1 else 4,
        (2, 2),
        2,
        padding=padding,
        input_dilation=dilation,
        feature_group_count=groups,
        conv_general_dilated=fast_cpu.conv_general_dilated,
    )
    interior = [(0, 0, 0), *[(0, 0, dilation - 1)] * 2, (0, 0, 0)]
    larger = padded(jax.lax.pad(X, 0.0, interior), padding)
    plain = layer.clone(padding="VALID", input_dilation=1, conv_general_dilated=None)
    variables = layer.init(KEY, X)
    y, pull = jax.vjp(lambda x: layer.apply(variables, x), X)
    np.testing.assert_allclose(y, plain.apply(variables, larger), rtol=0, atol=1e-6)
    dy = jax.random.normal(KEY, y.shape)
    (dx,) = pull(dy)
    by_definition = jax.vjp(lambda x: plain.apply(variables, x), jnp.asarray(larger))[1](dy)[0]
    # The adjoint of padding: where positions of x went, their gradient is.
    place = padded(
        jax.lax.pad(jnp.arange(1.0, X[0].size + 1).reshape(1, *X.shape[1:]), 0.0, interior), padding
    )[0].astype(int)
    expected = np.zeros((3, X[0].size + 1), np.float32)
    for b in range(3):
        np.add.at(expected[b], place.ravel(), np.asarray(by_definition)[b].ravel())
    np.testing.assert_allclose(dx, expected[:, 1:].reshape(X.shape), rtol=0, atol=1e-5)
