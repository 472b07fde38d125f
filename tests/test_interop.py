import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.detection import FasterRCNN, MaskRCNN
from drconv_jax.interop import export_torch, import_torch
from drconv_jax.interop.networks import entries_of_network
from drconv_jax.models import BlockGuide, MobileFaceNet, MobileNetV1, MobileNetV2, ShuffleNetV2
from drconv_jax.weights import load_matching, load_weights, save_weights

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KEY = jax.random.key(0)
DATA = pathlib.Path(__file__).parent / "data"
SHARED = pathlib.Path(__file__).parents[2] / "shared" / "parity"
NETWORKS = {
    "torchvision_shufflenet_v2_x0_5": ShuffleNetV2(num_classes=10, width=0.5),
    "torchvision_mobilenet_v2_w0_25": MobileNetV2(num_classes=10, width=0.25),
    "timm_mobilenetv1_w0_25": MobileNetV1(num_classes=10, width=0.25),
    "insightface_mobilefacenet_s1": MobileFaceNet(),
}


def load(name):
    """The layer, its golden numbers, weights and gradients under PyTorch's names."""
    golden = dict(np.load(DATA / name))
    config = [int(value) for value in golden["config"]]
    if name.startswith("pooled"):
        *_, out, kernel, regions, stride, padding, dilation = config
        extra = dict(filter_generator="pooled", use_bias=False, kernel_dilation=dilation)
    else:
        *_, out, kernel, regions, experts, stride, padding = config
        extra = dict(filter_generator="experts", experts=experts)
    layer = DRConv(out, (kernel, kernel), regions=regions, strides=stride, padding=padding, **extra)
    params, gradients = (
        {k.removeprefix(part): v for k, v in golden.items() if k.startswith(part)}
        for part in ("param/", "grad/")
    )
    return layer, {k: jnp.asarray(v) for k, v in golden.items()}, params, gradients


def assert_close(ours, golden):
    scale = max(np.abs(golden).max(), 1e-6)
    np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.npz")))
def test_outputs_and_gradients_of_the_public_implementations(name, implementation):
    layer, golden, params, gradients = load(name)
    layer = layer.copy(implementation=implementation)
    variables = import_torch(layer, params)
    given = {} if name.startswith("pooled") else {"guide": golden["guide"]}
    assert_close(layer.apply(variables, golden["x"], **given), golden["y"])

    def loss(variables, x):
        return (layer.apply(variables, x) * golden["cotangent"]).sum()

    ours, dx = jax.jit(jax.grad(loss, (0, 1)))(variables, golden["x"])
    assert_close(dx, golden["grad_x"])
    expected = import_torch(layer, gradients)
    if name.startswith("experts"):  # the released mask network has no bias
        del ours["params"]["guide"]["bias"], expected["params"]["guide"]["bias"]
    jax.tree.map(assert_close, ours, expected)


def test_all_that_does_not_fit_is_listed():
    layer, _, params, _ = load("pooled_0.npz")
    del params["conv_guide.bias"]
    params["extra.weight"] = np.zeros(3)
    params["conv_kernel.3.bias"] = np.zeros(7)
    with pytest.raises(ValueError, match="missing: conv_guide.bias") as error:
        import_torch(layer, params)
    assert "unexpected: extra.weight (3,)" in str(error.value)
    assert "misshapen: conv_kernel.3.bias is (7,), must be (480,)" in str(error.value)


SMALL = ShuffleNetV2(num_classes=3, width=0.1, blocks=(1, 1, 1))


@functools.cache
def small_state():
    """A state dict for SMALL, and what it must be imported as."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(SMALL.init, KEY, x)
    state = {}
    for entry in entries_of_network(SMALL, {}):
        rng = np.random.default_rng(len(state))
        state[entry.name] = rng.normal(size=entry.shape).astype(np.float16).astype(np.float32)
    return state, shapes


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64", ">f4"])
def test_variables_have_the_dtypes_of_init(dtype, tmp_path):
    state, shapes = small_state()
    state = {name: np.asfortranarray(value.astype(dtype)) for name, value in state.items()}
    expected = import_torch(SMALL, {name: v.astype(np.float32) for name, v in state.items()})
    variables = import_torch(SMALL, state)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), variables) == jax.tree.map(
        lambda v: (v.shape, v.dtype), shapes
    )
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    save_weights(tmp_path / "w", variables)
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "w", shapes), expected)
    _, report = load_matching(expected, variables)
    assert not report.initial and not report.mismatched


@pytest.mark.parametrize("name", ["pooled_0.npz", "experts_0.npz"])
def test_a_layers_variables_have_its_param_dtype(name):
    layer, _, params, _ = load(name)
    layer = layer.copy(param_dtype=jnp.bfloat16)
    variables = import_torch(layer, {k: np.asarray(v, np.float64) for k, v in params.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_what_is_no_weight_is_refused(dtype):
    state, _ = small_state()
    state = {**state, "fc.bias": state["fc.bias"].astype(dtype)}
    with pytest.raises(ValueError, match=f"not floating-point: fc.bias is {dtype}"):
        import_torch(SMALL, state)


@pytest.mark.parametrize(
    "prefix,model",
    [
        ("module.", SMALL),
        ("model.", MobileNetV2(num_classes=None, width=0.1)),  # whose names begin alike
        ("_orig_mod.", SMALL),
        ("module._orig_mod.net.", SMALL),
    ],
)
def test_names_with_a_prefix(prefix, model):
    state = {entry.name: np.ones(entry.shape) for entry in entries_of_network(model, {})}
    expected = import_torch(model, state)
    prefixed = {prefix + name: value for name, value in state.items()}
    prefixed[f"{prefix}bn1.num_batches_tracked"] = np.array(3)
    with pytest.warns(UserWarning, match=f'All names begin with "{prefix}", which is left out'):
        variables = import_torch(model, prefixed)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    missing = next(iter(state))
    del prefixed[prefix + missing]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"missing: {missing}.$"):
        import_torch(model, prefixed)


@pytest.mark.parametrize("name", ["pooled_0.npz", "experts_0.npz"])
def test_a_layer_out_of_a_network(name):
    layer, _, params, _ = load(name)
    expected = import_torch(layer, params)
    with pytest.warns(UserWarning, match='begin with "stage1.conv.", which is left out'):
        variables = import_torch(layer, {f"stage1.conv.{k}": v for k, v in params.items()})
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize("others", [["n_averaged"], ["ema.decay", "loss.weight"]])
def test_a_prefix_of_some_names_only(others):
    state, _ = small_state()
    prefixed = {f"module.{name}": value for name, value in state.items()}
    message = rf'{len(state)} of {len(state)} arrays under names that begin with "module\."'
    with pytest.raises(ValueError, match=message) as error:
        import_torch(SMALL, {**dict.fromkeys(others, np.ones(())), **prefixed})
    remedy = re.search(r"pass (\{.*\})\.$", str(error.value))[1]
    import_torch(SMALL, eval(remedy, {"state_dict": {**prefixed, "other": 0}}))


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict"])
def test_the_checkpoint_of_a_training_script(name):
    state, _ = small_state()
    checkpoint = {"epoch": 3, "optimizer": {"lr": 0.1}, name: state}
    with pytest.warns(UserWarning, match=f'The weights are those in the checkpoint.s "{name}"'):
        variables = import_torch(SMALL, checkpoint)
    jax.tree.map(np.testing.assert_array_equal, variables, import_torch(SMALL, state))
    checkpoint[name] = {f"module.{k}": v for k, v in state.items()}
    with pytest.warns(UserWarning) as warned:
        jax.tree.map(np.testing.assert_array_equal, import_torch(SMALL, checkpoint), variables)
    assert len(warned) == 2


def test_what_stands_beside_the_arrays():
    state, _ = small_state()
    variables = import_torch(SMALL, {**state, "_metadata": {"version": 1}})
    jax.tree.map(np.testing.assert_array_equal, variables, import_torch(SMALL, state))


def test_numbers_beyond_the_dtype_are_refused():
    state = dict(small_state()[0])
    name = next(iter(state))
    state[name] = np.full(np.shape(state[name]), 1e300)
    with pytest.raises(ValueError, match=f"{re.escape(name)} has numbers that float32 cannot hold"):
        import_torch(SMALL, state)


class Tensor:
    """What of a PyTorch tensor is not as numpy's arrays."""

    def __init__(self, values, dtype, on_host=False):
        self.values, self.dtype, self.on_host = values, dtype, on_host

    def detach(self):
        return self

    def cpu(self):
        return Tensor(self.values, self.dtype, on_host=True)

    def float(self):
        return Tensor(self.values, "torch.float32", self.on_host)

    def __array__(self, *args, **kwargs):
        if not self.on_host or self.dtype == "torch.bfloat16":
            raise TypeError("can't convert")
        return self.values


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_tensors_of_any_device(dtype):
    state, _ = small_state()
    variables = import_torch(SMALL, {name: Tensor(v, dtype) for name, v in state.items()})
    jax.tree.map(np.testing.assert_array_equal, variables, import_torch(SMALL, state))


@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_no_state_dict():
    for given, message in (
        (nn.Dense(3), "must be a mapping of names to arrays, .* got Dense"),
        ({"model": nn.Dense(3)}, r'state_dict\["model"\] must be an array, got Dense'),
        ({"ema": {}, "best": {}}, "holds the mappings 'ema', 'best'; pass the one"),
    ):
        with pytest.raises(TypeError, match=message):
            import_torch(SMALL, given)


def test_without_the_weight_that_tells_the_channels():
    layer, _, params, _ = load("experts_0.npz")
    del params["routing_fc.weight"], params["weight"]
    with pytest.raises(ValueError, match="missing: routing_fc.weight; missing: weight"):
        import_torch(layer, params)


def test_an_unknown_module():
    with pytest.raises(TypeError, match="one of DRConv, ShuffleNetV2, .* got Dense"):
        import_torch(nn.Dense(3), {})


def test_a_layer_with_a_generator_of_its_own_has_no_public_weights():
    with pytest.raises(ValueError, match='must be "pooled" or "experts", .* got "mixture"'):
        import_torch(DRConv(3), {})


def test_a_flat_weight_where_the_channels_are_told():
    layer, _, params, _ = load("pooled_0.npz")
    params["conv_kernel.1.weight"] = params["conv_kernel.1.weight"].reshape(-1)
    with pytest.raises(ValueError, match=r"misshapen: conv_kernel.1.weight is .*, any, 1, 1\)"):
        import_torch(layer, params)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_public_networks(name):
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    golden = dict(np.load(path))
    params = {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}
    variables = import_torch(NETWORKS[name], params)
    y = jax.jit(NETWORKS[name].apply)(variables, jnp.asarray(golden["x"]))
    assert_close(y, golden["y"])


def torch_state(model, size):
    """A state dict of the names and shapes that the importer asks for."""
    with pytest.raises(ValueError, match="missing: ") as error:
        import_torch(model, {})
    names = re.findall(r"missing: ([\w.]+)", str(error.value))
    variables = jax.eval_shape(model.init, KEY, jnp.zeros((1, size, size, 3)))
    assert len(names) == len(set(names)) == len(jax.tree.leaves(variables))
    return names


@pytest.mark.parametrize(
    "model,names",
    [
        (ShuffleNetV2(num_classes=None, blocks=(1, 2, 1)), ["stage3.1.branch2.6.running_var"]),
        (MobileNetV2(width=1.4), ["features.17.conv.3.weight", "classifier.1.bias"]),
        (MobileNetV1(width=0.5), ["blocks.3.5.bn2.bias"]),
        (
            MobileFaceNet(512, width=2.0, blocks=(2, 1, 1, 1)),
            ["layers.1.layers.1.layers.2.layers.1.bias", "features.layers.3.weight"],
        ),
    ],
    ids=["shufflenet", "mobilenet v2", "mobilenet v1", "facenet"],
)
def test_other_widths_and_blocks_by_construction(model, names):
    size = 112 if isinstance(model, MobileFaceNet) else 32
    assert set(names) <= set(torch_state(model, size))


def released_network(state, x):
    """What megvii-research/DRConv's network computes, from its state dict, channels first."""

    def convolve(name, x, strides, groups=1):
        kernel = state[f"{name}.conv.weight"]
        pad = [(kernel.shape[-1] // 2,) * 2] * 2
        y = jax.lax.conv_general_dilated(
            x, kernel, (strides, strides), pad, feature_group_count=groups
        )
        y, bias = np.asarray(y), state.get(f"{name}.conv.bias")
        return y if bias is None else y + bias[:, None, None]

    def norm(name, y):
        weight, bias, mean, var = (
            state[f"{name}.bn.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / np.sqrt(var + 1e-5) * weight + bias

    def by_region(name, x, mask):
        weight = state[f"{name}.conv.weight"]
        m, count = 3, weight.shape[1]
        logits = x.mean((2, 3)) @ state[f"{name}.conv.routing_fc.weight"].T
        logits = (logits + state[f"{name}.conv.routing_fc.bias"]).reshape(-1, m, count)
        filters = (2 / (1 + np.exp(-logits)) / count) @ weight.T
        filters = filters.reshape(len(x), m, -1, x.shape[1])
        step = mask.shape[1] // x.shape[2]
        mask = mask[:, ::step, ::step]
        return np.stack(
            [
                np.einsum("ohwc,chw->ohw", np.moveaxis(filters[b][mask[b]], 2, 0), x[b])
                for b in range(len(x))
            ]
        )

    x = np.maximum(norm("conv_first", convolve("conv_first", x, 2)), 0)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    size = x.shape[2]
    taps = [padded[:, :, i : i + size : 2, j : j + size : 2] for i in range(3) for j in range(3)]
    x = np.max(taps, axis=0)
    for stage, count in enumerate((2, 3, 1), start=1):
        for block in range(1, count + 1):
            name = f"stage{stage}_block{block}"
            strides = 2 if block == 1 else 1
            if strides == 2:
                left = norm(f"{name}.conva_left", convolve(f"{name}.conva_left", x, 2, x.shape[1]))
                left = np.maximum(
                    norm(f"{name}.convb_left", convolve(f"{name}.convb_left", left, 1)), 0
                )
            else:
                left, x = x[:, ::2], x[:, 1::2]
            guide = np.einsum("bchw,mc->bmhw", x, state[f"{name}.masknet.weight"][:, :, 0, 0])
            mask = guide.argmax(axis=1)
            y = by_region(f"{name}.conva_right", x, mask)
            y = np.maximum(norm(f"{name}.conva_right", y), 0)
            y = norm(f"{name}.convb_right", convolve(f"{name}.convb_right", y, strides, y.shape[1]))
            y = by_region(f"{name}.convc_right", y, mask)
            y = np.maximum(norm(f"{name}.convc_right", y), 0)
            x = np.concatenate([left, y], axis=1)
    x = np.maximum(norm("conv_last", convolve("conv_last", x, 1)), 0).mean((2, 3))
    return x @ state["classifier.weight"].T + state["classifier.bias"]


def released_state(channels, rng):
    """A state dict of that network, by the shapes of its code."""
    state = {}

    def conv_norm(name, shape, bias=False):
        state[f"{name}.conv.weight"] = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        if bias:
            state[f"{name}.conv.bias"] = rng.normal(size=shape[0])
        norm(name, shape[0])

    def norm(name, count):
        for part in ("weight", "bias", "running_mean"):
            state[f"{name}.bn.{part}"] = rng.normal(size=count)
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 2, count)
        state[f"{name}.bn.num_batches_tracked"] = np.array(3)

    def dynamic(name, inputs, outputs):
        state[f"{name}.conv.weight"] = rng.normal(size=(outputs * inputs, 2)) / np.sqrt(inputs)
        state[f"{name}.conv.routing_fc.weight"] = rng.normal(size=(3 * 2, inputs))
        state[f"{name}.conv.routing_fc.bias"] = rng.normal(size=3 * 2)
        norm(name, outputs)

    stem, *stages, last = channels
    conv_norm("conv_first", (stem, 3, 3, 3), bias=True)
    before = stem
    for stage, (outputs, count) in enumerate(zip(stages, (2, 3, 1), strict=True), start=1):
        for block in range(1, count + 1):
            name = f"stage{stage}_block{block}"
            inputs = before if block == 1 else outputs // 2
            if block == 1:
                conv_norm(f"{name}.conva_left", (inputs, 1, 3, 3))
                conv_norm(f"{name}.convb_left", (inputs, inputs, 1, 1))
            state[f"{name}.masknet.weight"] = rng.normal(size=(3, inputs, 1, 1))
            dynamic(f"{name}.conva_right", inputs, outputs // 2)
            conv_norm(f"{name}.convb_right", (outputs // 2, 1, 3, 3))
            dynamic(f"{name}.convc_right", outputs // 2, outputs - inputs)
        before = outputs
    conv_norm("conv_last", (last, before, 1, 1), bias=True)
    state["classifier.weight"] = rng.normal(size=(5, last)) / np.sqrt(last)
    state["classifier.bias"] = rng.normal(size=5)
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


# In the second, main branches make more channels than shortcuts keep, as from 24 to 116.
@pytest.mark.parametrize("channels", [(8, 16, 32, 64, 40), (4, 20, 44, 88, 24)])
def test_the_released_network(channels):
    rng = np.random.default_rng(0)
    state = released_state(channels, rng)
    model = ShuffleNetV2(
        5,
        channels=channels,
        blocks=(2, 3, 1),
        conv=functools.partial(DRConv, regions=3, filter_generator="experts", experts=2),
        guide=BlockGuide(3),
        layout="megvii",
    )
    x = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    variables = import_torch(model, state)
    y = jax.jit(model.apply)(variables, x)
    assert_close(y, released_network(state, np.moveaxis(x, -1, 1)))
    del state["stage1_block1.masknet.weight"]
    with pytest.raises(ValueError, match="missing: stage1_block1.masknet.weight"):
        import_torch(model, state)


@pytest.mark.parametrize("generator", ["pooled", "mixture"])
def test_the_released_network_has_the_released_generator(generator):
    conv = functools.partial(DRConv, filter_generator=generator)
    model = ShuffleNetV2(width=0.5, conv=conv, guide=BlockGuide(8), layout="megvii")
    with pytest.raises(ValueError, match=f'must be "experts", .* got "{generator}"'):
        import_torch(model, {})


@pytest.mark.parametrize("options", [{"start": "grid"}, {"pool": 2}])
def test_the_released_network_has_the_released_guide(options):
    conv = functools.partial(DRConv, filter_generator="experts")
    guide = BlockGuide(8, **options)
    model = ShuffleNetV2(width=0.5, conv=conv, guide=guide, layout="megvii")
    with pytest.raises(ValueError, match=r"guide must be BlockGuide\(8\), .* got BlockGuide"):
        import_torch(model, {})


def test_an_unknown_layout():
    with pytest.raises(ValueError, match='layout must be "paper" or "megvii", got \'timm\''):
        ShuffleNetV2(layout="timm").init(KEY, jnp.zeros((1, 32, 32, 3)))


def test_a_network_with_drconv_has_no_public_weights():
    model = ShuffleNetV2(width=0.5, conv=functools.partial(DRConv, regions=2))
    with pytest.raises(ValueError, match="ShuffleNetV2 must be plain for its public weights"):
        import_torch(model, {})


@pytest.mark.parametrize(
    "detector",
    [
        MaskRCNN(ShuffleNetV2(width=0.5, blocks=(1, 1, 1)), 3, features=8, box_features=5),
        FasterRCNN(MobileNetV2(width=0.25), 3, features=8, box_features=5, rpn_depth=2),
    ],
    ids=["mask", "faster"],
)
def test_an_exported_detector_is_imported_as_it_was(detector):
    images, sizes = jnp.zeros((1, 32, 32, 3)), jnp.array([[32, 32]])
    shapes = jax.eval_shape(detector.init, jax.random.key(0), images, sizes)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    state = export_torch(detector, variables)
    # Of 8 channels and 7 rows and columns, as torchvision's regions are flattened.
    kernel = variables["params"]["box_head"]["fc6"]["kernel"]
    moved = kernel.reshape(7, 7, 8, 5).transpose(3, 2, 0, 1).reshape(5, -1)
    np.testing.assert_array_equal(state["roi_heads.box_head.fc6.weight"], moved)
    jax.tree.map(np.testing.assert_array_equal, variables, import_torch(detector, state))


def test_a_detector_with_drconv_has_no_counterpart():
    detector = FasterRCNN(ShuffleNetV2(width=0.5, conv=DRConv), 3)
    with pytest.raises(ValueError, match="must be plain"):
        export_torch(detector, {})
