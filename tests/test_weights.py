import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
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


# Ways to hold an array in memory, of which a file keeps none.
LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0),
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
    "reversed": lambda x: np.flip(np.flip(x).copy()),
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "a field of records": lambda x: np.rec.fromarrays([x, x], names="a,b")["a"],
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": lambda x: np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    "jax": lambda x: jnp.asarray(x),
}
HELD_EXACTLY = ["bool", "uint8", "int32", "float16", "float32", ml_dtypes.bfloat16]


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(data=st.data(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_what_is_saved_is_the_array_and_not_its_memory(data, layout, tmp_path_factory):
    shape = data.draw(arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))
    dtype = data.draw(st.sampled_from(HELD_EXACTLY))
    x = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    try:
        saved = LAYOUTS[layout](x)
    except ValueError:  # numpy has no such view of this array
        hypothesis.reject()
    path = tmp_path_factory.getbasetemp() / "w"
    save_weights(path, {"w": saved, "after": x})
    loaded = load_weights(path, {"w": saved, "after": x})
    expected = np.asarray(saved).astype(dtype)
    np.testing.assert_array_equal(loaded["w"], expected)
    assert loaded["w"].dtype == dtype and loaded["w"].shape == shape
    np.testing.assert_array_equal(loaded["after"], x)


def test_arrays_without_axes_and_on_several_devices(tmp_path, mesh):
    x = jnp.arange(32.0).reshape(8, 4)
    variables = {
        "scalar": np.float32(3),
        "0-d": np.full((), 4, ">f4"),
        "split": jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))),
        "whole": jax.device_put(x, NamedSharding(mesh, PartitionSpec())),
    }
    save_weights(tmp_path / "w", variables)
    loaded = load_weights(tmp_path / "w", variables)
    assert {name: value.shape for name, value in loaded.items()} == {
        "scalar": (),
        "0-d": (),
        "split": (8, 4),
        "whole": (8, 4),
    }
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.parametrize("dtype", ["int64", "float64", "uint64"])
def test_numbers_that_jax_would_cut_are_refused(tmp_path, dtype):
    variables = {"w": np.array([2**40 + 1], dtype)}
    save_weights(tmp_path / "w", variables)
    with pytest.raises(ValueError, match=f"w in .* is {dtype}, .*jax_enable_x64"):
        load_weights(tmp_path / "w", variables)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(load_weights(tmp_path / "w", variables)["w"], variables["w"])


def test_weights_in_any_layout_start_a_network():
    ours = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros((3,), jnp.float32)}
    x = np.arange(6, dtype=">f8").reshape(3, 2).T
    started, _ = load_matching(ours, {"a": x, "b": jnp.arange(3.0)})
    np.testing.assert_array_equal(started["a"].astype(jnp.float32), x)
    np.testing.assert_array_equal(started["b"], np.arange(3.0))


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
    with pytest.raises(TypeError, match="w is a shape without values"):
        save_weights(tmp_path / "w", {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    with pytest.raises(TypeError, match="w is key<fry>"):
        save_weights(tmp_path / "w", {"w": jax.random.key(0)})
    with pytest.raises(ValueError, match='can be named "__metadata__"'):
        save_weights(tmp_path / "w", {"__metadata__": np.zeros(3)})
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
    with pytest.raises(ValueError, match="none of its 1 does"):
        load_matching(drawn(shapes()), {"w": np.zeros(3)})
    with pytest.raises(ValueError, match=r"w is \(3,\) in the source and \(2,\) in the network"):
        load_matching({"w": np.zeros(2)}, {"w": np.zeros(3)})
    with pytest.raises(ValueError, match="source must hold arrays, got none"):
        load_matching({"w": np.zeros(2)}, {})


def test_arguments_in_another_order(tmp_path):
    variables, model = drawn(shapes()), TINY["shufflenet_v2"]()
    for arguments, wrong, kind in (
        ((model, variables), "variables", "ShuffleNetV2"),
        ((variables, model), "source", "ShuffleNetV2"),
        (("model.safetensors", variables), "variables", "str"),
    ):
        message = f"{wrong} must be arrays in nested dictionaries, .*; {wrong} is {kind}"
        with pytest.raises(TypeError, match=message):
            load_matching(*arguments)
    save_weights(tmp_path / "w", variables)
    with pytest.raises(TypeError, match="like must be arrays .*; like is ShuffleNetV2"):
        load_weights(tmp_path / "w", model)
    with pytest.raises(TypeError, match="variables must be arrays .*; variables is ShuffleNetV2"):
        save_weights(tmp_path / "w", model)
