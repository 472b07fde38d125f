import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from drconv_jax import DRConv
from drconv_jax.fold import fold_batch_norm
from drconv_jax.models import BlockGuide, ShuffleNetV2
from drconv_jax.nnx import DRConv as NnxDRConv
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


def test_a_layer_of_nnx(tmp_path):
    """Outside flax.linen a layer must say itself that it is made of products and a select."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 4, 4))

    def layer(**fields):
        graph, state = nnx.split(NnxDRConv(4, 6, (3, 3), regions=2, rngs=nnx.Rngs(0), **fields))
        return lambda state, x: nnx.merge(graph, state)(x), state

    apply, state = layer(implementation="select")
    export_onnx(tmp_path / "layer.onnx", apply, state, x.shape[1:])
    assert_file_is(tmp_path / "layer.onnx", apply(state, x), x)
    with pytest.raises(ValueError, match='outside flax.linen give implementation="select"'):
        export_onnx(tmp_path / "other.onnx", *layer(), x.shape[1:])


def test_uint8_images(tmp_path):
    layer = nn.Conv(3, (3, 3))
    x = jax.random.randint(jax.random.key(0), (3, 6, 6, 3), 0, 255).astype(jnp.uint8)
    variables = layer.init(jax.random.key(1), x.astype(jnp.float32))
    apply = lambda v, x: layer.apply(v, x.astype(jnp.float32))  # noqa: E731
    export_onnx(tmp_path / "layer.onnx", apply, variables, (6, 6, 3), dtype=jnp.uint8)
    assert_file_is(tmp_path / "layer.onnx", apply(variables, x), x)


def dr_block(**fields):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            y = DRConv(4, (3, 3), regions=3, **fields)(x)
            return nn.max_pool(y, (3, 3), padding="SAME"), None

    return Block


class Repeated(nn.Module):
    """The block of DRConv and max pooling computed again in training, or in a loop."""

    how: str

    @nn.compact
    def __call__(self, x):
        block = dr_block()
        if self.how == "remat":
            return nn.remat(block)()(x)[0]
        if self.how == "scan of remat":
            block = nn.remat(block)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan()(x, None)[0]


@pytest.mark.parametrize("how", ["remat", "scan", "scan of remat"])
def test_layers_in_transformations(how, tmp_path):
    x = jax.random.normal(jax.random.key(0), (3, 6, 5, 4))
    variables = jax.jit(Repeated(how).init)(jax.random.key(1), x)
    export_onnx(tmp_path / "layer.onnx", Repeated(how).apply, variables, x.shape[1:])
    assert_file_is(tmp_path / "layer.onnx", jax.jit(Repeated(how).apply)(variables, x), x)


def pooled(x):
    return nn.max_pool(x, (2, 2), padding="SAME")


@jax.custom_vjp
def pooled_with_a_rule(x):
    return pooled(x)


pooled_with_a_rule.defvjp(lambda x: (pooled(x), None), lambda _, g: (g,))


@pytest.mark.parametrize(
    "network",
    [
        lambda x: jax.lax.cond(x.sum() > 0, pooled, lambda x: -pooled(x), x),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, x: pooled(x) + i.astype(x.dtype), x),
        lambda x: jax.lax.while_loop(lambda c: c.mean() < 9, lambda c: pooled(c) + x + 1, x),
        lambda x: jax.lax.map(lambda row: row * 2, x),  # a loop over the batch
        pooled_with_a_rule,
        jax.checkpoint(lambda x: jax.nn.relu(pooled(x))),
        lambda x: jax.lax.pad(x, 2.0, [(0, 0, 0), (-1, 2, 0), (1, -2, 0), (-1, -1, 0)]),
    ],
    ids=["cond", "fori", "while", "map", "custom_vjp", "checkpoint", "negative padding"],
)
def test_control_flow(network, tmp_path):
    x = jnp.abs(jax.random.normal(jax.random.key(0), (3, 6, 5, 4)))
    export_onnx(tmp_path / "f.onnx", lambda _, x: network(x), None, x.shape[1:])
    session = onnxruntime.InferenceSession(tmp_path / "f.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (y,) = session.run(["outputs"], {"inputs": np.asarray(x[:batch])})
        np.testing.assert_allclose(y, network(x[:batch]), rtol=1e-6)


def test_float16(tmp_path):
    layer = DRConv(6, (3, 3), regions=4, dtype=jnp.float16)
    x = jax.random.normal(jax.random.key(0), (3, 9, 8, 4), jnp.float16)
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    export_onnx(tmp_path / "x.onnx", layer.apply, variables, x.shape[1:], dtype=jnp.float16)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(["outputs"], {"inputs": np.asarray(x)})
    assert y.dtype == np.float16
    expected = np.asarray(jax.jit(layer.apply)(variables, x), np.float32)
    np.testing.assert_allclose(y, expected, atol=2e-3 * np.abs(expected).max())


def in_bfloat16(_, x):
    layer = DRConv(6, (3, 3), regions=4, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(layer.init, jax.random.key(1), jnp.ones((1, 4, 4, 4)))
    return layer.apply(jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes), x)


@pytest.mark.parametrize(
    "apply,message",
    [
        (lambda _, x: jnp.linalg.inv(x), 'cannot convert the operation "lu": .*; leave it out'),
        (in_bfloat16, "ONNX file would not run: .*Conv.*; compute in float32"),
        (lambda _, x: jnp.fft.fft(x).real, "ONNX file would not run: .*complex64"),
        (lambda _, x: jax.lax.map(pooled, x[:, None]), 'cannot convert the operation "scan"'),
        (lambda _, x: x if x.shape[0] > 2 else x + 1, "for any batch size, but the network is not"),
        (lambda _, x: (x, x + 1), "apply must return one array, got 2"),
    ],
    ids=["inverse", "bfloat16", "complex", "map", "batch", "two"],
)
def test_what_cannot_be_converted_leaves_no_file(apply, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(tmp_path / "x.onnx", apply, None, (4, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_changed_and_nothing_is_said(tmp_path, caplog, capfd):
    layer = DRConv(6, (3, 3), regions=4)
    variables = layer.init(jax.random.key(1), jnp.ones((1, 9, 8, 4)))
    export_onnx(tmp_path / "layer.onnx", layer.apply, variables, (9, 8, 4))
    np.testing.assert_array_equal(jnp.cumsum(jnp.ones(3), 0), [1, 2, 3])  # jax2onnx puts its own
    assert logging.getLogger("onnx_ir.serde").getEffectiveLevel() == logging.WARNING
    assert not caplog.records and capfd.readouterr() == ("", "")
