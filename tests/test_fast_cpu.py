import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from drconv_jax import depthwise


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rank=st.integers(1, 3),
    kernel=st.integers(1, 3),
    strides=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["SAME", "VALID", "CIRCULAR", 1]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_it_is_xlas_depthwise_convolution(rank, kernel, strides, dilation, padding, dtype):
    channels = 5
    layer = functools.partial(
        nn.Conv,
        channels,
        (kernel,) * rank,
        strides,
        padding,
        kernel_dilation=dilation,
        feature_group_count=channels,
        use_bias=False,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *range(6, 6 + rank), channels)).astype(dtype)
    variables = layer().init(keys[1], x.astype(jnp.float32))
    low = jax.tree.map(lambda v: v.astype(dtype), variables)

    def run(conv, variables, x):
        y, vjp = jax.vjp(lambda v, x: conv.apply(v, x), variables, x)
        return y, vjp(jax.random.normal(keys[2], y.shape).astype(dtype).astype(y.dtype))

    ours = layer(conv_general_dilated=depthwise.conv_general_dilated)
    got = jax.jit(functools.partial(run, ours))(low, x)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (low, x))
    expected = jax.jit(functools.partial(run, layer()))(*wide)
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        scale = np.abs(b).max(initial=1e-6)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("groups,features,convolutions", [(4, 4, 0), (2, 4, 1), (4, 8, 1)])
def test_on_a_cpu_only_a_depthwise_convolution_is_rewritten(groups, features, convolutions):
    layer = nn.Conv(
        features,
        (3, 3),
        feature_group_count=groups,
        conv_general_dilated=depthwise.conv_general_dilated,
    )
    x = jnp.ones((1, 6, 6, 4))
    variables = layer.init(jax.random.key(0), x)
    for platform, expected in (("cpu", convolutions), ("tpu", 1), ("cuda", 1)):
        lowered = jax.jit(layer.apply).trace(variables, x).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("stablehlo.convolution") == expected


@pytest.mark.parametrize("fields", [dict(), dict(preferred_element_type=jnp.float32)])
def test_other_dtypes_are_xlas(fields):
    dtype = jnp.bfloat16 if fields else jnp.complex64
    shapes = ((2, 5, 5, 4), (3, 3, 1, 4))
    parts = [jax.random.normal(jax.random.key(i), s) for i in range(2) for s in shapes]
    if fields:
        x, kernel = (a.astype(dtype) for a in parts[:2])
    else:
        x, kernel = (jax.lax.complex(a, b) for a, b in zip(parts[:2], parts[2:], strict=True))
    arguments = dict(
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
        **fields,
    )
    expected = jax.lax.conv_general_dilated(x, kernel, **arguments)
    y = depthwise.conv_general_dilated(x, kernel, **arguments)
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)
