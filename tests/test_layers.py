import pickle
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding, PartitionSpec

import drconv_jax
from drconv_jax import DRConv
from drconv_jax.models import ShuffleNetV2

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 9, 9, 4))


def same_as_linen(variables, layer):
    params = variables["params"]
    for group in ("guide", "filters"):
        if group in params:
            for name, value in params[group].items():
                getattr(layer, group)[name][...] = value
    if "bias" in params:
        layer.bias[...] = params["bias"]


@pytest.mark.parametrize("generator", ["pooled", "mixture"])
@pytest.mark.parametrize("guide_kernel", [None, 5])
@pytest.mark.parametrize(
    "window",
    [
        {},
        dict(strides=2),
        dict(padding="VALID", kernel_dilation=2),
        dict(padding="CIRCULAR"),
        dict(padding=((0, 1), (2, 0)), input_dilation=2),
        dict(kernel_size=(2, 3), use_bias=False),
    ],
)
def test_linen_and_nnx_are_equal_and_shaped_as_a_convolution(generator, guide_kernel, window):
    own = dict(filter_generator=generator, regions=3)
    if guide_kernel is not None:
        own["guide_kernel_size"] = (guide_kernel, guide_kernel)
    linen = DRConv(6, **window, **own)
    variables = linen.init(KEY, X)
    layer = drconv_jax.nnx.DRConv(4, 6, **window, **own, rngs=nnx.Rngs(0))
    same_as_linen(variables, layer)
    y = linen.apply(variables, X)
    np.testing.assert_array_equal(layer(X), y)
    plain = nn.Conv(6, **{"kernel_size": (3, 3), **window})
    assert y.shape == jax.eval_shape(plain.init_with_output, KEY, X)[0].shape


def test_a_given_guide_needs_no_guide_convolution_and_is_resized():
    guide = jax.random.normal(KEY, (2, 4, 4, 8))
    layer = DRConv(6)
    variables = layer.init(KEY, X, guide=guide)
    assert "guide" not in variables["params"]
    y = layer.apply(variables, X, guide=guide)
    source = np.arange(9) * 4 // 9
    expected = layer.apply(variables, X, guide=guide[:, source][:, :, source])
    np.testing.assert_array_equal(y, expected)


def test_region_index_is_sown():
    layer = DRConv(6, regions=5)
    variables = {"params": layer.init(KEY, X)["params"]}
    _, state = layer.apply(variables, X, mutable="intermediates")
    (index,) = state["intermediates"]["region_index"]
    assert index.shape == (2, 9, 9) and index.dtype == jnp.int32
    assert len(np.unique(index)) > 1 and index.min() >= 0 and index.max() < 5


def test_nnx_captures_the_region_index():
    layer = drconv_jax.nnx.DRConv(4, 6, regions=5, rngs=nnx.Rngs(0))
    y, captured = nnx.capture(layer, nnx.Intermediate)(X)
    np.testing.assert_array_equal(y, layer(X))
    (index,) = jax.tree.leaves(captured)
    guide = jax.lax.conv_general_dilated(
        X, layer.guide["kernel"][...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_array_equal(index, guide.argmax(-1))


def test_unbatched_and_many_batch_axes():
    layer = DRConv(6)
    variables = layer.init(KEY, X)
    y = layer.apply(variables, X)
    np.testing.assert_allclose(layer.apply(variables, X[0]), y[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.apply(variables, X[None])[0], y, rtol=1e-5, atol=1e-6)


def test_bfloat16():
    layer = DRConv(6, dtype=jnp.bfloat16)
    variables = layer.init(KEY, X)
    y = jax.jit(layer.apply)(variables, X)
    assert y.dtype == jnp.bfloat16 and variables["params"]["bias"].dtype == jnp.float32
    gradients = jax.grad(lambda v: layer.apply(v, X).astype(jnp.float32).sum())(variables)
    chex.assert_trees_all_equal_dtypes(gradients, variables)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(regions=0), "regions must be at least 1, got 0"),
        (dict(features=0), "features must be at least 1, got 0"),
        (dict(filter_generator="mean"), "mixture, pooled, experts, got 'mean'"),
        (dict(feature_group_count=4), "feature_group_count must divide features=6, got 4"),
        (dict(feature_group_count=3), "feature_group_count=3, got 4"),
        (dict(implementation="fast"), "got 'fast'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        DRConv(**{"features": 6, **fields}).init(KEY, X)


def test_bad_calls():
    layer = DRConv(6)
    with pytest.raises(ValueError, match="regions=8, got"):
        layer.init(KEY, X, guide=jnp.zeros((2, 9, 9, 7)))
    with pytest.raises(ValueError, match="2 spatial dimensions"):
        layer.init(KEY, X[0, 0])
    given = drconv_jax.nnx.DRConv(4, 6, own_guide=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="own_guide=False"):
        given(X)


def test_bad_width():
    with pytest.raises(ValueError, match="width must be positive, got 0.0"):
        ShuffleNetV2(width=0.0).init(KEY, jnp.zeros((1, 32, 32, 3)))


def test_a_third_position_is_strides_as_in_nn_conv():
    x = jnp.ones((1, 6, 6, 4))
    y = DRConv(5, (3, 3), 2).init_with_output(jax.random.key(0), x)[0]
    assert y.shape == nn.Conv(5, (3, 3), 2).init_with_output(jax.random.key(0), x)[0].shape


def test_counts_and_guides_of_another_type(no_shape_checks):
    x = jnp.ones((1, 6, 6, 4))
    with pytest.raises(TypeError, match=r"regions must be an integer, got 2\.5"):
        DRConv(5, regions=2.5).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="guide must be floating point, got int32"):
        DRConv(5).init(jax.random.key(0), x, guide=jnp.zeros((1, 6, 6, 8), jnp.int32))


GENERATORS = pytest.mark.parametrize("generator", ["pooled", "mixture"])


def layer_and_gradient(generator):
    """Variables, and a function of (variables, x) that gives the output and all gradients."""
    layer = DRConv(6, regions=3, filter_generator=generator)

    def run(variables, x):
        loss = lambda variables, x: (layer.apply(variables, x) ** 2).mean()  # noqa: E731
        return layer.apply(variables, x), jax.grad(loss, (0, 1))(variables, x)

    return layer, layer.init(KEY, X), run


@GENERATORS
def test_vmap_over_layers(generator):
    layer, variables, run = layer_and_gradient(generator)
    other = layer.init(jax.random.key(2), X)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), variables, other)
    together = jax.jit(jax.vmap(run, (0, None)))(stacked, X)
    for i, alone in enumerate((run(variables, X), run(other, X))):
        ours = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        chex.assert_trees_all_close(ours, alone, rtol=1e-4, atol=1e-5)


@GENERATORS
def test_remat_of_the_layer(generator):
    layer, variables, _ = layer_and_gradient(generator)
    remat = nn.remat(DRConv)(6, regions=3, filter_generator=generator)

    def gradient(layer):
        return jax.jit(jax.grad(lambda v: jnp.sin(layer.apply(v, X)).sum()))(variables)

    chex.assert_trees_all_close(gradient(remat), gradient(layer), rtol=1e-5, atol=1e-5)


@GENERATORS
def test_export_of_the_layer_for_all_platforms_and_any_batch_size(generator):
    layer, variables, _ = layer_and_gradient(generator)
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, *X.shape[1:]), X.dtype)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), variables)
    exported = jax.export.export(jax.jit(layer.apply), platforms=["cpu", "tpu", "cuda"])(shapes, x)
    loaded = jax.export.deserialize(exported.serialize())
    for count in (1, 2):
        expected = layer.apply(variables, X[:count])
        np.testing.assert_allclose(loaded.call(variables, X[:count]), expected, 1e-4, 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        dict(filter_generator="pooled"),
        dict(strides=2, guide_kernel_size=1),
        dict(padding="VALID", kernel_dilation=2),
        dict(implementation="blocked"),
    ],
)
def test_export_for_any_height_and_width(fields):
    layer = DRConv(6, regions=3, **fields)
    variables = layer.init(KEY, X)
    sizes = jax.export.symbolic_shape("b, h, w")
    x = jax.ShapeDtypeStruct((*sizes, 4), X.dtype)
    exported = jax.export.export(jax.jit(layer.apply), platforms=["cpu", "tpu", "cuda"])(
        variables, x
    )
    for shape in ((1, 7, 8, 4), (2, 12, 5, 4)):
        x = jax.random.normal(KEY, shape)
        expected = layer.apply(variables, x)
        np.testing.assert_allclose(exported.call(variables, x), expected, 1e-4, 1e-5)


LOAD = """
import pickle, sys, jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
import drconv_jax
from jax.experimental import serialize_executable
serialize_executable.deserialize_and_load(*pickle.load(open(sys.argv[1], "rb")))
"""


@GENERATORS
def test_another_process_finds_and_loads_a_program_for_several_devices(generator, mesh, tmp_path):
    _, variables, run = layer_and_gradient(generator)
    by_batch, everywhere = (NamedSharding(mesh, PartitionSpec(*p)) for p in (("data",), ()))
    x = jnp.tile(X, (8, 1, 1, 1))
    lowered = jax.jit(run).lower(jax.device_put(variables, everywhere), jax.device_put(x, by_batch))
    # What JAX parts by a callback has a pointer in it, which another process never has.
    assert "CustomSPMDPartitioning" not in lowered.as_text()
    if generator == "mixture":
        path = tmp_path / "executable"
        path.write_bytes(pickle.dumps(serialize_executable.serialize(lowered.compile())))
        subprocess.run([sys.executable, "-c", LOAD, path], check=True)


@GENERATORS
def test_second_derivatives_of_the_layer(generator):
    layer, variables, _ = layer_and_gradient(generator)
    # The same layer as products and a select, which JAX differentiates by itself.
    plain = layer.clone(implementation="select")
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), variables)

    def curvature(layer):
        gradient = jax.grad(lambda v: jnp.sin(layer.apply(v, X)).sum())
        slope = lambda v: optax.tree.vdot(gradient(v), direction)  # noqa: E731
        return jax.jvp(gradient, (variables,), (direction,))[1], jax.grad(slope)(variables)

    ours, expected = jax.jit(lambda: curvature(layer))(), jax.jit(lambda: curvature(plain))()
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5 * scale)


@GENERATORS
def test_a_mesh_reduces_the_parameters_gradients_and_nothing_else(generator, mesh):
    _, variables, run = layer_and_gradient(generator)
    by_batch, everywhere = (NamedSharding(mesh, PartitionSpec(*p)) for p in (("data",), ()))
    x = jnp.tile(X, (8, 1, 1, 1))
    placed = jax.device_put(variables, everywhere), jax.device_put(x, by_batch)
    compiled = jax.jit(run, out_shardings=(by_batch, (everywhere, by_batch))).lower(*placed)
    compiled = compiled.compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text
    chex.assert_trees_all_close(compiled(*placed), run(variables, x), rtol=1e-4, atol=1e-5)


def test_an_nnx_layer_of_a_sharded_batch_gives_one(mesh):
    layer = drconv_jax.nnx.DRConv(4, 6, regions=3, rngs=nnx.Rngs(0))
    x = jnp.tile(X, (4, 1, 1, 1))
    by_batch = NamedSharding(mesh, PartitionSpec("data"))
    y = nnx.jit(lambda layer, x: layer(x))(layer, jax.device_put(x, by_batch))
    assert y.sharding.is_equivalent_to(by_batch, y.ndim)
    np.testing.assert_allclose(y, layer(x), rtol=1e-5, atol=1e-5)


def test_vmap_over_an_axis_that_a_mesh_parts(mesh):
    layer, variables, _ = layer_and_gradient("mixture")
    x = jnp.stack([X * i for i in range(8)])
    parted = NamedSharding(mesh, PartitionSpec("data"))
    variables, ours = (
        jax.device_put(tree, NamedSharding(mesh, spec))
        for tree, spec in ((variables, PartitionSpec()), (x, parted.spec))
    )

    def gradients(variables, x):
        return jax.grad(lambda v: jnp.sin(layer.apply(v, x)).sum())(variables)

    mapped = jax.jit(jax.vmap(gradients, (None, 0)))(variables, ours)
    alone = [gradients(jax.device_get(variables), one) for one in x]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    chex.assert_trees_all_close(mapped, expected, rtol=1e-4, atol=1e-4)
