import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.interop import import_torch
from drconv_jax.models import MobileFaceNet, MobileNetV1, MobileNetV2, ShuffleNetV2

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


def test_a_network_with_drconv_has_no_public_weights():
    model = ShuffleNetV2(width=0.5, conv=functools.partial(DRConv, regions=2))
    with pytest.raises(ValueError, match="ShuffleNetV2 must be plain for its public weights"):
        import_torch(model, {})
