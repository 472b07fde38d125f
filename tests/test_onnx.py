import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.fold import fold_batch_norm
from drconv_jax.models import BlockGuide, ShuffleNetV2
from drconv_jax.onnx import export_onnx

pytest.importorskip("jax2onnx", reason="no jax2onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime")

pytestmark = [
    pytest.mark.usefixtures("compiled_quickly"),
    pytest.mark.filterwarnings("ignore"),  # other packages' own
]

DR = functools.partial(DRConv, regions=3)
NETWORKS = {
    "shufflenet v2": ShuffleNetV2(num_classes=5, width=0.1, blocks=(1, 2, 1)),
    "dr shufflenet v2": ShuffleNetV2(
        num_classes=5, width=0.1, blocks=(1, 1, 1), conv=DR, guide=BlockGuide(3)
    ),
}


def assert_file_is(path, expected, x):
    """One file, two batch sizes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.name == "inputs" and given.shape == ["batch", *x.shape[1:]]
    for batch in (1, 3):
        (y,) = session.run(["outputs"], {"inputs": np.asarray(x[:batch])})
        tolerance = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(y, expected[:batch], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_onnxruntime(name, tmp_path):
    model = NETWORKS[name]
    x = jax.random.normal(jax.random.key(0), (3, 64, 64, 3))
    variables = jax.tree.map(  # so that norms have something to fold
        lambda leaf: leaf + 0.1 * jnp.abs(jnp.sin(jnp.arange(leaf.size))).reshape(leaf.shape),
        jax.jit(model.init)(jax.random.key(1), x),
    )
    apply, folded = fold_batch_norm(model, variables, x)
    export_onnx(tmp_path / "model.onnx", apply, folded, x.shape[1:])
    assert_file_is(tmp_path / "model.onnx", jax.jit(model.apply)(variables, x), x)


@pytest.mark.parametrize("generator", ["mixture", "pooled"])
@pytest.mark.parametrize("window", [dict(strides=2, feature_group_count=2), dict(padding="VALID")])
def test_a_layer_with_a_larger_kernel(generator, window, tmp_path):
    layer = DRConv(6, (3, 3), regions=4, filter_generator=generator, **window)
    x = jax.random.normal(jax.random.key(0), (3, 9, 8, 4))
    variables = layer.init(jax.random.key(1), x)
    export_onnx(tmp_path / "layer.onnx", layer.apply, variables, x.shape[1:])
    assert_file_is(tmp_path / "layer.onnx", layer.apply(variables, x), x)


def test_uint8_images(tmp_path):
    layer = nn.Conv(3, (3, 3))
    x = jax.random.randint(jax.random.key(0), (3, 6, 6, 3), 0, 255).astype(jnp.uint8)
    variables = layer.init(jax.random.key(1), x.astype(jnp.float32))
    apply = lambda v, x: layer.apply(v, x.astype(jnp.float32))  # noqa: E731
    export_onnx(tmp_path / "layer.onnx", apply, variables, (6, 6, 3), dtype=jnp.uint8)
    assert_file_is(tmp_path / "layer.onnx", apply(variables, x), x)


def test_what_cannot_be_converted_leaves_no_file(tmp_path):
    def apply(variables, x):
        return jax.lax.while_loop(lambda x: x.sum() < variables, lambda x: jnp.linalg.inv(x), x)

    with pytest.raises(ValueError, match="jax2onnx cannot convert the network"):
        export_onnx(tmp_path / "x.onnx", apply, jnp.ones(()), (4, 4))
    assert list(tmp_path.iterdir()) == []
