import functools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from drconv_jax import DRConv, fast_cpu
from drconv_jax.fold import fold_batch_norm
from drconv_jax.models import BlockGuide, ShuffleNetV2, create_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 9, 9, 4))
norm = functools.partial(nn.BatchNorm, use_running_average=True)


def trained(model, *args, **kwargs):
    """Variables whose norms do something."""
    rng = np.random.default_rng(0)
    draws = {
        "mean": lambda shape: rng.normal(size=shape) / 2,
        "var": lambda shape: rng.uniform(0.2, 2, shape),
        "scale": lambda shape: rng.uniform(0.5, 2, shape),
        "bias": lambda shape: rng.normal(size=shape),
    }

    def draw(path, leaf):
        name = path[-1].key
        return jnp.asarray(draws[name](leaf.shape), leaf.dtype) if name in draws else leaf

    variables = jax.jit(functools.partial(model.init, **kwargs))(KEY, *args)
    return jax.tree_util.tree_map_with_path(draw, variables)


def norms(variables):
    return {path[1:-1] for path in flatten_dict(variables) if path[-1] in ("mean", "scale")}


def assert_folds(model, *args, left=()):
    """The folded model gives the same, and only the norms of the names in `left` are left."""
    variables = trained(model, *args)
    apply, folded = fold_batch_norm(model, variables, *args)
    expected, y = jax.jit(model.apply)(variables, *args), jax.jit(apply)(folded, *args)
    scale = float(jnp.abs(expected).max())
    assert scale > 0.1 and y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * scale)
    assert norms(folded) == {(name,) for name in left}
    rsqrts = str(jax.make_jaxpr(apply)(folded, *args)).count("rsqrt")
    assert rsqrts == len(left)
    return variables, folded


LAYERS = {
    "strides": nn.Conv(6, (3, 3), strides=2, use_bias=False),
    "bias": nn.Conv(6, (3, 3), padding="VALID", kernel_dilation=2),
    "grouped": nn.Conv(6, (3, 3), feature_group_count=2, padding=((2, 0), (1, 1))),
    "depthwise": nn.Conv(
        4,
        (3, 3),
        feature_group_count=4,
        use_bias=False,
        conv_general_dilated=fast_cpu.conv_general_dilated,
    ),
    "dense": nn.Dense(6),
    "pooled": DRConv(
        6, (3, 3), regions=3, filter_generator="pooled", strides=2, feature_group_count=2
    ),
    "mixture 1x1": DRConv(6, (1, 1), regions=3, use_bias=False),
    "experts": DRConv(6, (3, 3), regions=3, filter_generator="experts", use_bias=False),
}


class LayerAndNorm(nn.Module):
    layer: nn.Module
    norm: nn.Module = norm()

    def __call__(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_norm(name):
    layer = LAYERS[name]
    variables, folded = assert_folds(LayerAndNorm(layer.clone()), X)
    assert set(folded["params"]["layer"]) == {*variables["params"]["layer"], "bias"}
    if "filters" in folded["params"]["layer"]:  # the guide stays as it was
        np.testing.assert_array_equal(
            folded["params"]["layer"]["guide"]["kernel"],
            variables["params"]["layer"]["guide"]["kernel"],
        )


@pytest.mark.parametrize("fields", [dict(use_scale=False), dict(use_bias=False, epsilon=0.1)])
def test_a_norm_without_scale_or_bias(fields):
    assert_folds(LayerAndNorm(nn.Conv(6, (1, 1), use_bias=False), norm(**fields)), X)


class LeftAlone(nn.Module):
    """Norms that must stay, and why."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(6, (3, 3), name="read_twice")(x)
        x = norm(name="another_reads_its_input")(y) + y
        x = norm(name="behind_an_activation")(nn.relu(nn.Conv(6, (1, 1))(x)))
        x = norm(axis=(1, 3), name="of_another_axis")(nn.Conv(6, (1, 1))(x))
        x = norm(name="behind_another_kind")(nn.ConvTranspose(6, (2, 2))(x))
        x = norm(name="behind_a_subclass")(Doubled(6, (1, 1))(x))
        shared = nn.Conv(6, (1, 1), name="called_twice")
        x = norm(name="the_first")(shared(x)) + norm(name="the_second")(shared(x))
        twice = norm(name="calls_twice")
        x = twice(nn.Conv(6, (1, 1))(x)) + twice(nn.Conv(6, (1, 1))(x))
        return norm(name="folded")(nn.Conv(6, (1, 1))(x))


class Doubled(nn.Conv):
    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_norms_that_stay():
    variables = trained(LeftAlone(), X)
    apply, folded = fold_batch_norm(LeftAlone(), variables, X)
    assert norms(variables) - norms(folded) == {("folded",)}
    expected = LeftAlone().apply(variables, X)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(apply(folded, X), expected, rtol=0, atol=3e-6 * scale)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return norm()(nn.Conv(4, (1, 1), use_bias=False)(x)), None


class Transformed(nn.Module):
    """Under transformations that keep variables as they are, and that stack them."""

    @nn.compact
    def __call__(self, x):
        x, _ = nn.remat(Step)(name="remat")(x)
        x, _ = nn.jit(Step)(name="jit")(x)
        many = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        x, _ = nn.scan(Step, **many, length=2)(name="scan")(x, None)
        x, _ = nn.vmap(Step, **many, in_axes=0)(name="vmap")(x)
        return x


def test_transformed_modules():
    model = Transformed()
    variables = trained(model, X)
    apply, folded = fold_batch_norm(model, variables, X)
    assert {path[0] for path in norms(folded)} == {"scan", "vmap"}
    expected = model.apply(variables, X)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(apply(folded, X), expected, rtol=0, atol=3e-6 * scale)


def test_a_network_gives_the_same():
    model = ShuffleNetV2(
        num_classes=5,
        width=0.1,
        blocks=(1, 1, 1),
        conv=functools.partial(DRConv, regions=3),
        placement="last",
        guide=BlockGuide(3),
    )
    assert_folds(model, jax.random.normal(KEY, (2, 32, 32, 3)))


@pytest.mark.parametrize("prefix", ["", "dr_"])
@pytest.mark.parametrize(
    "name", ["shufflenet_v2_x0_5", "mobilenet_v1_x0_25", "mobilenet_v2_x0_35", "mobilefacenet"]
)
def test_networks_have_no_norm_left(name, prefix):
    model = create_model(prefix + name, num_classes=5)
    x = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, KEY, x)
    applies = []

    def fold(variables):
        apply, folded = fold_batch_norm(model, variables, x)
        applies.append(apply)
        return folded

    folded = jax.eval_shape(fold, variables)
    assert "batch_stats" in variables and "batch_stats" not in folded
    assert not norms(folded)
    assert jax.eval_shape(applies[0], folded, x) == logits


def test_frozen_variables_shapes_and_jit():
    model = LayerAndNorm(nn.Conv(6, (1, 1)))
    variables = trained(model, X)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)

    @jax.jit
    def fold_and_run(variables):
        apply, folded = fold_batch_norm(model, variables, x)
        return apply(folded, X)

    y = fold_and_run(flax.core.freeze(variables))
    np.testing.assert_allclose(y, model.apply(variables, X), rtol=1e-5, atol=1e-5)


def test_the_norms_own_dtype_is_kept():
    model = LayerAndNorm(nn.Conv(6, (1, 1), dtype=jnp.bfloat16), norm(dtype=jnp.float32))
    with jax.numpy_dtype_promotion("standard"):  # flax subtracts the mean in float32
        variables = trained(model, X)
        apply, folded = fold_batch_norm(model, variables, X)
        y, expected = apply(folded, X), model.apply(variables, X)
    assert y.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=2**-7 * np.abs(expected).max())


def test_training_is_refused():
    model = ShuffleNetV2(num_classes=5, width=0.1, blocks=(1, 1, 1))
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, x)
    with pytest.raises(ValueError, match="BatchNorm at 'stem_norm' .* such as train=False"):
        fold_batch_norm(model, variables, x, train=True)
    apply, folded = fold_batch_norm(model, trained(model, jnp.zeros(x.shape)), x)
    with pytest.raises(ValueError, match="BatchNorm at 'stem_norm' .* such as train=False"):
        apply(folded, jnp.zeros(x.shape), train=True)


@pytest.mark.parametrize("generator", ["mixture", "pooled"])
def test_boxed_variables_stay_boxed(generator):
    def network(box):
        inits = dict(
            kernel_init=box(nn.initializers.lecun_normal(), (None, None, None, "out")),
            bias_init=box(nn.initializers.normal(), ("out",)),
        )
        scale_init = box(nn.initializers.normal(), ("out",))
        return nn.Sequential(
            [
                DRConv(6, regions=3, filter_generator=generator, **inits),
                norm(scale_init=scale_init),
                nn.Conv(6, (3, 3), **inits),
                norm(scale_init=scale_init),
            ]
        )

    boxed, plain = network(nn.with_partitioning), network(lambda init, names: init)
    variables = trained(plain, X)
    in_boxes = nn.meta.replace_boxed(jax.eval_shape(boxed.init, KEY, X), variables)
    apply, folded = fold_batch_norm(boxed, in_boxes, X)
    _, expected = fold_batch_norm(plain, variables, X)
    specs = nn.get_partition_spec(folded)["params"]
    assert tuple(specs["layers_2"]["kernel"]) == (None, None, None, "out")
    assert specs["layers_0"]["filters"]["bank_kernel"][-1] == "out"
    assert tuple(specs["layers_0"]["bias"]) == ("out",)
    for ours, theirs in zip(
        jax.tree.leaves(nn.unbox(folded)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    y = jax.jit(plain.apply)(variables, X)
    np.testing.assert_allclose(jax.jit(apply)(folded, X), y, rtol=1e-4, atol=1e-4)
