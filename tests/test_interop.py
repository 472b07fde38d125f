import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.interop import import_torch

DATA = pathlib.Path(__file__).parent / "data"


def load(name):
    """The layer, its golden numbers, weights and gradients under PyTorch's names."""
    golden = dict(np.load(DATA / name))
    config = [int(value) for value in golden["config"]]
    if name.startswith("pooled"):
        *_, out, kernel, regions, stride, padding, dilation = config
        extra = dict(use_bias=False, kernel_dilation=dilation)
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
    with pytest.raises(TypeError, match="one of DRConv, got Dense"):
        import_torch(nn.Dense(3), {})


def test_a_flat_weight_where_the_channels_are_told():
    layer, _, params, _ = load("pooled_0.npz")
    params["conv_kernel.1.weight"] = params["conv_kernel.1.weight"].reshape(-1)
    with pytest.raises(ValueError, match=r"misshapen: conv_kernel.1.weight is .*, any, 1, 1\)"):
        import_torch(layer, params)
