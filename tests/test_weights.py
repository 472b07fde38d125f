import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import DR, TINY

from drconv_jax.weights import load_matching, load_weights, save_weights

X = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def shapes(**fields):
    return jax.eval_shape(TINY["shufflenet_v2"](**fields).init, jax.random.key(0), X)


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_saved_is_loaded(tmp_path, dtype):
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn(shapes(conv=DR)))
    save_weights(tmp_path / "w", variables)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    loaded = load_weights(tmp_path / "w", like)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(loaded))
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_wrong_file_is_refused(tmp_path):
    like = shapes()
    path = tmp_path / "w"
    save_weights(path, drawn(like))
    with pytest.raises(ValueError, match="weights of another model.*mixing_kernel"):
        load_weights(path, shapes(conv=DR))
    with pytest.raises(ValueError, match="weights of another model.*bfloat16"):
        load_weights(
            path, jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), like)
        )
    whole = path.read_bytes()
    for content in (b"", b"\x80\x04pickle", whole[:-7], whole[:40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file, or not a whole one"):
            load_weights(path, like)


def test_only_arrays_are_saved(tmp_path):
    with pytest.raises(TypeError, match="params/x is str"):
        save_weights(tmp_path / "w", {"params": {"x": "text"}})
    with pytest.raises(ValueError, match="at least one array"):
        save_weights(tmp_path / "w", {})
    assert not list(tmp_path.iterdir())


def test_a_dr_network_starts_from_its_plain_twin():
    ours, plain = drawn(shapes(conv=DR), 1), drawn(shapes(), 2)
    started, report = load_matching(ours, plain)
    stem = "params/stem_conv/kernel"
    assert stem in report.loaded and "batch_stats/head_norm/mean" in report.loaded
    np.testing.assert_array_equal(
        started["params"]["stem_conv"]["kernel"], plain["params"]["stem_conv"]["kernel"]
    )
    block, initial = (tree["params"]["stage2_block0"]["conv1"] for tree in (started, ours))
    jax.tree.map(np.testing.assert_array_equal, block, initial)
    assert not any("filters" in name or "guide" in name for name in report.loaded)
    assert report.unused == tuple(
        f"params/stage{s}_block0/conv{i}/kernel" for s in (2, 3, 4) for i in (1, 2)
    )
    assert "params/stage*_block*/conv*/kernel (6)" in str(report)


def test_nothing_that_fits_is_an_error():
    with pytest.raises(ValueError, match="none of its 1 fits"):
        load_matching(drawn(shapes()), {"w": np.zeros(3)})
