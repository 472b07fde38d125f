import contextlib
import copy
import dataclasses
import functools
import inspect
import pickle
import re
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
        (
            dict(filter_generator="mean"),
            "mixture, pooled, experts, or a FilterGenerator, got 'mean'",
        ),
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


# Of flax's arguments, those that are of another kind here; everything else has flax's defaults.
OWN_DEFAULTS = {"kernel_size", "kernel_init", "bias_init", "name", "parent"}


def test_fields_stand_where_those_of_nn_conv_do():
    ours, flaxs = (
        {f.name: f for f in dataclasses.fields(cls) if f.name not in ("name", "parent")}
        for cls in (DRConv, nn.Conv)
    )
    new = set(flaxs) - set(ours)
    assert not new, f"the installed flax's nn.Conv has the new fields {new}: give them to DRConv"
    assert list(ours)[: len(flaxs)] == list(flaxs)
    for name in set(flaxs) - OWN_DEFAULTS:
        assert ours[name].default == flaxs[name].default, name
    assert first_argument(DRConv) == first_argument(nn.Conv)


def test_arguments_stand_where_those_of_nnx_conv_do():
    ours, flaxs = (
        dict(inspect.signature(cls).parameters) for cls in (drconv_jax.nnx.DRConv, nnx.Conv)
    )
    new = set(flaxs) - set(ours)
    assert not new, (
        f"the installed flax's nnx.Conv has the new arguments {new}: give them to DRConv"
    )
    assert [name for name in ours if name in flaxs] == list(flaxs)
    for name, argument in flaxs.items():
        assert ours[name].kind == argument.kind, name
        if name not in OWN_DEFAULTS:
            assert ours[name].default == argument.default, name
    assert first_argument(drconv_jax.nnx.DRConv) == first_argument(nnx.Conv)
    calls = [
        set(inspect.signature(c.__call__).parameters) for c in (nnx.Conv, drconv_jax.nnx.DRConv)
    ]
    assert calls[0] <= calls[1], f"the installed flax's nnx.Conv is called with {calls[0]}"


def first_argument(cls):
    return list(inspect.signature(cls.__call__).parameters)[1]


def test_positions_as_in_flax():
    args = (16, (3, 3), 2, "SAME", 1, 1, 1, True, None, jnp.bfloat16, jnp.float32)
    (y, variables), (plain, _) = (cls(*args).init_with_output(KEY, X) for cls in (DRConv, nn.Conv))
    assert (y.shape, y.dtype) == (plain.shape, plain.dtype)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    layers = [cls(4, 8, (3, 3), 2, rngs=nnx.Rngs(0)) for cls in (drconv_jax.nnx.DRConv, nnx.Conv)]
    assert layers[0](X).shape == layers[1](X).shape


@pytest.mark.parametrize(
    "module,name,value",
    [
        ("linen", "mask", jnp.ones((3, 3, 4, 6))),
        ("linen", "conv_general_dilated", jax.lax.conv),
        ("linen", "conv_general_dilated_cls", object),
        ("nnx", "mask", jnp.ones((3, 3, 4, 6))),
        ("nnx", "conv_general_dilated", jax.lax.conv),
        ("nnx", "preferred_element_type", jnp.float32),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(module, name, value):
    with pytest.raises(ValueError, match=f"{name} must be left out of a DRConv: .*"):
        if module == "linen":
            DRConv(6, **{name: value}).init(KEY, X)
        else:
            drconv_jax.nnx.DRConv(4, 6, **{name: value}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "shape,arguments",
    [
        ((2, 9, 8, 4), dict(padding="same")),
        ((2, 9, 8, 4), dict(padding="SAME_LOWER", strides=2)),
        ((2, 9, 8, 4), dict(padding="same_lower", kernel_size=(2, 4))),
        ((2, 9, 8, 4), dict(padding="Valid", strides=np.int64(2))),
        ((2, 9, 8, 4), dict(padding=[1, (0, 2)], kernel_size=[3, 3], strides=[2, 1])),
        ((2, 9, 4), dict(kernel_size=np.int64(3))),
        ((2, 9, 4), dict(kernel_size=2, padding="CAUSAL", kernel_dilation=2)),
        ((2, 3, 9, 4), dict(padding="VALID", kernel_size=(5, 5))),
        ((2, 0, 9, 4), {}),
        ((2, 0, 9, 4), dict(padding=2)),
        ((0, 5, 9, 4), {}),
    ],
)
def test_values_are_those_of_nn_conv_with_the_filter_that_all_regions_share(
    shape, arguments, no_shape_checks
):
    fields = {"kernel_size": (3, 3), **arguments}
    ones = jnp.ones((1, *(9 for _ in shape[1:-1]), 4))
    layer = DRConv(6, **fields, regions=3, bias_init=nn.initializers.normal())
    params = layer.init(KEY, ones)["params"]
    bank = params["filters"]["bank_kernel"]
    params["filters"] = {**jax.tree.map(jnp.zeros_like, params["filters"]), "bank_kernel": bank}
    x = jax.random.randint(jax.random.key(2), shape, -9, 9)  # flax promotes integers
    # flax takes neither numpy's integers nor JAX's names of paddings in small letters everywhere.
    plain = {k: v.item() if isinstance(v, np.integer) else v for k, v in fields.items()}
    kernel = {"kernel": bank.sum(0) / 8**0.5, "bias": params["bias"]}
    with jax.numpy_dtype_promotion("standard"):
        expected = nn.Conv(6, **plain).apply({"params": kernel}, x)
        y = layer.apply({"params": params}, x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["circular", "reflect", "same_lower"])
def test_names_of_paddings_in_small_letters(padding):
    small, capital = (DRConv(6, padding=name, regions=3) for name in (padding, padding.upper()))
    variables = small.init(KEY, X)
    np.testing.assert_array_equal(small.apply(variables, X), capital.apply(variables, X))


def test_same_lower_is_same_mirrored():
    """With a kernel of even size, whose window has no middle, and a smaller one for the guide."""
    lower, upper = (
        DRConv(6, (4, 2), padding=padding, regions=3, guide_kernel_size=1)
        for padding in ("SAME_LOWER", "SAME")
    )
    params = lower.init(KEY, X)["params"]
    params["filters"]["mixing_bias"] = jnp.eye(3, 8)  # regions differ
    bank = params["filters"]["bank_kernel"]
    mirrored = {**params, "filters": {**params["filters"], "bank_kernel": bank[:, ::-1, ::-1]}}
    expected = upper.apply({"params": mirrored}, X[:, ::-1, ::-1])[:, ::-1, ::-1]
    np.testing.assert_allclose(lower.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields,dtype,message",
    [
        ({}, jnp.complex64, "the input must be real, got complex64: give its real"),
        (dict(param_dtype=jnp.complex64), jnp.float32, "param_dtype must be .* got complex64"),
        (dict(param_dtype=jnp.int32), jnp.float32, "param_dtype must be .* got int32"),
        (dict(dtype="complex64"), jnp.float32, "dtype must be a floating-point .* got complex64"),
        (dict(kernel_size=True), jnp.float32, "kernel_size must be an integer .* got True"),
        (dict(strides=(1, True)), jnp.float32, "strides must be an integer .* got .1, True."),
        (dict(padding=True), jnp.float32, "padding must be made of integers .* got True"),
    ],
)
def test_types_that_have_no_meaning(fields, dtype, message, no_shape_checks):
    with pytest.raises(TypeError, match=message):
        DRConv(6, **fields).init(KEY, jnp.ones((2, 9, 9, 4), dtype))


@pytest.mark.parametrize("kernel_size", [(3, 3, 3, 3), (), None])
def test_ranks_that_are_not_supported(kernel_size, no_shape_checks):
    message = "kernel_size must have 1, 2 or 3 entries.* got"
    with pytest.raises(ValueError, match=message):
        DRConv(6, kernel_size).init(KEY, jnp.ones((1, 4, 4, 4, 4, 2)))
    with pytest.raises(ValueError, match=message):
        drconv_jax.nnx.DRConv(2, 6, kernel_size, rngs=nnx.Rngs(0))


NAMES = {  # of the axes of filters' parameters, where a kernel's are (None, "taps", "in", "out")
    "mixture": {"bank_kernel": (None, None, "taps", "in", "out")},
    "experts": {"bank_kernel": (None, None, "taps", "in", "out")},
    "pooled": {"bank_kernel": (None, None, "in", "out"), "bank_bias": (None, "in", "out")},
}


@pytest.mark.parametrize("generator", NAMES)
@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_names_of_a_kernels_axes_are_those_of_the_banks(generator, box):
    inits = {"kernel_init": nn.initializers.lecun_normal(), "bias_init": nn.initializers.normal()}
    plain = DRConv(6, filter_generator=generator, **inits)
    boxed = DRConv(
        6,
        filter_generator=generator,
        kernel_init=box(inits["kernel_init"], (None, "taps", "in", "out")),
        bias_init=box(inits["bias_init"], ("out",)),
    )
    variables = boxed.init(KEY, X)
    specs = nn.get_partition_spec(variables)["params"]
    named = {name: tuple(spec) for name, spec in specs["filters"].items() if tuple(spec)}
    assert named == NAMES[generator] and tuple(specs["bias"]) == ("out",)
    expected = plain.init(KEY, X)
    chex.assert_trees_all_equal(nn.unbox(variables), expected)
    y = boxed.apply(variables, X)
    np.testing.assert_array_equal(y, plain.apply(expected, X))

    stack = nn.vmap(
        DRConv,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(
        **{
            f.name: getattr(boxed, f.name)
            for f in dataclasses.fields(boxed)
            if f.init and f.name not in ("parent", "name")
        }
    )
    stacked = jax.eval_shape(stack.init, KEY, X[None])
    specs = nn.get_partition_spec(stacked)["params"]["filters"]
    named = {name: tuple(spec) for name, spec in specs.items() if tuple(spec)}
    assert named == {name: ("layers", *names) for name, names in NAMES[generator].items()}


def test_fewer_names_than_a_kernel_has_axes():
    for generator, expected in (("mixture", (None, "x")), ("pooled", (None, None))):
        kernel_init = nn.with_partitioning(nn.initializers.ones, ("x",))
        variables = DRConv(6, filter_generator=generator, kernel_init=kernel_init).init(KEY, X)
        spec = tuple(nn.get_partition_spec(variables)["params"]["filters"]["bank_kernel"])
        assert spec == expected


@pytest.mark.parametrize(
    "generator,way",
    [*((generator, "init") for generator in NAMES), ("mixture", "metadata"), ("mixture", "mesh")],
)
def test_nnx_names_of_a_kernels_axes_are_those_of_the_banks(generator, way):
    mesh = jax.make_mesh((2, 2, 2), ("taps", "in", "out"), axis_types=(AxisType.Auto,) * 3)
    names, bias = (None, None, "in", "out"), ("out",)
    if way == "init":
        kernel = {"kernel_init": nnx.with_partitioning(nnx.initializers.lecun_normal(), names)}
    elif way == "metadata":
        kernel = {"kernel_metadata": {"out_sharding": names, "decay": False}}
    else:  # shardings that name the mesh themselves
        names, bias = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (names, bias))
        kernel = {"kernel_metadata": {"out_sharding": names}}
    kernel["bias_metadata"] = {"out_sharding": bias}
    with contextlib.nullcontext() if way == "mesh" else jax.set_mesh(mesh):
        layer = drconv_jax.nnx.DRConv(4, 6, filter_generator=generator, **kernel, rngs=nnx.Rngs(0))
    for name, expected in NAMES[generator].items():
        spec = PartitionSpec(*(axis if axis != "taps" else None for axis in expected))
        variable = layer.filters[name]
        assert variable[...].sharding.spec == spec
        assert (way == "metadata") == ("decay" in variable.get_metadata())
        if way != "mesh":  # of which flax itself makes no partition spec
            specs = nnx.get_partition_spec(nnx.state(layer))
            assert specs["filters"][name].get_value() == spec
    assert layer.bias[...].sharding.spec == PartitionSpec("out")
    plain = drconv_jax.nnx.DRConv(4, 6, filter_generator=generator, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(layer)), nnx.to_pure_dict(nnx.state(plain))
    )


def test_the_sharding_of_an_nnx_layers_output():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        layer = drconv_jax.nnx.DRConv(4, 8, rngs=nnx.Rngs(0))
        x = jax.device_put(jnp.tile(X, (4, 1, 1, 1)), PartitionSpec("data"))
        y = layer(x, out_sharding=PartitionSpec(None, None, None, "data"))
    assert jax.typeof(y).sharding.spec == PartitionSpec(None, None, None, "data")


# What follows is said of nnx.Conv, and holds for DRConv as well.
@pytest.fixture(params=[nnx.Conv, drconv_jax.nnx.DRConv], ids=["nnx.Conv", "DRConv"])
def make_nnx(request):
    """Makes a layer of 4 channels with initializers of its own, which no other layer has."""

    def make(seed=0, out=4, **arguments):
        inits = dict(
            kernel_init=nnx.initializers.he_normal(), bias_init=nnx.initializers.constant(0.5)
        )
        return request.param(4, out, [3, 3], **inits, **arguments, rngs=nnx.Rngs(seed))

    return make


def test_nnx_layers_are_pytrees_of_equal_structure(make_nnx):
    one, other = make_nnx(0), make_nnx(1)
    assert nnx.graphdef(one) == nnx.graphdef(other)
    assert hash(nnx.graphdef(one)) == hash(nnx.graphdef(other))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    for got, a, b in zip(*(jax.tree.leaves(m) for m in (mean, one, other)), strict=True):
        np.testing.assert_array_equal(got, (a + b) / 2)
    assert mean(X).shape == (2, 9, 9, 4)


def test_an_nnx_layers_graphdef_is_a_static_argument(make_nnx):
    @functools.partial(jax.jit, static_argnums=0)
    def run(graphdef, state, x):
        return nnx.merge(graphdef, state)(x)

    for layer in (make_nnx(0), make_nnx(1)):
        expected = layer(X)
        np.testing.assert_allclose(run(*nnx.split(layer), X), expected, rtol=1e-5, atol=1e-5)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        nnx.clone,
        lambda layer: jax.tree.map(jnp.copy, layer),
    ],
)
def test_copies_of_nnx_layers(make_nnx, duplicate):
    layer = make_nnx()
    copied, expected = duplicate(layer), layer(X)
    nnx.update(layer, jax.tree.map(jnp.zeros_like, nnx.state(layer)))
    np.testing.assert_array_equal(copied(X), expected)
    assert not layer(X).any()


def test_nnx_layers_are_pickled(make_nnx):
    layer = make_nnx()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(layer))(X), layer(X))


def test_nnx_layers_in_stacks(make_nnx):
    alone = [make_nnx(seed) for seed in range(3)]
    states = [nnx.state(layer) for layer in alone]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    layers = nnx.merge(nnx.graphdef(alone[0]), stacked)
    beside = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
    behind = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    y = X
    for i, layer in enumerate(alone):
        np.testing.assert_allclose(beside[i], layer(X), rtol=1e-4, atol=1e-5)
        y = layer(y)
    np.testing.assert_allclose(behind(layers, X), y, rtol=1e-3, atol=1e-4)


def test_nnx_layers_learn_under_jit(make_nnx):
    layer = make_nnx()

    @nnx.jit
    def step(layer):
        loss, gradients = nnx.value_and_grad(lambda layer: (layer(X) ** 2).mean())(layer)
        state = jax.tree.map(lambda p, g: p - 0.05 * g, nnx.state(layer), gradients)
        nnx.update(layer, state)
        return loss

    losses = [step(layer) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_nnx_tabulate_leaves_layers_as_they_were(make_nnx):
    layer = make_nnx()
    expected = layer(X)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer)))
    assert f"Total Parameters: {count:,}" in nnx.tabulate(
        layer, X, console_kwargs={"no_color": True}
    )
    np.testing.assert_array_equal(layer(X), expected)
    assert make_nnx(1)(X).shape == expected.shape


def test_arguments_of_nnx_layers_are_attributes(make_nnx):
    given = dict(strides=2, padding="VALID", kernel_dilation=2, use_bias=False, dtype=jnp.bfloat16)
    layer = make_nnx(out=6, **given)
    for name, value in given.items():
        assert getattr(layer, name) == value
    assert (layer.in_features, layer.out_features, layer.kernel_size) == (4, 6, (3, 3))
    assert layer.bias is None
    layer.set_attributes(strides=1)
    assert layer(X).shape == (2, 5, 5, 6)


def test_nnx_layers_take_lists():
    """Of which nnx.Conv makes a graphdef that has no hash."""
    layer = drconv_jax.nnx.DRConv(
        4, 6, [3, 3], [2, 2], padding=[[1, 1], [0, 1]], guide_kernel_size=[1, 1], rngs=nnx.Rngs(0)
    )
    hash(nnx.graphdef(layer))
    assert nnx.jit(lambda layer, x: layer(x))(layer, X).shape == (2, 5, 4, 6)


def test_counts_and_guides_of_another_type(no_shape_checks):
    x = jnp.ones((1, 6, 6, 4))
    with pytest.raises(TypeError, match=r"regions must be an integer, got 2\.5"):
        DRConv(5, regions=2.5).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match=r"regions must be an integer, got True"):
        DRConv(5, regions=True).init(jax.random.key(0), x)
    for dtype in (jnp.int32, bool):
        with pytest.raises(TypeError, match=f"got {dtype.__name__}: cast .*jax.nn.one_hot"):
            DRConv(5).init(jax.random.key(0), x, guide=jnp.zeros((1, 6, 6, 8), dtype))
    for shape in ((1, 0, 6, 8), (1, 6, 6, 0), (1, 0, 0, 8)):
        with pytest.raises(ValueError, match=f"guide must have .* got .*{re.escape(str(shape))}"):
            DRConv(5).init(jax.random.key(0), x, guide=jnp.zeros(shape))


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
        dict(padding="VALID", filter_generator="experts"),
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


def test_what_a_layer_refuses_of_its_arguments(no_shape_checks):
    with pytest.raises(ValueError, match="'highest'.*got \\('highest', 'default'\\)"):
        DRConv(6, precision=("highest", "default")).init(KEY, X)
    with pytest.raises(ValueError, match=r"got \(\)"):
        DRConv(6).init(KEY, jnp.zeros(()))
    empty = jnp.zeros((2, 0, 6, 4))
    with pytest.raises(ValueError, match=r"at least one position.*\(2, 0, 6, 8\)"):
        DRConv(6, padding=3).init(KEY, empty, guide=jnp.zeros((2, 0, 6, 8)))
