import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from drconv_jax import DRConv
from drconv_jax.cost import multiply_adds, parameters
from drconv_jax.models import (
    BlockGuide,
    MobileFaceNet,
    MobileNetV1,
    MobileNetV2,
    ShuffleNetV2,
    create_model,
    list_models,
    mobilenet_v1,
    mobilenet_v2,
)
from drconv_jax.models.parts import GRID_PACE

pytestmark = pytest.mark.usefixtures("compiled_quickly")

DR = functools.partial(DRConv, regions=3)
TINY = {
    "mobilenet_v1": functools.partial(MobileNetV1, num_classes=5, width=0.1),
    "mobilenet_v2": functools.partial(MobileNetV2, num_classes=5, width=0.1),
    "shufflenet_v2": functools.partial(ShuffleNetV2, num_classes=5, width=0.1, blocks=(1, 1, 1)),
    "mobilefacenet": functools.partial(
        MobileFaceNet, embedding_size=16, num_classes=5, width=0.25, blocks=(1, 1, 1, 1)
    ),
}
STRIDES = {"mobilefacenet": [2, 4, 8, 16]}


def images(batch=8, size=32, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, size, size, 3))


def few_stages(monkeypatch):
    """Fewer stages of the networks that have many are as good for a test, and faster."""
    for family, stages in ((mobilenet_v1, 3), (mobilenet_v2, 4)):
        monkeypatch.setattr(family, "STAGES", family.STAGES[:stages])


def test_every_name_is_for_some_task():
    tasks = [set(list_models(task)) for task in ("classification", "detection", "faces")]
    assert set(list_models()) == set.union(*tasks)
    assert tasks[0] & tasks[2] == {name for name in list_models() if "mobilefacenet" in name}
    assert not tasks[1] & (tasks[0] | tasks[2])


@pytest.mark.parametrize("name", list_models("faces"))
def test_embeddings_of_faces(name):
    model = create_model(name, embedding_size=24, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 112, 96, 3), jnp.float32)
    embeddings, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert embeddings.shape == (2, 24) and embeddings.dtype == jnp.bfloat16
    # The convolution over the whole feature map finds a sixteenth of the image.
    assert variables["params"]["global_depthwise"]["kernel"].shape == (7, 6, 1, 512)


@pytest.mark.parametrize("name", list_models("classification"))
def test_every_name_builds(name):
    model = create_model(name, num_classes=7)
    x = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert logits.shape == (2, 7)
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(variables)}
    assert name.startswith("dr_") == any("mixing_kernel" in path for path in paths)
    assert name.startswith("dr_") == any("guide/kernel" in path for path in paths)
    if not re.search("x0_5|x1_0|face", name):  # strides are those of any width
        return
    maps = jax.eval_shape(functools.partial(model.apply, features=True), variables, x)
    assert list(maps) == STRIDES.get(
        name.removeprefix("dr_").removesuffix("_all"), [2, 4, 8, 16, 32]
    )
    for stride, features in maps.items():
        assert features.shape[:3] == (2, -(-112 // stride), -(-112 // stride))


def test_bad_names_get_the_nearest():
    with pytest.raises(ValueError, match="no model .shufflenet_x0_5.; .*shufflenet_v2_x0_5"):
        create_model("shufflenet_x0_5")


@pytest.mark.parametrize("network", TINY)
def test_bad_fields(network, no_shape_checks):
    bad = [
        ("width", -1.0, ValueError, "width must be positive, got -1.0"),
        ("width", float("inf"), ValueError, "width must be positive and finite, got inf"),
        ("width", "1", TypeError, "width must be a number, got '1'"),
        ("num_classes", 0, ValueError, "num_classes must be at least 1, got 0"),
        ("num_classes", -3, ValueError, "num_classes must be at least 1, got -3"),
        ("num_classes", True, TypeError, "num_classes must be an integer, got True"),
        ("num_classes", 2.0, TypeError, "num_classes must be an integer, got 2.0"),
    ]
    if network != "mobilenet_v1":
        bad.append(("placement", "first", ValueError, "placement must be .* got 'first'"))
    if network.startswith("mobilenet"):
        bad.append(("stem_strides", 0, ValueError, "stem_strides must be at least 1, got 0"))
    else:
        bad += [
            ("blocks", (1, 1), ValueError, r"blocks must have \d entries, got \(1, 1\)"),
            ("blocks", 2, TypeError, r"blocks must be a sequence of \d integers, got 2"),
        ]
    if network == "shufflenet_v2":
        bad += [
            ("blocks", (1, 1, 0), ValueError, "every entry of blocks must be at least 1, got 0"),
            ("stem_strides", 2, TypeError, "stem_strides must be a sequence of 2 integers, got 2"),
            ("channels", (8, 8, 8), ValueError, "channels must have 5 entries"),
            ("channels", (8, 8, 8, 9, 8), ValueError, "channels must be even .* got"),
        ]
    if network == "mobilefacenet":
        bad.append(("embedding_size", 0, ValueError, "embedding_size must be at least 1, got 0"))
    for field, value, error, message in bad:
        with pytest.raises(error, match=message):
            jax.eval_shape(TINY[network](**{field: value}).init, jax.random.key(0), images(1))


@pytest.mark.parametrize("network", TINY)
def test_what_is_no_batch_of_images(network, no_shape_checks):
    for shape, message in (
        ((32, 32, 3), r"\(batch, height, width, channels\), got .*32, 3\); for a single image"),
        ((32, 32), r"got shape \(32, 32\)\."),
        ((1, 32, 0, 3), r"got shape \(1, 32, 0, 3\)\."),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(TINY[network]().init, jax.random.key(0), jnp.zeros(shape))


def test_features_do_not_make_a_head():
    model = TINY["shufflenet_v2"]()
    params = jax.eval_shape(
        functools.partial(model.init, features=True), jax.random.key(0), images(1)
    )["params"]
    assert set(params) == {"stem_conv", "stem_norm"} | {f"stage{i}_block0" for i in (2, 3, 4)}


@pytest.mark.parametrize(
    "network,dynamic,axis_type",
    [
        *((network, True, AxisType.Auto) for network in TINY),
        ("shufflenet_v2", True, AxisType.Explicit),
        ("shufflenet_v2", False, AxisType.Auto),
    ],
)
def test_trains_on_eight_devices(network, dynamic, mesh, monkeypatch):
    few_stages(monkeypatch)
    model = TINY[network](**({"conv": DR, "guide": BlockGuide(3)} if dynamic else {}))
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    x, labels = jax.device_put((images(), jax.nn.one_hot(jnp.arange(8) % 5, 5)), by_batch)
    variables = jax.device_put(jax.jit(model.init)(jax.random.key(1), images(1)), whole)
    optimizer = optax.adam(3e-3)

    @functools.partial(jax.jit, out_shardings=whole)
    def step(variables, opt_state):
        def loss_of(params):
            logits, updates = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy(logits, labels).mean(), updates

        (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, opt_state, loss

    opt_state, losses = jax.device_put(optimizer.init(variables["params"]), whole), []
    with jax.numpy_dtype_promotion("standard"):  # optax's own mix of dtypes
        for _ in range(10):
            variables, opt_state, loss = step(variables, opt_state)
            losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_batch_norm_sees_the_whole_batch_on_eight_devices(mesh):
    model = TINY["shufflenet_v2"](conv=DR, guide=BlockGuide(3))
    x = images()
    variables = jax.jit(model.init)(jax.random.key(1), x)
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    (alone, alone_stats), (split, split_stats) = (
        apply(variables, x),
        apply(variables, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))),
    )
    np.testing.assert_allclose(split, alone, rtol=1e-3, atol=1e-4)
    for a, b in zip(jax.tree.leaves(split_stats), jax.tree.leaves(alone_stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("network", TINY)
def test_bfloat16_computes_in_bfloat16_with_float32_weights(network):
    model = TINY[network](conv=DR, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # flax's own batch norm mixes dtypes
        y, variables = jax.eval_shape(model.init_with_output, jax.random.key(2), images(1))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_bfloat16_is_near_float32():
    wide, narrow = (TINY["shufflenet_v2"](conv=DR, dtype=dtype) for dtype in (None, jnp.bfloat16))
    variables = jax.jit(wide.init)(jax.random.key(2), images(2))
    expected = jax.jit(wide.apply)(variables, images(2))
    with jax.numpy_dtype_promotion("standard"):
        y = jax.jit(narrow.apply)(variables, images(2))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=0.05 * scale)


@pytest.mark.parametrize("network", TINY)
def test_baselines_are_one_argument_away(network):
    def count(conv):
        return parameters(TINY[network](conv=conv), (2, 32, 32, 3)).total

    plain = count(nn.Conv)
    assert count(nn.ConvLocal) > plain  # a filter for every position
    assert plain < count(functools.partial(DRConv, regions=1)) < count(DR)


class Pair(nn.Module):
    """A convolution of a user's own that takes a guide; what else it is called with, it ignores."""

    features: int
    kernel_size: tuple
    strides: int = 1
    padding: int = 0
    use_bias: bool = True
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, guide=None):
        x = DRConv(self.features, self.kernel_size, regions=5)(x, guide)
        return DRConv(self.features, self.kernel_size, regions=5)(x, guide)


class Subclass(DRConv):
    pass


ONE_REGION = functools.partial(DRConv, regions=1)


@pytest.mark.parametrize(
    "network,conv,guide,regions",
    [
        *((network, nn.Conv, BlockGuide(), None) for network in TINY),
        *((network, ONE_REGION, BlockGuide(), 1) for network in TINY),
        ("shufflenet_v2", nn.Conv, BlockGuide(4, pool=2), None),
        ("shufflenet_v2", nn.ConvLocal, BlockGuide(), None),
        ("shufflenet_v2", DRConv, BlockGuide(), 8),
        ("shufflenet_v2", functools.partial(ONE_REGION, regions=4), BlockGuide(), 4),
        ("shufflenet_v2", functools.partial(Subclass, regions=3), BlockGuide(start="grid"), 3),
        ("shufflenet_v2", nn.remat(DRConv), BlockGuide(), 8),
        ("shufflenet_v2", lambda *args, **fields: DR(*args, **fields), BlockGuide(), 3),
        ("shufflenet_v2", Pair, BlockGuide(5), 5),
    ],
)
def test_a_guide_fits_what_it_guides(network, conv, guide, regions, monkeypatch):
    few_stages(monkeypatch)
    model = TINY[network](conv=conv, guide=guide)
    params = jax.eval_shape(model.init, jax.random.key(0), images(1))["params"]
    for block in (part for name, part in params.items() if "block" in name):
        guides = [path for path, _ in jax.tree.leaves_with_path(block) if "guide" in str(path)]
        if regions is None:
            assert not guides
        else:  # its own, and none in a convolution
            assert len(guides) == 1 and block["guide"]["kernel"].shape[-1] == regions


def test_without_a_number_of_regions_there_is_no_guide():
    model = create_model("dr_shufflenet_v2_x0_5", num_classes=5, conv=Pair, blocks=(1, 1, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), images(1))["params"]
    assert "guide" not in params["stage2_block0"]
    assert "guide" in params["stage2_block0"]["conv2"]["DRConv_0"]


def test_placement_says_which_convolutions_are_dynamic():
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    for network, first, last in (
        ("shufflenet_v2", "conv1", "conv2"),
        ("mobilenet_v2", "expand", "project"),
        ("mobilefacenet", "expand", "project"),
    ):
        for placement in ("all", "last"):
            model = TINY[network](conv=DR, placement=placement)
            params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
            block = next(p for name, p in params.items() if "block0" in name and first in p)
            assert ("filters" in block[first]) == (placement == "all")
            assert "filters" in block[last]


def test_widths_of_the_papers_channels():
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    for model, name, shape in (
        (MobileNetV2(width=1.4), "head_conv", (1, 1, 448, 1792)),
        (MobileNetV2(width=0.35), "head_conv", (1, 1, 112, 1280)),
        (MobileNetV1(width=0.25), "stem_conv", (3, 3, 3, 8)),
        (ShuffleNetV2(width=1.5), "head_conv", (1, 1, 704, 1024)),
        (MobileFaceNet(width=2.0), "head_conv", (1, 1, 256, 512)),
    ):
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        assert params[name]["kernel"].shape == shape


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_a_guides_pool_gives_a_square_of_positions_one_region(pool):
    model = ShuffleNetV2(
        num_classes=5, width=0.5, blocks=(1, 1, 1), conv=DR, guide=BlockGuide(3, pool)
    )
    # The first block's input is 9x9: the last squares are cut. One half of it is dark.
    x = images(2, 36).at[:, :, :12].mul(1e-3)
    variables = jax.jit(model.init)(jax.random.key(3), x)
    state = jax.jit(functools.partial(model.apply, mutable="intermediates"))(variables, x)[1]
    (regions,) = state["intermediates"]["stage2_block0"]["conv1"]["region_index"]
    assert regions.shape == (2, 9, 9)
    index = np.arange(9) // pool * pool
    assert len(np.unique(regions)) > 1
    assert (regions == regions[:, index][:, :, index]).all()
    assert (pool == 1) == bool((regions[:, :8:2] != regions[:, 1:8:2]).any())


@pytest.mark.parametrize("network", TINY)
def test_a_guides_pool_quarters_its_cost(network):
    def guides(pool):
        model = TINY[network](conv=DR, guide=BlockGuide(3, pool))
        layers = multiply_adds(model, (1, 128, 128, 3)).layers
        return sum(n for layer, n in layers.items() if layer.endswith("guide"))

    assert guides(1) == 4 * guides(2) > 0


@pytest.mark.parametrize("pool", [1, 2])
def test_a_guide_can_start_as_a_grid_and_learns_from_there(pool):
    model = ShuffleNetV2(
        num_classes=5,
        width=0.5,
        blocks=(1, 1, 1),
        stem_strides=(1, 1),
        conv=functools.partial(DRConv, regions=4),
        guide=BlockGuide(4, pool, start="grid"),
    )
    x = images(2, 16)
    variables = jax.jit(model.init)(jax.random.key(4), x)

    @jax.jit
    def regions(params):
        state = model.apply({**variables, "params": params}, x, mutable="intermediates")[1]
        return state["intermediates"]["stage2_block0"]["conv1"]["region_index"][0]

    grid = np.arange(4).reshape(2, 2).repeat(8, axis=0).repeat(8, axis=1)
    np.testing.assert_array_equal(regions(variables["params"]), np.stack([grid, grid]))

    def loss_of(params):
        # Regions all start with one filter: the guide has a gradient when they have parted.
        params["stage2_block0"]["conv1"]["filters"]["mixing_bias"] = jnp.eye(4, 8)
        logits = model.apply({**variables, "params": params}, x, train=True, mutable=True)[0]
        return (logits**2).sum()

    gradient = jax.jit(jax.grad(loss_of))(variables["params"])
    kernel = gradient["stage2_block0"]["guide"]["kernel"]
    assert jnp.abs(kernel).max() > 0
    moved = variables["params"]
    scale = 20 / (GRID_PACE * jnp.abs(kernel).max())
    moved["stage2_block0"]["guide"]["kernel"] -= scale * kernel
    assert (regions(moved) != grid[None]).any()


def test_an_empty_batch_gives_no_logits():
    for network in (*TINY.values(), create_model("mobilefacenet")):
        model = network if isinstance(network, nn.Module) else network()
        run = lambda key, model=model: model.init_with_output(key, jnp.zeros((0, 32, 32, 3)))[0]  # noqa: E731
        assert jax.eval_shape(run, jax.random.key(0)).shape[0] == 0


def test_a_guide_that_nobody_has_a_number_for():
    class Own(nn.Module):
        features: int
        kernel_size: tuple[int, int]
        strides: int = 1
        padding: int = 0
        use_bias: bool = True
        dtype: type | None = None

        @nn.compact
        def __call__(self, x, guide):
            return nn.Conv(self.features, self.kernel_size)(x) * guide.mean()

    model = TINY["shufflenet_v2"](conv=Own, guide=BlockGuide())
    with pytest.raises(ValueError, match=r"Own needs a guide .*guide=BlockGuide\(regions\)"):
        jax.eval_shape(model.init, jax.random.key(0), images(1))


def test_bad_guides(no_shape_checks):
    for fields, message in (
        ({"pool": 0}, "pool of a BlockGuide must be at least 1, got 0"),
        ({"regions": 0}, "regions of a BlockGuide must be at least 1, got 0"),
        ({"start": "square"}, "start of a BlockGuide must be .* got 'square'"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockGuide(**fields)
    with pytest.raises(TypeError, match="pool of a BlockGuide must be an integer, got 1.5"):
        BlockGuide(pool=1.5)
    model = TINY["shufflenet_v2"](conv=DR, guide=BlockGuide(4))
    with pytest.raises(ValueError, match=r"BlockGuide\(regions=4\) .* a DRConv with regions=3"):
        jax.eval_shape(model.init, jax.random.key(0), images(1))
