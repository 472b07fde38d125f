import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drconv_jax import fast_cpu

DTYPES = {jnp.float32: 2e-6, jnp.bfloat16: 2**-7}
PADDINGS = ("SAME", "VALID", "CIRCULAR", 1, ((2, 0), (0, 1), (-1, 3)))
KINDS = {  # in, features, groups, kernel
    "pointwise": (5, 4, 1, 1),
    "pointwise, many features": (2, 9, 1, 1),
    "depthwise": (5, 5, 5, 3),
    "image": (3, 4, 1, 3),
    "grouped": (4, 6, 2, 2),
}


NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def wide(tree):
    return jax.tree.map(lambda v: v.astype(jnp.float32), tree)


def assert_close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        scale = np.abs(b).max(initial=1e-6)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance * scale)


def value_and_gradients(function, *args):
    y, vjp = jax.vjp(function, *args)
    return y, vjp(normal(9, y.shape).astype(y.dtype))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(list(KINDS)),
    rank=st.integers(1, 3),
    strides=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(PADDINGS),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_it_is_xlas_convolution(kind, rank, strides, dilation, padding, dtype):
    channels, features, groups, kernel = KINDS[kind]
    padding = padding[:rank] if isinstance(padding, tuple) else padding
    fields = dict(kernel_dilation=dilation, feature_group_count=groups, use_bias=False)
    make = functools.partial(nn.Conv, features, (kernel,) * rank, strides, padding, **fields)
    x = normal(0, (2, *range(6, 6 + rank), channels), dtype)
    variables = {"params": {"kernel": normal(1, (*(kernel,) * rank, channels // groups, features))}}
    low = jax.tree.map(lambda v: v.astype(dtype), variables)
    ours = make(conv_general_dilated=fast_cpu.conv_general_dilated)
    got = jax.jit(functools.partial(value_and_gradients, ours.apply))(low, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert_close(got, value_and_gradients(make().apply, *wide((low, x))), DTYPES[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_in_float64(kind):
    channels, features, groups, kernel = KINDS[kind]
    make = functools.partial(nn.Conv, features, (kernel, kernel), feature_group_count=groups)
    shape = (kernel, kernel, channels // groups, features)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 6, 7, channels), jnp.float64)
        w = jax.random.normal(jax.random.key(1), shape, jnp.float64)
        params = {"params": {"kernel": w, "bias": jnp.arange(features, dtype=jnp.float64)}}
        ours = make(conv_general_dilated=fast_cpu.conv_general_dilated)
        got = jax.jit(functools.partial(value_and_gradients, ours.apply))(params, x)
        expected = jax.jit(functools.partial(value_and_gradients, make().apply))(params, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float64")}
        chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-12)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    rank=st.integers(1, 3),
    window=st.integers(1, 3),
    strides=st.integers(1, 3),
    padding=st.sampled_from(["SAME", "VALID", ((1, 1),) * 3, ((0, 2), (1, 0), (2, 2))]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_it_is_xlas_max_pooling_ties_included(rank, window, strides, padding, dtype):
    padding = padding[:rank] if isinstance(padding, tuple) else padding
    arguments = ((window,) * rank, (strides,) * rank, padding)
    x = jnp.round(normal(0, (2, *range(5, 5 + rank), 3), dtype))  # many are equal
    got = jax.jit(lambda x: value_and_gradients(lambda x: fast_cpu.max_pool(x, *arguments), x))(x)
    expected = value_and_gradients(lambda x: nn.max_pool(x, *arguments), x.astype(jnp.float32))
    np.testing.assert_array_equal(got[0].astype(jnp.float32), expected[0])
    # The gradient is a sum of up to window ** rank numbers, rounded in dtype as it is summed up.
    assert_close(got[1], expected[1], 4 * DTYPES[dtype])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("train", [True, False])
@jax.numpy_dtype_promotion("standard")  # Flax's does not run in bfloat16 without
def test_it_is_flaxs_batch_norm(train, dtype, compiled_quickly):
    fields = dict(use_running_average=not train, momentum=0.8, dtype=dtype)
    x = 2 * normal(0, (3, 5, 4, 6)) + 1
    variables = nn.BatchNorm(**fields).init(jax.random.key(0), x)
    ours = fast_cpu.BatchNorm(**fields).init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, ours)
    variables = jax.tree.map(lambda v: v + 0.3 * jnp.cos(jnp.arange(v.size)), variables)

    def run(make, params, x):
        module, stats = make(**fields), variables["batch_stats"]

        def function(params, x):
            return module.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")

        y, vjp, updates = jax.vjp(function, params, x, has_aux=True)
        return y, vjp(normal(9, y.shape).astype(y.dtype)), updates

    got = jax.jit(run, static_argnums=0)(fast_cpu.BatchNorm, variables["params"], x)
    expected = jax.jit(run, static_argnums=0)(nn.BatchNorm, variables["params"], x)
    assert jax.tree.map(lambda v: v.dtype, got) == jax.tree.map(lambda v: v.dtype, expected)
    assert_close(got, wide(expected), 1e-5 if dtype is None else 2**-7)


@pytest.mark.parametrize(
    "fields",
    [dict(axis=1), dict(use_scale=False), dict(use_bias=False), dict(use_fast_variance=False)],
    ids=str,
)
def test_what_is_rarely_used_is_flaxs_batch_norm(fields):
    x = normal(0, (3, 5, 4, 6))
    outcomes = [
        make(use_running_average=False, **fields).init_with_output(jax.random.key(0), x)
        for make in (fast_cpu.BatchNorm, nn.BatchNorm)
    ]
    assert_close(*outcomes, 1e-6)


CASES = {
    "pointwise": (lambda x: convolved(x, (1, 1, 8, 4)), (8, 6, 6, 8)),
    "depthwise": (lambda x: convolved(x, (3, 3, 1, 8), groups=8), (8, 6, 6, 8)),
    "image": (lambda x: convolved(x, (3, 3, 3, 4)), (8, 6, 6, 3)),
    "max pooling": (lambda x: fast_cpu.max_pool(x, (3, 3), (2, 2), "SAME"), (8, 6, 6, 8)),
}


def convolved(x, kernel_shape, groups=1):
    return fast_cpu.conv_general_dilated(
        x,
        normal(1, kernel_shape),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize("function,shape", CASES.values(), ids=CASES)
def test_forward_mode_second_derivatives_and_vmap(function, shape, compiled_quickly):
    x, t = normal(2, shape), normal(3, shape)
    y, dy = jax.jvp(function, (x,), (t,))
    z, vjp = jax.vjp(function, x)
    ct = normal(4, y.shape)
    np.testing.assert_allclose(jnp.vdot(ct, dy), jnp.vdot(*vjp(ct), t), rtol=1e-4)
    np.testing.assert_allclose(y, z, atol=1e-5)
    mapped = jax.vmap(function)(x[:, None])
    np.testing.assert_allclose(mapped[:, 0], y, atol=1e-5)

    def length(x):
        return jnp.sum(function(x) ** 2) / 2

    # All four are linear around x: the second derivative is the first one's gradient of a product.
    _, second = jax.jvp(jax.grad(length), (x,), (t,))
    np.testing.assert_allclose(second, *vjp(dy), atol=1e-3)


@pytest.mark.parametrize("function,shape", CASES.values(), ids=CASES)
def test_a_parted_batch_stays_parted(function, shape, mesh):
    whole = normal(2, shape)
    x = jax.device_put(whole, NamedSharding(mesh, P("data")))
    by_hand = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    for parted in (function, by_hand):
        if parted is function and mesh.axis_types[0].name == "Explicit":
            continue  # there JAX's own convolution and pooling refuse

        def gradient(x, parted=parted):
            return jax.grad(lambda x: jnp.sum(parted(x) ** 2))(x)

        compiled = jax.jit(gradient).lower(x).compile()
        assert not re.search(r"all-(gather|reduce|to-all)|collective", compiled.as_text())
        np.testing.assert_allclose(compiled(x), gradient(whole, function), atol=1e-4)


def operations(function, args, platform):
    """The operations of a program for a platform that compute, with their shapes."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    kinds = (
        "convolution|dot_general|reduce_window|select_and_scatter|reduce|rsqrt|subtract|multiply"
    )
    found = re.findall(rf"stablehlo\.(?:{kinds})\b.*", lowered.as_text())
    return sorted(re.sub(r"%[\w#]+", "%", line) for line in found)


def conv_pair(channels, **fields):
    x = normal(0, (2, 6, 6, channels))
    plain = nn.Conv(use_bias=False, **fields)
    ours = plain.copy(conv_general_dilated=fast_cpu.conv_general_dilated)
    variables = plain.init(jax.random.key(0), x)
    return ours.apply, plain.apply, (variables, x)


def pool_pair():
    window = dict(window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    pools = (functools.partial(pool, **window) for pool in (fast_cpu.max_pool, nn.max_pool))
    return *pools, (normal(0, (2, 6, 6, 4)),)


def norm_pair():
    x = normal(0, (2, 6, 6, 4))
    variables = nn.BatchNorm(False).init(jax.random.key(0), x)

    def of(make):
        return lambda v, x: make(False).apply(v, x, mutable="batch_stats")[0]

    return of(fast_cpu.BatchNorm), of(nn.BatchNorm), (variables, x)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    "pair",
    [
        functools.partial(conv_pair, 8, features=4, kernel_size=(1, 1)),
        functools.partial(conv_pair, 8, features=8, kernel_size=(3, 3), feature_group_count=8),
        functools.partial(conv_pair, 3, features=4, kernel_size=(3, 3), strides=2),
        pool_pair,
        norm_pair,
    ],
    ids=["pointwise", "depthwise", "image", "max pooling", "batch norm"],
)
def test_other_platforms_get_the_plain_operations(pair, platform):
    *functions, args = pair()
    for derivative in (lambda f: f, lambda f: jax.grad(lambda *a: jnp.sum(f(*a) ** 2))):
        ours, plain = (operations(derivative(f), args, platform) for f in functions)
        assert ours == plain
        assert plain


@pytest.mark.parametrize("function,shape", CASES.values(), ids=CASES)
def test_an_exported_program_is_portable(function, shape, compiled_quickly):
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(function(x) ** 2))(x)

    x = normal(2, shape)
    exported = jax.export.export(jax.jit(gradient), platforms=("cpu", "tpu"))(x)
    assert "custom_call" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x), gradient(x), atol=1e-4)


@pytest.mark.parametrize(
    "lhs,rhs,how",
    [
        ((2, 1, 4, 4), (1, 1, 3, 3), {}),  # JAX's own default, channels first
        ((2, 3, 4, 4), (4, 3, 1, 1), {}),
        ((4, 5, 5, 3), (1, 1, 3, 4), {"dimension_numbers": NHWC, "batch_group_count": 2}),
        ((5, 5, 3, 2), (1, 1, 3, 4), {"dimension_numbers": ("HWCN", "HWIO", "HWCN")}),
    ],
)
def test_other_layouts_are_xlas(no_shape_checks, lhs, rhs, how):
    x, kernel = normal(0, lhs), normal(1, rhs)
    ours, plain = (
        convolve(x, kernel, (1, 1), "SAME", **how)
        for convolve in (fast_cpu.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(
    "x,kernel,groups,how",
    [
        ((2, 5, 5, 1), (3, 3, 1, 4), 4, {}),
        ((2, 5, 5, 8), (3, 3, 1, 4), 4, {}),
        ((2, 5, 5, 4), (1, 1, 4, 4), 1, {"rhs_dilation": (0, 1)}),
        ((2, 5, 5, 4), (1, 1, 4, 4), 1, {"padding": [(1, 1)] * 3}),
    ],
)
def test_what_jax_refuses_is_refused(no_shape_checks, x, kernel, groups, how):
    how = {
        "window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC,
        "feature_group_count": groups, **how,
    }  # fmt: skip
    for convolve in (jax.lax.conv_general_dilated, fast_cpu.conv_general_dilated):
        with pytest.raises((ValueError, TypeError)):
            convolve(normal(0, x), normal(1, kernel), **how)


def test_operands_of_two_dtypes_are_refused(no_shape_checks):
    x, kernel = normal(0, (2, 5, 5, 4), jnp.bfloat16), normal(1, (1, 1, 4, 4))
    with pytest.raises(TypeError, match="dtype"):
        fast_cpu.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def test_nan_in_max_pooling():
    x = normal(0, (3, 17, 4))
    x = jnp.where(normal(1, x.shape) > 0.9, jnp.nan, x)
    window = dict(window_shape=(4,), strides=(3,), padding=((3, 2),))
    ours, plain = (
        value_and_gradients(functools.partial(pool, **window), x)
        for pool in (fast_cpu.max_pool, nn.max_pool)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_a_mean_of_many_deviations_is_exact_in_batch_norm():
    x = 0.01 * normal(0, (16, 4, 4, 2)) + 1000
    norm = fast_cpu.BatchNorm(use_running_average=True)
    variables = norm.init(jax.random.key(0), x)
    stats = {"mean": jnp.full(2, 1000.0), "var": jnp.full(2, 1e-4)}
    y = norm.apply({**variables, "batch_stats": stats}, x)
    expected = (np.asarray(x, np.float64) - 1000) / np.sqrt(1e-4 + norm.epsilon)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
