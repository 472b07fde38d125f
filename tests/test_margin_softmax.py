"""Margin softmax: known values and gradients, and one device against many."""

import functools
import json
import pathlib
import re

import jax
import jax.export
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from drconv_jax.margin_softmax import Margin, arcface, combined, cosface, margin_softmax

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "face" / "margins.npz")
CASES = {
    "arcface": arcface(),
    "arcface_easy": arcface(easy=True),
    "arcface_without_fallback": Margin(m2=0.5),
    "cosface_0.35": cosface(),
    "cosface_0.4": cosface(margin=0.4),
    "am_softmax_s30": cosface(scale=30.0),
    "combined": combined(),
    "normalised_softmax": Margin(),
}
KEY = jax.random.key(0)


def golden_arrays():
    labels = GOLDEN["labels"].astype(np.int32)
    return jnp.asarray(GOLDEN["embeddings"]), jnp.asarray(GOLDEN["weights"]), jnp.asarray(labels)


def draw(batch, classes, features=16, seed=0):
    """Embeddings, centres, and labels of which some are -1."""
    rng = np.random.default_rng(seed)
    embeddings, centres = (rng.normal(size=(n, features)) for n in (batch, classes))
    labels = rng.integers(-1, classes, batch)
    return (
        jnp.asarray(embeddings, jnp.float32),
        jnp.asarray(centres, jnp.float32),
        jnp.asarray(labels, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("margin", "num_classes", "axes", "sample"))
def with_gradients(embeddings, centres, labels, margin, **options):
    """What `margin_softmax` gives, and the gradients of embeddings and centres."""

    def loss(embeddings, centres):
        found = margin_softmax(embeddings, centres, labels, margin, **options)
        return found.loss, found

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(embeddings, centres)


def assert_same(ours, expected, rtol=1e-5):
    """Trees of numbers, each within a part of the largest of its array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_known_ones(name):
    embeddings, centres, labels = golden_arrays()
    (loss, found), gradients = with_gradients(embeddings, centres, labels, CASES[name])
    known = [GOLDEN[f"{name}/grad_{of}"] for of in ("embeddings", "weights")]
    assert_same((loss, *gradients), (GOLDEN[f"{name}/loss"], *known), rtol=3e-6)

    counts = np.flatnonzero(labels >= 0)
    cosines, own = GOLDEN["cosines"][counts], (np.arange(len(counts)), labels[counts])
    np.testing.assert_allclose(found.cosine, cosines[own].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, (cosines.argmax(1) == labels[counts]).mean())
    logits = CASES[name](jnp.asarray(cosines[own]))
    np.testing.assert_allclose(logits, GOLDEN[f"{name}/logits"][counts][own], atol=2e-5)


def test_cases_are_those_of_the_known_numbers():
    config = json.loads(str(GOLDEN["config"]))["cases"]
    assert config.keys() == CASES.keys()
    for name, margin in CASES.items():
        wide = {"easy_margin": margin.wide == "easy", "fallback": margin.wide == "fallback"}
        numbers = {"s": margin.scale, "m1": margin.m1, "m2": margin.m2, "m3": margin.m3}
        assert config[name] == numbers | wide


def test_straight_through_leaves_the_margin_out_of_the_derivative():
    embeddings, centres, labels = golden_arrays()
    margin = Margin(m2=0.5, straight_through=True)
    (loss, _), gradients = with_gradients(embeddings, centres, labels, margin)
    name = "arcface_straight_through"
    known = [GOLDEN[f"{name}/grad_{of}"] for of in ("embeddings", "weights")]
    expected = (GOLDEN["arcface_without_fallback/loss"], *known)
    assert_same((loss, *gradients), expected, rtol=3e-6)


@pytest.mark.parametrize("margin", [Margin(m1=1.35), Margin(10.0, 1.2, 0.3, 0.1), arcface()])
def test_a_margin_is_its_formula_and_so_is_its_derivative(margin):
    cosines = np.linspace(-0.7, 0.99, 50)

    def formula(cosines):
        return margin.scale * (np.cos(margin.m1 * np.arccos(cosines) + margin.m2) - margin.m3)

    logits, derivative = jax.jvp(margin, [jnp.asarray(cosines, jnp.float32)], [jnp.ones(50)])
    np.testing.assert_allclose(logits, formula(cosines), rtol=1e-5, atol=1e-4)
    slopes = (formula(cosines + 1e-6) - formula(cosines - 1e-6)) / 2e-6
    np.testing.assert_allclose(derivative, slopes, rtol=1e-4)


@pytest.mark.parametrize("margin", [arcface(), Margin(m2=0.5), cosface(), Margin(m1=2.0, m3=0.1)])
def test_no_gradient_is_infinite_where_embeddings_lie_on_centres(margin):
    _, centres, _ = draw(0, 6)
    embeddings = jnp.concatenate([centres, -centres])
    labels = jnp.tile(jnp.arange(6), 2)
    _, gradients = with_gradients(embeddings, centres, labels, margin)
    # A logit changes by no more than scale * m1 a radian, and a loss by that of two logits.
    for gradient, vectors in zip(gradients, (embeddings, centres), strict=True):
        size = np.linalg.norm(gradient, axis=1) * np.linalg.norm(vectors, axis=1)
        assert size.max() <= margin.scale * (1 + margin.m1)
    slope = jax.vmap(jax.grad(margin))(jnp.array([-1.0, 1.0]))
    assert np.isfinite(slope).all()


def test_vectors_of_zeros_have_finite_gradients():
    embeddings, centres, labels = draw(4, 5)
    embeddings, centres = embeddings.at[1].set(0), centres.at[2].set(0)
    found = with_gradients(embeddings, centres, labels, arcface())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_strength_scales_the_margin():
    embeddings, centres, labels = draw(12, 7)

    def found(strength, margin):
        return with_gradients(embeddings, centres, labels, margin, strength=strength)

    for whole, half in (
        (arcface(), arcface(margin=0.25)),
        (combined(m1=1.4, m2=0.2, m3=0.1), combined(m1=1.2, m2=0.1, m3=0.05)),
    ):
        assert_same(found(0.5, whole), found(1.0, half))
        assert_same(found(0.0, whole), found(1.0, Margin()))


def test_rows_labelled_minus_1_do_not_count():
    embeddings, centres, _ = draw(6, 7)
    labels, some = jnp.array([-1, 3, 6, -1, 0, 3]), jnp.array([1, 2, 4, 5])
    found, (of_embeddings, of_centres) = with_gradients(embeddings, centres, labels, cosface())
    expected, (of_some, of_their_centres) = with_gradients(
        embeddings[some], centres, labels[some], cosface()
    )
    assert_same((found, of_embeddings[some], of_centres), (expected, of_some, of_their_centres))
    assert not np.asarray(of_embeddings)[[0, 3]].any()


def test_without_any_label_everything_is_zero():
    embeddings, centres, labels = draw(4, 5)
    found = with_gradients(embeddings, centres, jnp.full_like(labels, -1), arcface())
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found))


def test_bfloat16_is_computed_in_float32():
    embeddings, centres, labels = draw(12, 7)
    narrow = [a.astype(jnp.bfloat16) for a in (embeddings, centres)]
    wide = [a.astype(jnp.float32) for a in narrow]
    found, gradients = with_gradients(*narrow, labels, arcface())
    expected, wide_gradients = with_gradients(*wide, labels, arcface())
    assert_same(found, expected, rtol=0)
    for a, b in zip(gradients, wide_gradients, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_transformations_of_jax():
    embeddings, centres, labels = draw(6, 5)
    margin = combined(scale=4.0, m1=1.1)

    @jax.jit
    def loss(embeddings, centres):
        return margin_softmax(embeddings, centres, labels, margin).loss

    # Forward and reverse mode, each against finite differences.
    jax.test_util.check_grads(loss, (embeddings, centres), order=1, atol=2e-3, rtol=2e-3, eps=1e-2)
    expected = jax.jit(jax.grad(loss, (0, 1)))(embeddings, centres)
    assert_same(jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(embeddings, centres), expected)
    pairs = [jnp.stack([a, a[::-1]]) for a in (embeddings, centres)]
    both = jax.jit(jax.vmap(loss))(*pairs)
    assert_same(both, jnp.stack([loss(*(a[i] for a in pairs)) for i in range(2)]))
    exported = jax.export.export(loss)(embeddings, centres)
    assert_same(exported.call(embeddings, centres), loss(embeddings, centres))


# Over a mesh.


def mesh_of(devices, axis_type=AxisType.Auto):
    """Two axes, as meshes have whose batch and parameters are parted differently."""
    shape = (devices // 2, 2) if devices > 1 else (1, 1)
    devices = np.array(jax.devices()[:devices]).reshape(shape)
    return Mesh(devices, ("copy", "part"), axis_types=(axis_type,) * 2)


AXES = ("copy", "part")


def over(mesh, margin, embeddings, centres, labels, **options):
    """`with_gradients`, compiled, over the mesh; centres are padded with ones."""
    padding = -centres.shape[0] % mesh.size
    padded = jnp.concatenate([centres, jnp.ones((padding, centres.shape[1]))])
    options.setdefault("num_classes", centres.shape[0])
    parted = NamedSharding(mesh, PartitionSpec(AXES))
    placed = jax.device_put((embeddings, padded, labels), parted)
    with jax.set_mesh(mesh):
        found, (of_embeddings, of_centres) = with_gradients(*placed, margin, axes=AXES, **options)
    assert of_centres.sharding.is_equivalent_to(parted, 2)
    assert of_embeddings.sharding.is_equivalent_to(parted, 2)
    found, of_embeddings, of_centres = jax.device_get((found, of_embeddings, of_centres))
    assert not of_centres[centres.shape[0] :].any()
    return found, (of_embeddings, of_centres[: centres.shape[0]])


@given(
    devices=st.sampled_from([1, 2, 4, 8]),
    axis_type=st.sampled_from([AxisType.Auto, AxisType.Explicit]),
    classes=st.integers(1, 40),
    rows=st.integers(1, 3),
    margin=st.sampled_from([arcface(), cosface(), combined(m1=1.1)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_many_devices_find_what_one_finds(devices, axis_type, classes, rows, margin, seed):
    arrays = draw(rows * devices, classes, seed=seed)
    found = over(mesh_of(devices, axis_type), margin, *arrays)
    assert_same(found, with_gradients(*arrays, margin))


def test_within_a_shard_map_arguments_are_a_devices_own(mesh):
    arrays = draw(16, 24)
    parted, whole = PartitionSpec("data"), PartitionSpec()
    own = functools.partial(margin_softmax, margin=cosface(), axes=("data",), num_classes=21)
    run = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(parted,) * 3, out_specs=whole))
    placed = jax.device_put(arrays, NamedSharding(mesh, parted))
    assert_same(run(*placed), margin_softmax(*arrays, cosface(), num_classes=21))


def test_axes_that_the_mesh_lacks_are_ignored():
    arrays = draw(6, 5)  # which eight devices would not divide
    expected = with_gradients(*arrays, cosface())
    with jax.set_mesh(mesh_of(8)):
        assert_same(with_gradients(*arrays, cosface(), axes=("data",)), expected)


def compiled(mesh, batch, classes, features):
    """The program for loss and gradients."""
    parted = NamedSharding(mesh, PartitionSpec(AXES))
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=parted)
        for shape, dtype in (
            ((batch, features), jnp.float32),
            ((classes, features), jnp.float32),
            ((batch,), jnp.int32),
        )
    ]
    with jax.set_mesh(mesh):
        return with_gradients.lower(*shapes, arcface(), axes=AXES).compile()


def test_no_device_holds_more_than_its_share_of_centres_and_logits(axis_type):
    batch, classes, features = 64, 2048, 16
    program = compiled(mesh_of(8, axis_type), batch, classes, features)
    text = program.as_text()
    share = batch * classes // 8
    sizes = [
        np.prod([int(length) for length in shape.split(",")])
        for shape in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)
    ]
    # All centres are twice a device's share of the logits.
    assert max(sizes) == share and classes * features == 2 * share
    gathered = re.findall(r"= \(?\w+\[([\d,]+)\].* all-gather\(", text)
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in gathered) == (
        batch * features
    )
    # Nor does it hold more copies of them than a single device does of all.
    alone = compiled(mesh_of(1), batch, classes, features).memory_analysis()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < alone.temp_size_in_bytes / 8 + 4 * batch * features * 4
    assert memory.temp_size_in_bytes < 2.5 * share * 4


# Sampled negatives.


def used(of_centres):
    """Which centres have a gradient."""
    return np.flatnonzero(np.asarray(of_centres).any(axis=1))


def test_a_sample_has_all_classes_of_the_batch_and_is_exact_among_its_own():
    embeddings, centres, labels = draw(8, 64, seed=2)
    margin = arcface(scale=8.0)  # at which no share of the softmax vanishes
    options = dict(sample=0.25, key=KEY)
    found, (of_embeddings, of_centres) = with_gradients(
        embeddings, centres, labels, margin, **options
    )
    chosen = used(of_centres)
    assert len(chosen) == 16 and set(np.unique(labels[labels >= 0])) <= set(chosen)
    among = jnp.where(labels >= 0, jnp.searchsorted(chosen, labels), -1)
    expected, (of_same, of_chosen) = with_gradients(embeddings, centres[chosen], among, margin)
    assert_same((found, of_embeddings, of_centres[chosen]), (expected, of_same, of_chosen))
    options["key"] = jax.random.key(1)
    _, (_, others) = with_gradients(embeddings, centres, labels, margin, **options)
    assert set(used(others)) != set(chosen)


def test_every_device_samples_its_own_centres():
    embeddings, centres, labels = draw(8, 504, seed=3)
    options = dict(sample=0.25, key=KEY)
    found, (of_embeddings, of_centres) = over(
        mesh_of(8), arcface(scale=8.0), embeddings, centres, labels, **options
    )
    chosen = used(of_centres)
    assert set(np.unique(labels[labels >= 0])) <= set(chosen)
    parts = [set(chosen[chosen // 63 == part] % 63) for part in range(8)]
    assert [len(part) for part in parts] == [16] * 8
    assert len({frozenset(part) for part in parts}) == 8
    among = jnp.where(labels >= 0, jnp.searchsorted(chosen, labels), -1)
    expected, (of_same, of_chosen) = with_gradients(
        embeddings, centres[chosen], among, arcface(scale=8.0)
    )
    assert_same((found, of_embeddings, of_centres[chosen]), (expected, of_same, of_chosen))


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_a_sample_of_all_is_exact(share):
    # A share of 0.01 would be one centre, but 30 rows may be of 20 classes.
    arrays = draw(30, 20)
    found = with_gradients(*arrays, arcface(), sample=share, key=KEY)
    assert_same(found, with_gradients(*arrays, arcface()))


def test_devices_whose_centres_are_padding_alone():
    embeddings, centres, labels = draw(8, 96)
    for options in ({}, dict(sample=0.75, key=KEY)):
        found, (_, of_centres) = over(
            mesh_of(8), cosface(), embeddings, centres, labels % 9, num_classes=9, **options
        )
        expected, (_, of_nine) = with_gradients(embeddings, centres[:9], labels % 9, cosface())
        assert_same((found, of_centres[:9]), (expected, of_nine))
        assert not of_centres[9:].any()


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(num_classes=6), ValueError, "num_classes must be at most the number of centres, 5"),
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(num_classes=2.0), TypeError, "num_classes must be an integer, got 2.0"),
        (dict(sample=0.0, key=KEY), ValueError, "sample must be None, or above 0 .* got 0.0"),
        (dict(sample=1.5, key=KEY), ValueError, "sample must be None, or above 0 .* got 1.5"),
        (dict(sample=0.5), ValueError, "key must be given where sample is"),
        (dict(precision="low"), ValueError, "precision must be .* got 'low'"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        margin_softmax(*draw(8, 5), cosface(), **change)


def test_rows_that_devices_do_not_divide_are_named():
    with jax.set_mesh(mesh_of(8)):
        with pytest.raises(ValueError, match="centres must have .* 8 devices .* got 5: .*num_cl"):
            margin_softmax(*draw(8, 5), cosface(), axes=AXES)
        with pytest.raises(ValueError, match="embeddings must have .* got 6: .*label is -1"):
            margin_softmax(*draw(6, 8), cosface(), axes=AXES)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(scale=0), "scale must be above 0, got 0"),
        (dict(m1=-1), "m1 must be above 0, got -1"),
        (dict(wide="soft"), "wide must be .* got 'soft'"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_margins_that_are_none_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Margin(**change)
