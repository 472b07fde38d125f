"""Detectors, held to torchvision's of the same weights, and what is not torchvision's to tell."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from drconv_jax import DRConv
from drconv_jax.detection import (
    Anchors,
    FasterRCNN,
    FeaturePyramid,
    MaskRCNN,
    Objects,
    as_backbone,
    normalize,
    rcnn,
    rpn,
)
from drconv_jax.detection.boxes import BoxCoder, iou
from drconv_jax.detection.heads import BoxHead, MaskHead, detect
from drconv_jax.detection.losses import box_losses, mask_loss, rpn_losses
from drconv_jax.detection.matching import BACKGROUND, Sample, match
from drconv_jax.interop import import_torch
from drconv_jax.models import ShuffleNetV2, create_model, list_models
from drconv_jax.weights import load_matching

pytestmark = pytest.mark.usefixtures("compiled_quickly")

DATA = pathlib.Path(__file__).parent / "data" / "detection"
KEY = jax.random.key(0)


def golden(name):
    arrays = dict(np.load(DATA / f"{name}.npz"))
    return arrays, json.loads(str(arrays["config"]))


def assert_near(ours, theirs, tolerance):
    """Within a part of the largest number."""
    scale = max(np.abs(theirs).max(), 1e-9)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


def layer(arrays, name, part="param"):
    """A layer's weights as Flax has them."""
    kernel = arrays[f"{part}/{name}.weight"]
    axes = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
    return {
        "kernel": jnp.asarray(kernel.transpose(axes)),
        "bias": jnp.asarray(arrays[f"{part}/{name}.bias"]),
    }


# Parts.


def rpn_params(g):
    names = {"conv0": "conv.0.0", "objectness": "cls_logits", "deltas": "bbox_pred"}
    return {"head": {ours: layer(g, f"head.{theirs}") for ours, theirs in names.items()}}


def rpn_of(config):
    anchors = Anchors(tuple(tuple(map(float, sizes)) for sizes in config["sizes"]))
    return rpn.RegionProposalNetwork(anchors)


@pytest.mark.parametrize("drawn", ["all", "sampled"])
def test_the_losses_and_proposals_of_an_rpn(drawn):
    g, config = golden("rpn_train")
    module, params = rpn_of(config), rpn_params(g)
    features = [jnp.asarray(g[f"features/{level}"]) for level in (*range(4), "pool")]
    shapes = [f.shape[1:3] for f in features]
    levels = module.anchors(tuple(config["batch_size"]), shapes)
    anchors = jnp.concatenate(levels)
    positive, real, targets = [], [], []
    for i in range(2):
        matched = match(
            iou(jnp.asarray(g[f"gt_boxes/{i}"]), anchors),
            jnp.ones(len(g[f"gt_boxes/{i}"]), bool),
            high=config["fg_iou_thresh"],
            low=config["bg_iou_thresh"],
            low_quality=True,
        )
        labels = np.where(matched >= 0, 1, np.where(matched == BACKGROUND, 0, -1))
        np.testing.assert_array_equal(labels, g[f"labels/{i}"])
        own = jnp.asarray(g[f"gt_boxes/{i}"])[jnp.maximum(matched, 0)]
        targets.append(rpn.CODER.encode(own, anchors))
        assert_near(targets[i][g[f"positive/{i}"]], g[f"positive_targets/{i}"], 1e-5)
        chosen = labels >= 0
        if drawn == "sampled":
            chosen = np.zeros(len(anchors), bool)
            chosen[g[f"sampled/sampled_positive/{i}"]] = True
            chosen[g[f"sampled/sampled_negative/{i}"]] = True
        positive.append(labels == 1)
        real.append(chosen)
    targets, positive, real = map(jnp.stack, (targets, positive, real))

    def losses(params):
        objectness, deltas = module.apply({"params": params}, features)
        named = rpn_losses(
            jnp.concatenate(objectness, 1), jnp.concatenate(deltas, 1), targets, positive, real
        )
        return sum(named), (named, objectness, deltas)

    gradients, (named, objectness, deltas) = jax.jit(jax.grad(losses, has_aux=True))(params)
    for ours, name in zip(named, ("loss_objectness", "loss_rpn_box_reg"), strict=True):
        assert_near(ours, g[f"{drawn}/{name}"], 1e-5)
    for ours, theirs in (
        ("conv0", "conv.0.0"),
        ("objectness", "cls_logits"),
        ("deltas", "bbox_pred"),
    ):
        expected = layer(g, f"head.{theirs}", f"{drawn}/grad")
        jax.tree.map(lambda a, b: assert_near(a, b, 1e-4), gradients["head"][ours], expected)
    propose = functools.partial(
        rpn.propose,
        pre_nms_top_n=config["pre_nms_top_n"]["training"],
        post_nms_top_n=config["post_nms_top_n"]["training"],
    )
    for i in range(2):
        size = jnp.array(config["image_sizes"][i])
        found = jax.jit(propose)([o[i] for o in objectness], [d[i] for d in deltas], levels, size)
        assert found.real.all()
        assert_near(found.boxes, g[f"proposals/{i}"], 1e-5)


def test_a_box_head_and_its_losses():
    g, config = golden("box_head")
    head = BoxHead(config["num_classes"], config["representation_size"])
    fc6 = layer(g, "box_head.fc6")
    kernel = g["param/box_head.fc6.weight"].reshape(-1, config["channels"], 7, 7)
    fc6["kernel"] = jnp.asarray(kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)))
    params = {
        "fc6": fc6,
        "fc7": layer(g, "box_head.fc7"),
        "class": layer(g, "box_predictor.cls_score"),
        "deltas": layer(g, "box_predictor.bbox_pred"),
    }
    labels, targets = jnp.asarray(g["labels"], jnp.int32), jnp.asarray(g["regression_targets"])

    def losses(x, labels):
        logits, deltas = head.apply({"params": params}, x)
        named = box_losses(logits, deltas, labels, targets, jnp.ones(len(x), bool))
        return sum(named), (named, logits, deltas)

    gradient = jax.jit(jax.grad(losses, has_aux=True))
    dx, (named, logits, deltas) = gradient(jnp.asarray(g["x"]), labels)
    assert_near(logits, g["class_logits"], 1e-5)
    assert_near(deltas.reshape(len(logits), -1), g["box_regression"], 1e-5)
    assert_near(jnp.stack(named), np.stack([g["loss_classifier"], g["loss_box_reg"]]), 1e-5)
    assert_near(dx, g["grad_x"], 1e-4)
    _, (named, _, _) = gradient(jnp.asarray(g["x"]), jnp.zeros_like(labels))
    assert_near(named[0], g["no_positive/loss_classifier"], 1e-5)
    assert named[1] == g["no_positive/loss_box_reg"] == 0


def test_a_mask_head_and_its_loss():
    g, config = golden("mask_head")
    *layers, last = config["layers"]
    head = MaskHead(config["num_classes"], (*layers, last), config["dim_reduced"])
    params = {f"conv{i}": layer(g, f"mask_head.{i}.0") for i in range(4)}
    params["logits"] = layer(g, "mask_predictor.mask_fcn_logits")
    upsample = g["param/mask_predictor.conv5_mask.weight"].transpose(2, 3, 0, 1)
    bias = jnp.asarray(g["param/mask_predictor.conv5_mask.bias"])
    params["upsample"] = {"kernel": jnp.asarray(upsample), "bias": bias}
    labels = np.concatenate([g[f"gt_labels/{i}"][g[f"matched/{i}"]] for i in range(2)])

    def loss(x):
        logits = head.apply({"params": params}, x)
        value = mask_loss(
            logits, jnp.asarray(labels, jnp.int32), jnp.asarray(g["mask_targets"]),
            jnp.ones(len(x), bool),
        )  # fmt: skip
        return value, logits

    (value, logits), dx = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(g["x"]))
    assert_near(logits, g["mask_logits"], 1e-5)
    assert_near(value, g["loss_mask"], 1e-5)
    assert_near(dx, g["grad_x"], 1e-4)


def test_detections_of_an_image():
    g, config = golden("postprocess")
    n = len(g["proposals/0"])
    for i in range(2):
        rows = slice(i * n, (i + 1) * n)
        boxes, scores, labels = jax.jit(
            functools.partial(detect, limit=100, score_threshold=0.05, nms_threshold=0.5)
        )(
            jnp.asarray(g["class_logits"][rows]),
            jnp.asarray(g["box_regression"][rows]).reshape(n, -1, 4),
            jnp.asarray(g[f"proposals/{i}"]),
            jnp.ones(n, bool),
            jnp.array(config["image_sizes"][i]),
        )
        np.testing.assert_array_equal(labels, g[f"labels/{i}"])
        assert_near(boxes, g[f"boxes/{i}"], 1e-6)
        assert_near(scores, g[f"scores/{i}"], 1e-6)


def test_regions_are_matched_and_encoded():
    g, config = golden("roi_sampling")
    for i in range(3):
        own = jnp.asarray(g[f"gt_boxes/{i}"])
        boxes = jnp.concatenate([jnp.asarray(g[f"proposals/{i}"]), own])
        np.testing.assert_array_equal(boxes, g[f"all/boxes/{i}"])
        matched = match(iou(own, boxes), jnp.ones(len(own), bool), high=0.5, low=0.5)
        labels = np.zeros(len(boxes), int)
        if len(own):
            labels = np.where(matched >= 0, g[f"gt_labels/{i}"][np.maximum(matched, 0)], 0)
            drawn = g[f"sampled/{i}"]
            targets = BoxCoder(tuple(map(float, config["bbox_reg_weights"]))).encode(
                own[jnp.maximum(matched, 0)][drawn], boxes[drawn]
            )
            assert_near(targets, g[f"regression_targets/{i}"], 1e-5)
        np.testing.assert_array_equal(labels, g[f"all/labels/{i}"])


def test_a_pyramid_of_odd_sizes_takes_the_nearest_position_before():
    maps = [jax.random.normal(KEY, (1, h, w, 3)) for h, w in ((7, 9), (4, 5), (2, 3))]
    pyramid = FeaturePyramid(4)
    variables = pyramid.init(KEY, maps)
    levels = pyramid.apply(variables, maps)
    assert [level.shape[1:3] for level in levels] == [(7, 9), (4, 5), (2, 3), (1, 2)]
    np.testing.assert_array_equal(levels[3], levels[2][:, ::2, ::2])
    # The finest level sees the coarsest map where its position times 2/7 and 3/9, cut, is.
    moved = [*maps[:2], maps[2].at[0, 1, 2].add(100.0)]
    changed = jnp.abs(pyramid.apply(variables, moved)[1] - levels[1]).max(axis=(0, 3)) > 1e-3
    # Rows 2 and 3 of 4, and columns 4 of 5 take from there; a 3x3 convolution spreads by one.
    np.testing.assert_array_equal(changed, np.add.outer(np.arange(4) < 1, np.arange(5) < 3) == 0)


# Whole networks.


def maskrcnn(config, batch_norm):
    mask = config["mask_channels"]
    return MaskRCNN(
        ShuffleNetV2(width=0.5),
        num_classes=config["num_classes"] - 1,
        features=config["out_channels"],
        anchors=Anchors(tuple((float(size),) for size in config["anchor_sizes"])),
        batch_norm=batch_norm,
        rpn_pre_nms_top_n=(config["rpn_pre_nms_top_n_train"], config["rpn_pre_nms_top_n_test"]),
        rpn_post_nms_top_n=(config["rpn_post_nms_top_n_train"], config["rpn_post_nms_top_n_test"]),
        rpn_batch_size_per_image=config["rpn_batch_size_per_image"],
        box_batch_size_per_image=config["box_batch_size_per_image"],
        box_detections_per_img=config["box_detections_per_img"],
        box_features=config["representation_size"],
        mask_features=(mask,) * 4,
        mask_upsampled=mask,
    )


@pytest.fixture(scope="module")
def network():
    """torchvision's weights, and the images that its numbers are of."""
    params, config = golden("maskrcnn_shufflenet_v2/params")
    state = {k.removeprefix("param/"): v for k, v in params.items() if k.startswith("param/")}
    inputs, _ = golden("maskrcnn_shufflenet_v2/inputs")
    images = jnp.asarray(inputs["batch"]), jnp.asarray(inputs["image_sizes"], jnp.int32)
    return config, state, images


def test_what_a_network_finds(network):
    config, state, (images, sizes) = network
    model = maskrcnn(config, "frozen")
    variables = import_torch(model, state)
    g, _ = golden("maskrcnn_shufflenet_v2/eval")

    def run(model, images, sizes):
        maps = model._maps(images, train=False)
        proposals = model._propose(*model.rpn(maps), maps, images, sizes, train=False)
        return proposals, model(images, sizes)

    proposals, found = jax.jit(functools.partial(model.apply, method=run))(variables, images, sizes)
    for i in range(2):
        assert_near(proposals.boxes[i], g[f"proposals/{i}"], 2e-5)
        assert_near(proposals.scores[i], g[f"proposal_scores/{i}"], 2e-5)
        np.testing.assert_array_equal(found.labels[i], g[f"final/labels/{i}"])
        assert_near(found.boxes[i], g[f"detections/boxes/{i}"], 2e-5)
        assert_near(found.scores[i], g[f"final/scores/{i}"], 2e-5)
        assert_near(found.masks[i], g[f"detections/masks/{i}"], 1e-4)


@pytest.fixture
def compiled_fully(compiled_quickly):
    """For sums whose rounding matters, as behind batch norm's gradient."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("compiled_fully")
@pytest.mark.parametrize("batch_norm", ["frozen", "live"])
def test_a_networks_losses_and_gradients(network, batch_norm, monkeypatch):
    config, state, (images, sizes) = network
    g, _ = golden(f"maskrcnn_shufflenet_v2/train_{batch_norm}_batch_norm")
    model = maskrcnn(config, batch_norm)
    variables = import_torch(model, state)
    labels = jnp.stack([jnp.asarray(g[f"targets/labels/{i}"], jnp.int32) for i in range(2)])
    boxes = jnp.stack([jnp.asarray(g[f"targets/boxes/{i}"]) for i in range(2)])
    masks = np.zeros((*labels.shape, *images.shape[1:3]), np.uint8)
    for i in range(2):
        own = g[f"targets/masks/{i}"]
        masks[i, :, : own.shape[1], : own.shape[2]] = 255 * own

    def as_drawn(key, positive, negative, size, fraction):
        """What torchvision drew for an image, which its key tells: anchors, or else regions."""
        are_anchors, drawn = positive.shape[0] > 1000, []
        keys = jax.random.split(jax.random.split(KEY)[0 if are_anchors else 1], 2)
        image = (jax.random.key_data(keys) == jax.random.key_data(key)[None]).all(-1).argmax()
        for i in range(2):
            if are_anchors:
                parts = [g[f"rpn/sampled_{kind}/{i}"] for kind in ("positive", "negative")]
            else:
                chosen, is_object = g[f"roi/sampled/{i}"], g[f"roi/labels/{i}"] > 0
                parts = [chosen[is_object], chosen[~is_object]]
            chosen = np.concatenate(parts)
            slots = np.arange(size)
            drawn.append((np.resize(chosen, size), slots < len(parts[0]), slots < len(chosen)))
        return Sample(*(jnp.asarray(np.stack(a))[image] for a in zip(*drawn, strict=True)))

    monkeypatch.setattr(rcnn, "sample", as_drawn)

    def loss(params):
        named, updates = model.apply(
            {**variables, "params": params}, images, sizes,
            Objects(boxes, labels, jnp.asarray(masks)), KEY,
            method="losses", mutable=["batch_stats"],
        )  # fmt: skip
        return sum(named.values()), (named, updates)

    (_, (named, updates)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    for name, value in named.items():
        assert_near(value, g[f"loss_float64/{name}"], 1e-5)
    assert set(named) == {k.split("/")[1] for k in g if k.startswith("loss/")}

    def as_ours(part):
        """torchvision's arrays where ours are; the others are what the weights are."""
        arrays = {k.removeprefix(part): v for k, v in g.items() if k.startswith(part)}
        imported = import_torch(model, state | arrays)
        kept = import_torch(model, {k: np.full_like(v, k in arrays) for k, v in state.items()})
        flat, marks = flatten_dict(imported), flatten_dict(kept)
        return {path: flat[path] for path in flat if marks[path].all()}

    ours = flatten_dict({"params": gradients, **updates})
    if batch_norm == "live":
        statistics = as_ours("batch_stats_after/")
        means = {path: values for path, values in statistics.items() if path[-1] == "mean"}
        assert len(means) > 50
        for path, values in means.items():
            assert_near(ours[path], values, 1e-5)
        # PyTorch keeps a variance over n - 1 of n positions, Flax one over n.
        stem, n = ("batch_stats", "backbone", "stem_norm", "var"), 2 * 80 * 96
        before = flatten_dict(variables)[stem]
        over_n = 0.9 * before + (statistics[stem] - 0.9 * before) * (n - 1) / n
        assert_near(ours[stem], over_n, 1e-5)
    theirs = as_ours("grad/")
    assert len(theirs) > 8
    for path, values in theirs.items():
        assert_near(ours[path], values, 2e-4)


def tiny(kind=FasterRCNN, backbone=None, **fields):
    settings = dict(
        num_classes=3,
        features=8,
        anchors=Anchors(tuple((s,) for s in (8.0, 16.0, 32.0, 64.0, 128.0))),
        rpn_pre_nms_top_n=(40, 40),
        rpn_post_nms_top_n=(30, 30),
        rpn_batch_size_per_image=16,
        box_batch_size_per_image=16,
        box_detections_per_img=5,
        box_features=16,
    )
    if kind is MaskRCNN:
        settings |= dict(mask_features=(8, 8), mask_upsampled=8)
    return kind(backbone or ShuffleNetV2(width=0.1, blocks=(1, 1, 1)), **(settings | fields))


def scene(batch=8):
    images = jax.random.normal(KEY, (batch, 64, 64, 3))
    sizes = jnp.tile(jnp.array([[64, 50], [40, 64]]), (batch // 2, 1))
    boxes = jnp.array([[4, 4, 30, 36], [10, 20, 40, 39], [0, 0, 0, 0]], jnp.float32)
    labels = jnp.tile(jnp.array([[1, 3, 0], [2, 0, 0]]), (batch // 2, 1))
    boxes = jnp.where((labels > 0)[..., None], boxes[None], 0)
    masks = jnp.full((batch, 3, 14, 14), 255, jnp.uint8)
    return images, sizes, Objects(boxes, labels, masks)


def loss_of(model, variables, images, sizes, objects):
    named, _ = model.apply(
        variables, images, sizes, objects, KEY, method="losses", mutable=["batch_stats"]
    )
    return sum(named.values()), named


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_images_without_objects_and_empty_slots_train_too(dtype):
    # Flax's group norm promotes dtypes on its own, which tests do not allow.
    model = tiny(MaskRCNN, dtype=dtype, group_norm=dtype is None)
    images, sizes, objects = scene(2)
    variables = jax.jit(model.init)(KEY, images, sizes)

    def both(variables, objects):
        gradient = jax.grad(lambda v: loss_of(model, v, images, sizes, objects)[0])
        return loss_of(model, variables, images, sizes, objects)[1], gradient(variables)

    run = jax.jit(both)
    named, gradients = run(variables, objects)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((named, gradients)))
    assert all(value > 0 for value in named.values())
    empty = jax.tree.map(jnp.zeros_like, objects)
    named, gradients = run(variables, empty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((named, gradients)))
    assert named["loss_box_reg"] == named["loss_rpn_box_reg"] == named["loss_mask"] == 0
    # What lies in an empty slot does not matter.
    filled = objects._replace(boxes=jnp.where(objects.labels[..., None] > 0, objects.boxes, 20.0))
    jax.tree.map(np.testing.assert_array_equal, run(variables, filled), run(variables, objects))


def test_on_a_mesh_it_is_what_it_is_on_one_device(mesh, axis_type):
    if axis_type != jax.sharding.AxisType.Auto:
        pytest.skip("gathers of detection leave sharding to XLA")
    model = tiny(MaskRCNN, batch_norm="live", batch_axes=("data",))
    images, sizes, objects = scene()
    variables = jax.jit(model.init)(KEY, images[:1], sizes[:1])
    run = jax.jit(jax.value_and_grad(lambda *args: loss_of(model, *args), has_aux=True))
    expected = run(variables, images, sizes, objects)
    by_batch = NamedSharding(mesh, PartitionSpec("data"))
    split = jax.tree.map(lambda a: jax.device_put(a, by_batch), (images, sizes, objects))
    whole = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        program = run.lower(whole, *split).compile()
        found = jax.jit(model.apply)(whole, *split[:2])
    ours = program(whole, *split)
    # Devices ask each other for sums over the batch, of losses, statistics and gradients, alone.
    messages = re.findall(r" (all-\w+|collective-\w+)\(.*?op_name=\"(.*?)\"", program.as_text())
    assert {kind for kind, _ in messages} == {"all-reduce"}
    assert not [name for _, name in messages if "while" in name]
    alone = jax.jit(model.apply)(variables, images, sizes)
    np.testing.assert_array_equal(found.labels, alone.labels)
    jax.tree.map(functools.partial(assert_near, tolerance=1e-5), ours[0], expected[0])
    # Batch norm makes some gradients nothing but rounding: they are held to the largest of all.
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for a, b in zip(*map(jax.tree.leaves, (ours[1], expected[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * max(np.abs(b).max(), 0.01 * scale))


def test_the_convolutions_of_pyramid_and_heads_may_be_drconvs():
    conv = functools.partial(DRConv, regions=2, experts=2)
    model = tiny(MaskRCNN, pyramid_conv=conv, head_conv=conv)
    images, sizes, _ = scene(2)
    variables = jax.eval_shape(model.init, KEY, images, sizes)
    dynamic = {path[1:-2] for path in flatten_dict(variables) if path[-2] == "filters"}
    assert ("pyramid", "inner0") in dynamic and ("pyramid", "layer3") in dynamic
    assert ("rpn", "head", "conv0") in dynamic and ("mask_head", "conv1") in dynamic


@pytest.mark.parametrize(
    "name", ["dr_maskrcnn_shufflenet_v2_x1_0_fpn", "fasterrcnn_mobilenet_v2_x0_35_fpn"]
)
def test_detectors_by_name(name):
    assert name in list_models("detection") and name not in list_models("classification")
    model = create_model(name, num_classes=7, box_detections_per_img=3, dtype=jnp.bfloat16)
    assert model.backbone.dtype == model.dtype == jnp.bfloat16
    x = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    sizes = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    found, variables = jax.eval_shape(model.init_with_output, KEY, x, sizes)
    assert found.boxes.shape == (2, 3, 4) and found.boxes.dtype == jnp.float32
    assert (found.masks is not None) == ("mask" in name)
    paths = {"/".join(path) for path in flatten_dict(variables)}
    assert name.startswith("dr_") == any("mixing_kernel" in path for path in paths)
    wider = create_model(name, num_classes=7, conv=nn.Conv, features=32)
    assert wider.features == 32 and wider.backbone.conv is nn.Conv


def test_a_detector_starts_from_a_classifier():
    classifier = ShuffleNetV2(num_classes=5, width=0.1, blocks=(1, 1, 1))
    source = jax.jit(classifier.init)(jax.random.key(1), jnp.ones((1, 32, 32, 3)))
    model = tiny()
    images, sizes, _ = scene(2)
    variables, report = load_matching(jax.jit(model.init)(KEY, images, sizes), as_backbone(source))
    kernel = variables["params"]["backbone"]["stem_conv"]["kernel"]
    np.testing.assert_array_equal(kernel, source["params"]["stem_conv"]["kernel"])
    assert "params/backbone/classifier/kernel" in report.unused
    assert "params/pyramid/inner0/kernel" in report.initial and not report.mismatched


def test_beyond_an_image_the_canvas_is_zero():
    images = jnp.full((1, 4, 6, 3), 255, jnp.uint8)
    normal = normalize(images, jnp.array([[2, 5]]))
    np.testing.assert_allclose(normal[0, 0, 0], [2.2489, 2.4286, 2.64], rtol=1e-4)
    assert not normal[0, 2:].any() and not normal[0, :, 5:].any() and normal[0, :2, :5].all()


@pytest.mark.parametrize(
    "model,shape,message",
    [
        (tiny(), (1, 60, 64, 3), "height and width that 32 divides, got 60 and 64"),
        (tiny(strides=(4, 8, 64)), (1, 64, 64, 3), r"backbone's maps, \(2, 4, 8, 16, 32\), got"),
        (tiny(anchors=Anchors(((8.0,),))), (1, 64, 64, 3), "each of the 5 feature maps, got 1"),
    ],
)
def test_what_does_not_fit_is_said(model, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, jnp.ones(shape), jnp.ones((1, 2), jnp.int32))


def test_masks_are_asked_for():
    model = tiny(MaskRCNN)
    images, sizes, objects = scene(2)
    variables = jax.eval_shape(model.init, KEY, images, sizes)
    with pytest.raises(ValueError, match="masks must be given to train a MaskRCNN, got None"):
        jax.eval_shape(
            lambda v: loss_of(model, v, images, sizes, objects._replace(masks=None)), variables
        )


def test_foreign_weights_that_do_not_fit_are_said(network):
    _, state, _ = network
    with pytest.raises(ValueError, match="must be plain for its public weights"):
        import_torch(tiny(head_conv=functools.partial(DRConv, regions=2)), state)
    with pytest.raises(ValueError, match="unexpected: roi_heads.mask_head.0.0.weight"):
        import_torch(tiny(), state)
    with pytest.raises(ValueError, match="backbone must be one of"):
        import_torch(tiny(backbone=_Maps()), state)


class _Maps(nn.Module):
    """A backbone that torchvision does not have."""

    @nn.compact
    def __call__(self, x, *, train=False, features=False):
        return {s: nn.Conv(4, (1, 1))(x[:, ::s, ::s]) for s in (4, 8, 16, 32)}
