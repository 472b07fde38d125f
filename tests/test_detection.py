"""Detection's functions, held to torchvision's numbers and to slow definitions in numpy."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from drconv_jax.detection import (
    Anchors,
    BoxCoder,
    levels_of,
    mask_targets,
    mask_targets_of_crops,
    match,
    multilevel_roi_align,
    nms,
    paste_masks,
    roi_align,
    sample,
)
from drconv_jax.detection.boxes import area, clip, have_sides, iou
from drconv_jax.detection.matching import BACKGROUND, BETWEEN

DATA = pathlib.Path(__file__).parent / "data" / "detection"


def golden(name):
    """torchvision's numbers, and how they were made."""
    arrays = dict(np.load(DATA / f"{name}.npz"))
    return arrays, json.loads(str(arrays["config"]))


def assert_near(ours, theirs, tolerance):
    """Within a part of the largest number."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def with_gradient(function, x, cotangent):
    y, vjp = jax.vjp(function, x)
    return y, vjp(cotangent)[0]


def draw_boxes(rng, n, size=40, whole=False):
    corners = rng.uniform(0, size, (n, 2))
    sides = np.exp(rng.uniform(0, np.log(size / 2), (n, 2)))
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    return np.round(boxes) if whole else boxes


# Boxes.


def test_overlaps_and_areas():
    g, _ = golden("boxes")
    assert_near(iou(jnp.asarray(g["a"]), jnp.asarray(g["b"])), g["box_iou"], 1e-7)
    assert_near(area(jnp.asarray(g["a"])), g["box_area"], 1e-7)
    degenerate = jnp.asarray(g["degenerate"])
    expected = np.nan_to_num(g["degenerate_iou"])  # 0 / 0 is no overlap
    np.testing.assert_array_equal(iou(degenerate, degenerate), expected)


@pytest.mark.parametrize("weights", ["unit", "roi"])
def test_the_box_coder(weights):
    g, config = golden("boxes")
    coder = BoxCoder(tuple(map(float, config["weights"][weights])))
    proposals = jnp.asarray(g["proposals"])
    encoded = coder.encode(jnp.asarray(g["a"]), proposals)
    assert_near(encoded, g[f"encode/{weights}"], 1e-6)
    decoded = coder.decode(jnp.asarray(g[f"deltas/{weights}"]), proposals)
    assert_near(decoded, g[f"decode/{weights}"], 1e-6)
    deltas = jnp.asarray(g[f"deltas_per_class/{weights}"].reshape(len(proposals), -1, 4))
    decoded = coder.decode(deltas, jnp.broadcast_to(proposals[:, None], deltas.shape))
    assert_near(decoded, g[f"decode_per_class/{weights}"], 1e-6)
    np.testing.assert_allclose(coder.decode(encoded, proposals), g["a"], rtol=0, atol=1e-3)


def test_boxes_of_no_size_have_no_deltas_and_no_infinite_gradient():
    boxes = jnp.array([[1, 1, 1, 1], [0, 0, 4, 4], [2, 2, 2, 9]], jnp.float32)
    others = boxes[jnp.array([1, 0, 1])]
    value, gradients = jax.value_and_grad(
        lambda a, b: jnp.square(BoxCoder().encode(a, b)).sum(), argnums=(0, 1)
    )(boxes, others)
    assert value == 0 and not any(np.any(g) for g in gradients)
    slopes = jax.grad(lambda a: iou(a, others).sum())(boxes)
    assert np.isfinite(slopes).all()


def test_clipping_and_sides():
    g, config = golden("boxes")
    clipped = clip(jnp.asarray(g["unclipped"]), jnp.array(config["image_size"]))
    np.testing.assert_array_equal(clipped, g["clipped"])
    for least in ("0.001", "0.01", "16.0"):
        kept = np.flatnonzero(have_sides(jnp.asarray(g["small"]), float(least)))
        np.testing.assert_array_equal(kept, g[f"remove_small/{least}"])


# Anchors and matching.


@pytest.mark.parametrize("case", golden("anchors")[1]["cases"], ids=lambda c: c["name"])
def test_anchors(case):
    g, _ = golden("anchors")
    sizes = tuple(tuple(map(float, level)) for level in case["sizes"])
    anchors = Anchors(sizes, tuple(case["aspect_ratios"]))
    for level in range(len(case["sizes"])):
        np.testing.assert_array_equal(anchors.cell(level), g[f"{case['name']}/cell/{level}"])
    maps = [tuple(size) for size in case["grid_sizes"]]
    levels = anchors(tuple(case["image_size"]), maps)
    np.testing.assert_array_equal(np.concatenate(levels), g[f"{case['name']}/anchors"])
    with pytest.raises(ValueError, match="each of the 4 feature maps, got 5"):
        anchors((64, 64), maps[1:])


@pytest.mark.parametrize("kind", ["rpn", "rpn_without_low_quality", "roi"])
def test_matching(kind):
    g, config = golden("matcher")
    high, low, low_quality = config["matchers"][kind]
    overlaps = {name: g[name] for name in ("quality", "quality_touched")} | {
        name: iou(jnp.asarray(g["gt"]), jnp.asarray(g[name])) for name in ("anchors", "proposals")
    }
    for name, overlap in overlaps.items():
        if f"{name}/{kind}" not in g:
            continue
        for empty in (0, 2):  # empty slots change nothing
            padded = jnp.pad(jnp.asarray(overlap), ((0, empty), (0, 0)), constant_values=1)
            real = jnp.arange(len(padded)) < len(overlap)
            ours = match(padded, real, high=high, low=low, low_quality=low_quality)
            np.testing.assert_array_equal(ours, g[f"{name}/{kind}"], err_msg=name)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 10**6), objects=st.integers(0, 4), low_quality=st.booleans())
def test_matching_by_its_definition(seed, objects, low_quality):
    rng = np.random.default_rng(seed)
    overlap = rng.integers(0, 6, (4, 7)).astype(np.float32) / 5  # many are equal
    real = np.arange(4) < objects
    expected = np.full(7, BACKGROUND)
    for box in range(7):
        if objects:
            best = overlap[:objects, box].argmax()
            top = overlap[best, box]
            expected[box] = best if top >= 0.6 else BETWEEN if top >= 0.4 else BACKGROUND
            if low_quality and (overlap[:objects, box] == overlap[:objects].max(axis=1)).any():
                expected[box] = best
    ours = match(
        jnp.asarray(overlap), jnp.asarray(real), high=0.6, low=0.4, low_quality=low_quality
    )
    np.testing.assert_array_equal(ours, expected)
    none = match(jnp.zeros((0, 7)), jnp.zeros(0, bool), high=0.6, low=0.4, low_quality=True)
    np.testing.assert_array_equal(none, np.full(7, BACKGROUND))


@pytest.mark.parametrize("positives", [0, 3, 40])
@pytest.mark.parametrize("negatives", [0, 5, 50])
def test_a_sample_has_what_there_is(positives, negatives):
    n, size = 90, 16
    kind = np.random.default_rng(0).permutation(n)
    positive, negative = kind < positives, kind >= n - negatives
    drawn = [
        sample(jax.random.key(seed), jnp.asarray(positive), jnp.asarray(negative), size, 0.25)
        for seed in range(3)
    ]
    for chosen, is_positive, real in drawn:
        chosen, is_positive, real = map(np.asarray, (chosen, is_positive, real))
        wanted = min(positives, 4)
        assert is_positive.sum() == wanted and is_positive[:wanted].all()
        assert real.sum() == wanted + min(negatives, size - wanted) and real[is_positive].all()
        assert positive[chosen[is_positive]].all() and negative[chosen[real & ~is_positive]].all()
        assert len(set(chosen[real])) == real.sum()
    if positives > 4 and negatives > 16:
        assert len({tuple(np.asarray(d.chosen)) for d in drawn}) == 3


def test_samples_are_drawn_evenly():
    positive, negative = jnp.arange(10) < 4, jnp.arange(10) >= 4
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(lambda key: sample(key, positive, negative, 4, 0.5))(keys)
    counts = np.bincount(np.asarray(drawn.chosen).ravel(), minlength=10) / 2000
    # 2 of 4 positives and 2 of 6 negatives; a deviation of 0.011 is one standard error.
    np.testing.assert_allclose(counts, [0.5] * 4 + [1 / 3] * 6, atol=0.05)


# Non-maximum suppression.


@functools.cache
def compiled_nms(threshold, limit):
    return jax.jit(functools.partial(nms, iou_threshold=threshold, limit=limit))


def kept(boxes, scores, threshold, *, groups=None, real=None, limit=None):
    n = len(scores)
    index, found = compiled_nms(threshold, limit)(
        jnp.asarray(boxes),
        jnp.asarray(scores),
        groups=jnp.zeros(n, jnp.int32) if groups is None else jnp.asarray(groups, jnp.int32),
        real=jnp.ones(n, bool) if real is None else jnp.asarray(real),
    )
    return np.asarray(index)[np.asarray(found)]


def test_nms():
    g, config = golden("nms")
    for name in ("scores", "scores_tied"):
        for threshold in config["thresholds"]:
            ours = kept(g["boxes"], g[name], threshold)
            np.testing.assert_array_equal(ours, g[f"nms/{name}/{threshold}"])
            for groups in ("ids", "levels"):
                ours = kept(g["boxes"], g[name], threshold, groups=g[groups])
                expected = g[f"batched_nms/{name}/{groups}/{threshold}"]
                np.testing.assert_array_equal(ours, expected)
    ours = kept(g["many/boxes"], g["many/scores"], 0.5, groups=g["many/ids"])
    np.testing.assert_array_equal(ours, g["many/keep_0.5"])
    np.testing.assert_array_equal(
        kept(g["many/boxes"], g["many/scores"], 0.5, groups=g["many/ids"], limit=7), ours[:7]
    )


@pytest.mark.parametrize("case", golden("nms")[1]["small"])
def test_small_cases_of_nms(case):
    g, _ = golden("nms")
    boxes, scores, threshold, expected = (
        g[f"small/{case}/{name}"] for name in ("boxes", "scores", "threshold", "keep")
    )
    groups = {"groups": g[f"small/{case}/ids"]} if f"small/{case}/ids" in g else {}
    np.testing.assert_array_equal(kept(boxes, scores, float(threshold), **groups), expected)


def slow_nms(boxes, scores, threshold, groups, real):
    order = [i for i in np.argsort(-scores, kind="stable") if real[i]]
    overlap = np.asarray(iou(jnp.asarray(boxes), jnp.asarray(boxes)))
    found = []
    for i in order:
        if not any(float(overlap[i, j]) > threshold and groups[i] == groups[j] for j in found):
            found.append(i)
    return found


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    threshold=st.sampled_from([0.0, 0.3, 0.7]),
    groups=st.integers(1, 3),
    limit=st.sampled_from([None, 5]),
    real=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_nms_by_its_definition(seed, threshold, groups, limit, real):
    rng, n = np.random.default_rng(seed), 270  # three blocks, the last of them not full
    boxes = draw_boxes(rng, n, whole=True)
    scores = rng.integers(0, 20, n).astype(np.float32)
    ids, there = rng.integers(0, groups, n), rng.random(n) < real
    ours = kept(boxes, scores, threshold, groups=ids, limit=limit, real=there)
    np.testing.assert_array_equal(ours, slow_nms(boxes, scores, threshold, ids, there)[:limit])


def test_nms_of_a_batch():
    rng = np.random.default_rng(0)
    boxes = np.stack([draw_boxes(rng, 150, size) for size in (20, 60, 200)])
    scores = rng.random((3, 150), np.float32)
    batched = jax.vmap(lambda b, s: nms(b, s, 0.4, limit=50))(boxes, scores)
    for i, (index, found) in enumerate(zip(*batched, strict=True)):
        ours = np.asarray(index)[np.asarray(found)]
        np.testing.assert_array_equal(ours, kept(boxes[i], scores[i], 0.4)[:50])


# RoIAlign.


@pytest.mark.parametrize("kind", ["aligned", "legacy"])
@pytest.mark.parametrize("case", [0, 1])
def test_roi_align(kind, case):
    g, config = golden(f"roi_align_{kind}")
    case, rois = config["cases"][case], g["rois"]
    key = case["key"]

    def pooled(x):
        per_image = jax.vmap(
            lambda x: roi_align(
                x,
                jnp.asarray(rois[:, 1:]),
                tuple(case["output_size"]),
                spatial_scale=config["spatial_scale"],
                sampling_ratio=case["sampling_ratio"],
                aligned=config["aligned"],
            )
        )(x)
        return per_image[rois[:, 0].astype(int), jnp.arange(len(rois))]

    y, gradient = jax.jit(functools.partial(with_gradient, pooled))(g["x"], g[f"{key}/cotangent"])
    assert_near(y, g[f"{key}/y"], 1e-5)
    assert_near(gradient, g[f"{key}/grad_x"], 1e-5)


def test_roi_align_over_several_levels():
    g, config = golden("multiscale_roi_align_ratio2_size7")
    maps = [jnp.asarray(g[f"features/{i}"]) for i in range(4)]
    boxes = [jnp.asarray(g[f"boxes/{i}"]) for i in range(2)]
    levels = [levels_of(b, 4) for b in boxes]
    np.testing.assert_array_equal(np.concatenate(levels), g["levels"])

    def pooled(maps):
        # A batch has as many boxes of every image: some are there twice.
        count = max(map(len, boxes))
        full = [jnp.resize(b, (count, 4)) for b in boxes]
        y = multilevel_roi_align(
            maps,
            jnp.stack(full),
            jnp.stack([levels_of(b, 4) for b in full]),
            (config["output_size"],) * 2,
            spatial_scales=config["scales"],
        )
        return jnp.concatenate([y[i, : len(b)] for i, b in enumerate(boxes)])

    y, gradients = jax.jit(functools.partial(with_gradient, pooled))(maps, g["cotangent"])
    assert_near(y, g["y"], 1e-5)
    for i, gradient in enumerate(gradients):
        assert_near(gradient, g[f"grad/{i}"], 1e-5)


def slow_roi_align(x, box, out, scale, ratio, aligned):
    height, width, channels = x.shape
    x1, y1, x2, y2 = (float(c) * scale - 0.5 * aligned for c in box)
    sides = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1), max(x2 - x1, 1))
    bins = sides[0] / out[0], sides[1] / out[1]
    points = [ratio if ratio > 0 else int(np.ceil(b)) for b in bins]
    y = np.zeros((*out, channels))

    def value(row, column):
        if not (-1 <= row <= height and -1 <= column <= width):
            return 0
        row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        top, left = int(row), int(column)
        low, right = min(top + 1, height - 1), min(left + 1, width - 1)
        down, across = row - top, column - left
        return (1 - down) * ((1 - across) * x[top, left] + across * x[top, right]) + down * (
            (1 - across) * x[low, left] + across * x[low, right]
        )

    for i in range(out[0]):
        for j in range(out[1]):
            for a in range(points[0]):
                for b in range(points[1]):
                    row = y1 + (i + (a + 0.5) / points[0]) * bins[0]
                    column = x1 + (j + (b + 0.5) / points[1]) * bins[1]
                    y[i, j] += value(row, column) / (points[0] * points[1])
    return y


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    ratio=st.sampled_from([-1, 1, 3]),
    scale=st.sampled_from([0.25, 1.0]),
    aligned=st.booleans(),
)
def test_roi_align_by_its_definition(seed, ratio, scale, aligned):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, 7, 2)).astype(np.float32)
    # Fractions that sums in float32 keep: no point changes sides of a border by rounding.
    boxes = (rng.integers(-16, 48, (4, 2)) / 4 / scale).repeat(2, 0).reshape(4, 4)
    boxes = np.concatenate(
        [boxes[:, :2], boxes[:, :2] + rng.integers(0, 40, (4, 2)) / 4 / scale], 1
    )
    ours = roi_align(
        jnp.asarray(x),
        jnp.asarray(boxes, jnp.float32),
        (2, 4),
        spatial_scale=scale,
        sampling_ratio=ratio,
        aligned=aligned,
    )
    for y, box in zip(ours, boxes, strict=True):
        expected = slow_roi_align(x, box, (2, 4), scale, ratio, aligned)
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("ratio", [-1, 2])
def test_gradients_of_roi_align(ratio):
    x = jax.random.normal(jax.random.key(0), (6, 5, 2))
    boxes = jnp.array([[0.3, 0.2, 4.1, 5.7], [1, 1, 1, 1], [-3, 2, 9, 4]], jnp.float32)

    @jax.jit
    def pooled(x):
        return roi_align(x, boxes, (2, 3), sampling_ratio=ratio)

    check_grads(pooled, (x,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    slopes = jax.grad(lambda b: roi_align(x, b, (2, 3), sampling_ratio=ratio).sum())(boxes)
    assert not slopes.any()


def test_roi_align_in_bfloat16_sums_in_float32():
    x = jax.random.normal(jax.random.key(0), (8, 8, 4)).astype(jnp.bfloat16)
    boxes = jnp.array([[0, 0, 7, 7], [1, 2, 5, 6]], jnp.float32)
    y, vjp = jax.vjp(lambda x: roi_align(x, boxes, (1, 1), sampling_ratio=4), x)
    expected = roi_align(x.astype(jnp.float32), boxes, (1, 1), sampling_ratio=4)
    assert y.dtype == vjp(y)[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))


# Masks.


@pytest.mark.parametrize("size", [28, 14])
def test_mask_targets(size):
    g, _ = golden("mask_targets")
    masks, boxes = jnp.asarray(g["gt_masks"]), jnp.asarray(g["boxes"])
    matched = jnp.asarray(g["matched"], jnp.int32)
    expected = g[f"targets_{size}"]
    cut = jax.jit(mask_targets, static_argnums=3)
    assert_near(cut(masks, boxes, matched, size), expected, 1e-5)

    own = jnp.asarray(g["gt_boxes"])
    crops = cut(masks, own, jnp.arange(len(own)), 112)
    ours = jax.jit(mask_targets_of_crops, static_argnums=4)(crops, own, boxes, matched, size)
    # What differs is at the edges of objects, a fraction of a pixel wide.
    assert np.abs(ours - expected).mean() < 0.01
    assert ((ours > 0.5) != (expected > 0.5)).mean() < 0.01


@pytest.mark.parametrize("masks,pasted", [("masks", "y"), ("masks_14", "y_14")])
def test_pasting(masks, pasted):
    g, config = golden("paste_masks")
    paste = jax.jit(paste_masks, static_argnums=2)
    ours = paste(g[masks], g["boxes"], tuple(config["image_size"]))
    np.testing.assert_allclose(ours, g[pasted], rtol=0, atol=1e-5)
