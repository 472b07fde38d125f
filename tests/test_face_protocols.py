"""Protocols of face recognition: known numbers, and what defines them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.metrics import roc_auc_score, roc_curve

from experiments.face import protocols

DATA = pathlib.Path(__file__).parent / "data" / "face"
TARGETS = [0.1, 0.01, 0.001, 0.0001]


@pytest.fixture(scope="module")
def verified():
    """Known numbers, and the distances, truth and folds of their pairs."""
    golden = np.load(DATA / "verification.npz")
    return golden, golden["distances"], golden["same"], np.repeat(np.arange(10), 60)


def test_distances_of_embeddings_with_those_of_mirrored_images(verified):
    golden, distances, *_ = verified
    faces = protocols.templates(golden["embeddings"], golden["embeddings_flipped"])
    found = protocols.squared_distances(faces[::2], faces[1::2])
    np.testing.assert_allclose(found, distances[: len(found)], rtol=1e-6)


def test_accuracy_over_folds(verified):
    golden, *pairs = verified
    found = protocols.verification(*pairs)
    np.testing.assert_array_equal(protocols.THRESHOLDS, golden["thresholds"])
    np.testing.assert_array_equal(found.fold_threshold, golden["fold_threshold"])
    np.testing.assert_allclose(found.fold_accuracy, golden["fold_accuracy"], rtol=1e-12)
    np.testing.assert_allclose(found.accuracy, golden["accuracy"], rtol=1e-12)
    np.testing.assert_allclose(found.std, golden["accuracy_std"], rtol=1e-12)


def test_a_folds_own_pairs_have_no_part_in_its_threshold(verified):
    _, distances, same, folds = verified
    before = protocols.verification(distances, same, folds)
    other = protocols.verification(distances, np.where(folds == 3, ~same, same), folds)
    assert other.fold_threshold[3] == before.fold_threshold[3]
    np.testing.assert_allclose(other.fold_accuracy[3], 1 - before.fold_accuracy[3])


def test_validation_rates_over_folds(verified):
    golden, *pairs = verified
    for i, target in enumerate(TARGETS):
        found = protocols.validation_at_far(*pairs, target)
        thresholds = golden[f"val_thresholds/{target}"]
        np.testing.assert_allclose(found.fold_threshold, thresholds, rtol=1e-12)
        known = [golden[name][i] for name in ("val", "val_std", "val_far")]
        np.testing.assert_allclose([found.val, found.std, found.far], known, rtol=1e-12)


def assert_points(curve, golden, prefix=""):
    """Of the curve at the known targets."""
    for i, target in enumerate(TARGETS):
        known = [golden[prefix + name][i] for name in ("tar", "far", "tar_threshold")]
        np.testing.assert_allclose(protocols.tar_at_far(curve, target), known, rtol=1e-6)
        nearest = golden[prefix + "tar_nearest_far"][i]
        np.testing.assert_allclose(protocols.tar_nearest_far(curve, target).tar, nearest)
    np.testing.assert_allclose(protocols.area_under(curve), golden[prefix + "auc"], rtol=1e-12)


def test_the_curve_of_pairs(verified):
    golden, distances, same, _ = verified
    curve = protocols.roc(1 - distances / 2, same)
    assert_points(curve, golden)
    # The known points are those of distances below a threshold.
    at = np.searchsorted(-curve.thresholds, golden["thresholds"] / 2 - 1) - 1
    np.testing.assert_allclose(curve.tar[at[1:]], golden["tpr"][1:], rtol=1e-12)
    np.testing.assert_allclose(curve.far[at[1:]], golden["fpr"][1:], rtol=1e-12)


def test_the_curve_of_all_pairs(verified):
    golden = verified[0]
    faces = protocols.templates(jnp.asarray(golden["all_pairs/embeddings"]))
    ids = golden["all_pairs/ids"]
    curve = protocols.roc(*protocols.all_pairs(faces, ids, block=100))
    assert_points(curve, golden, "all_pairs/")


@given(
    truth=st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda t: 0 < sum(t) < len(t)),
    levels=st.integers(1, 20),
    seed=st.integers(0, 999),
    target=st.floats(0, 1),
)
@example(truth=[False, False, True, True], levels=4, seed=4, target=0.5)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_curves_are_scikit_learns(truth, levels, seed, target):
    same = np.array(truth)
    scores = np.random.default_rng(seed).integers(0, levels, len(same)) / levels
    curve = protocols.roc(scores, same)
    far, tar, thresholds = roc_curve(same, scores, drop_intermediate=False)
    for ours, theirs in zip(curve, (thresholds, tar, far), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_allclose(protocols.area_under(curve), roc_auc_score(same, scores))
    assert protocols.tar_at_far(curve, target).tar == tar[far <= target].max()
    far, tar, _ = roc_curve(same, scores)
    nearest = np.abs(far - target)
    assert protocols.tar_nearest_far(curve, target).tar == tar[nearest == nearest.min()][-1]


def test_equal_error_rate():
    same = np.array([True, True, False, True, False, False])
    assert protocols.equal_error_rate(protocols.roc(-np.arange(6.0), same)) == 1 / 3
    # All at once: the middle of the line from (0, 0) to (1, 1).
    assert protocols.equal_error_rate(protocols.roc(np.zeros(6), same)) == 0.5
    assert protocols.equal_error_rate(protocols.roc(same * 1.0, same)) == 0
    assert protocols.equal_error_rate(protocols.roc(~same * 1.0, same)) == 1


def test_pairs_that_tell_nothing_are_refused():
    with pytest.raises(ValueError, match="same must have pairs .* got 3 of 3"):
        protocols.roc(np.arange(3.0), np.ones(3, bool))
    with pytest.raises(ValueError, match=r"folds must be two or more, got \[0\]"):
        protocols.verification(np.arange(2.0), np.array([True, False]), np.zeros(2, int))


# Identification.


@pytest.fixture(scope="module")
def people():
    """Known numbers, and templates of people and distractors."""
    golden = np.load(DATA / "identification.npz")
    return golden, *(protocols.templates(golden[name]) for name in ("embeddings", "distractors"))


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_ranks_among_distractors(people, count):
    golden, faces, distractors = people
    probes, mates = faces[golden["pairs"]].swapaxes(0, 1)
    found = protocols.ranks(probes, mates, distractors, first=count, block=300, batch=100)
    name = f"mate_against_distractors/{count}"
    np.testing.assert_array_equal(found, golden[f"{name}/ranks"])
    np.testing.assert_allclose(protocols.cmc(found, [1, 5, 10]), golden[f"{name}/rates"])


def in_gallery(golden, faces, distractors):
    """Probes, mates, a gallery of a face of everyone and distractors, the mates' places in it."""
    gallery, probes, ids = golden["gallery"], golden["probes"], golden["ids"]
    where = np.argmax(ids[probes, None] == ids[gallery], axis=1)
    others = jnp.concatenate([faces[gallery], distractors])
    return faces[probes], faces[gallery[where]], others, jnp.asarray(where)


def test_ranks_in_a_gallery_with_distractors(people):
    probes, mates, others, where = in_gallery(*people)
    found = protocols.ranks(probes, mates, others, where=where)
    name = "gallery_with_distractors"
    np.testing.assert_array_equal(found, people[0][f"{name}/ranks"])
    np.testing.assert_allclose(protocols.cmc(found, [1, 5, 10]), people[0][f"{name}/rates"])


def test_ranks_over_a_mesh(people, mesh):
    probes, mates, others, where = in_gallery(*people)
    expected = people[0]["gallery_with_distractors/ranks"]
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="others must have .* 8 devices .* got 1060"):
            protocols.ranks(probes, mates, others, where=where, axes=("data",))
        # The rows that are added would be nearer than any mate.
        padded = jax.device_put(
            np.concatenate([others, probes[:4]]), NamedSharding(mesh, PartitionSpec("data"))
        )
        found = protocols.ranks(
            probes, mates, padded, where=where, first=len(others), axes=("data",), block=50
        )
    np.testing.assert_array_equal(found, expected)


def test_a_mate_does_not_count_though_it_be_rounded():
    faces = protocols.templates(np.random.default_rng(0).normal(size=(500, 37)))
    where = jnp.arange(500)
    assert (protocols.ranks(faces, faces, faces, where=where, block=64) == 1).all()


def test_a_million_distractors_take_a_blocks_memory():
    shapes = [jax.ShapeDtypeStruct((n, 512), jnp.float32) for n in (5000, 5000, 10**6 + 1)]
    program = protocols.ranks.lower(*shapes).compile()
    similarities = 1024 * 4096 * 4  # bytes of a block's
    assert program.memory_analysis().temp_size_in_bytes < 4 * similarities


def test_templates_have_length_1():
    faces = np.array([[3, 4], [0, 0]], np.float32)
    np.testing.assert_allclose(protocols.templates(faces), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    mirrored = protocols.templates(faces.astype(jnp.bfloat16), np.array([[0, -4], [1, 0]]))
    np.testing.assert_allclose(mirrored, [[1, 0], [1, 0]], rtol=1e-6)
    assert mirrored.dtype == jnp.float32
