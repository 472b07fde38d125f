"""Our detection beside torchvision's, where that is installed."""

# ruff: noqa: E402  what follows imports torchvision

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as codec

pytest.importorskip("torchvision")
torch = pytest.importorskip("torch")

from drconv_jax.detection import Anchors, MaskRCNN
from drconv_jax.interop import export_torch
from drconv_jax.models import ShuffleNetV2
from experiments.detection import resampling, torchvision_network, torchvision_twin
from experiments.detection.config import Config
from experiments.detection.model import DetectorConfig
from experiments.detection.samples import Canvas, Preparation
from experiments.detection.task import Detection
from experiments.runtime import mesh as meshes
from experiments.runtime.errors import UserError
from experiments.runtime.recipes import Recipe
from experiments.runtime.training import program
from experiments.speed import cases, detection, torch_detection

CANVAS = Canvas(96, 128)
# With as many anchors and proposals drawn as there are, nothing is random.
MODEL = MaskRCNN(
    ShuffleNetV2(width=0.5, blocks=(1, 1, 1)),
    num_classes=3,
    features=16,
    anchors=Anchors(((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))),
    rpn_pre_nms_top_n=(60, 60),
    rpn_post_nms_top_n=(60, 60),
    rpn_batch_size_per_image=10**6,
    box_features=16,
    box_batch_size_per_image=10**6,
    box_positive_fraction=0.5,
    box_detections_per_img=20,
    mask_features=(16,),
    mask_upsampled=16,
)
RECIPE = Recipe(
    epochs=2,
    batch_size=2,
    learning_rate=0.01,
    weight_decay=0.1,
    warmup_epochs=0.5,
    gradient_clip=1.0,
    seed=3,
)


@pytest.fixture(scope="module")
def task():
    return Detection(MODEL, Preparation(96, 128, 6, 56), (CANVAS,), (CANVAS,))


@pytest.fixture(scope="module")
def arrays():
    """Two images that do not fill their canvas, with 5 objects and with 2."""
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(2, *CANVAS, 3), dtype=np.uint8)
    image[0, :, 120:], image[1, 90:] = 0, 0
    boxes, labels = np.zeros((2, 6, 4), np.float32), np.zeros((2, 6), np.int32)
    for i, count in enumerate((5, 2)):
        start, sides = rng.uniform(0, 45, (count, 2)), rng.uniform(12, 45, (count, 2))
        boxes[i, :count] = np.concatenate([start, start + sides], axis=1)
        labels[i, :count] = rng.integers(1, 4, count)
    row, column = np.mgrid[:56, :56] - 27.5
    disc = np.where(row**2 + column**2 < 25**2, 255, 0).astype(np.uint8)
    masks = np.where((labels > 0)[..., None, None], disc, 0).astype(np.uint8)
    size = np.array([[96, 120], [90, 128]], np.int32)
    return {"image": image, "size": size, "boxes": boxes, "labels": labels, "masks": masks}


def assert_near(ours, theirs, tolerance):
    """Within a share of the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@jax.numpy_dtype_promotion("standard")  # optax's own mix of dtypes
def test_steps_are_ours(task, arrays, compiled_quickly):
    scales = np.ones((2, 2), np.float32)
    theirs = torchvision_twin.Training(task, RECIPE, steps_per_epoch=4)
    objects = torchvision_network.objects_of(arrays, scales)
    # Ours is given the same masks.
    masks = np.zeros((2, 6, *CANVAS), np.uint8)
    for own, given in zip(masks, objects, strict=True):
        own[: len(given["masks"])] = 255 * given["masks"].numpy()
    batch = {name: jnp.asarray(array) for name, array in (arrays | {"masks": masks}).items()}

    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    ours = program(task, RECIPE, mesh, steps_per_epoch=4)
    state = ours.init()
    for _ in range(2):
        before = export_torch(MODEL, state.variables)
        state, named = ours.train_step(state, batch)
        values = theirs.step(arrays, scales)
        assert set(named) == set(values)
        for name, value in values.items():
            assert value > 0
            # Batch norm's gradients are small differences of large numbers.
            tolerance = 1e-3 if name == "gradient_norm" else 1e-4
            np.testing.assert_allclose(named[name], value, rtol=tolerance, err_msg=name)
        found = theirs.network.state_dict()
        for name, after in export_torch(MODEL, state.variables).items():
            expected = found[name].numpy()
            if name.endswith("running_var"):
                # Over n values, theirs grows with n / (n - 1) times the variance; n is 24 at least.
                np.testing.assert_allclose(after, expected, rtol=1 / 23, err_msg=name)
                continue
            # Rounding is much of the gradient of what a batch norm behind it all but undoes.
            tolerance = 0.1 * np.abs(expected - before[name]).max() + 1e-6
            np.testing.assert_allclose(after, expected, rtol=0, atol=tolerance, err_msg=name)


def test_detections_are_ours(task, arrays, compiled_quickly):
    variables = jax.jit(task.init)(jax.random.key(0))
    variables["params"]["box_head"]["class"]["kernel"] *= 100  # sure of itself
    batch = {name: jnp.asarray(arrays[name]) for name in ("image", "size")}
    ours = jax.jit(task.evaluate)(variables, batch)
    network = torchvision_network.build(MODEL, variables).eval()
    found = torchvision_network.find(network, *torchvision_network.images_of(arrays))
    theirs = torchvision_twin._in_slots(found, MODEL.box_detections_per_img)
    assert set(ours) == set(theirs) and (theirs["labels"] > 0).sum() > 10
    np.testing.assert_array_equal(ours["labels"], theirs["labels"])
    for name in ("boxes", "scores", "masks"):
        assert ours[name].dtype == theirs[name].dtype
        assert_near(ours[name], theirs[name], 1e-3 if name == "masks" else 1e-4)


def test_masks_pasted_into_the_canvas_of_a_file_of_the_same_size():
    """Two cells of a crop are a pixel: nothing is lost."""
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 50), np.uint8)
    mask[8:36, 11:39] = rng.random((28, 28)) < 0.6
    box = np.array([11, 8, 39, 36], np.float32)
    code = codec.encode(np.asfortranarray(mask))["counts"]
    crop = resampling.mask_of_box(code, box, 40, 50, 56)
    ones = np.ones(2, np.float32)
    pasted = torchvision_network.pasted(crop[None], box[None], (40, 50), ones)
    np.testing.assert_array_equal(pasted, mask[None])


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_masks_pasted_into_a_canvas_are_where_they_are(scale):
    height, width = 60, 80
    row, column = np.mgrid[:height, :width] + 0.5
    inside = lambda y, x: (y - 31) ** 2 / 24**2 + (x - 41) ** 2 / 32**2 < 1  # noqa: E731
    code = codec.encode(np.asfortranarray(inside(row, column).astype(np.uint8)))["counts"]
    box = np.array([9, 7, 73, 55], np.float32)
    crop = resampling.mask_of_box(code, box, height, width, 56)
    canvas = (int(height * scale), int(width * scale))
    pasted = torchvision_network.pasted(
        crop[None], scale * box[None], canvas, np.full(2, scale, np.float32)
    )[0]
    row, column = (np.mgrid[: canvas[0], : canvas[1]] + 0.5) / scale
    expected = inside(row, column)
    assert (pasted != expected).sum() < 0.04 * expected.sum()
    for axis in (0, 1):  # neither further left than right, nor above than below
        middle = np.average(np.indices(canvas)[axis], weights=pasted)
        assert abs(middle - np.average(np.indices(canvas)[axis], weights=expected)) < 0.25


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"name": "dr_maskrcnn_shufflenet_v2_x0_5_fpn"}, "--model.name .* without DRConv"),
        ({"name": "maskrcnn_mobilenet_v1_x0_5_fpn"}, "--model.name .* on shufflenet_v2"),
        ({"group_norm": True}, "--model.group-norm must be off"),
        ({"dtype": "bfloat16"}, "--model.dtype must be float32"),
    ],
)
def test_options_without_a_counterpart(changes, message):
    model = DetectorConfig("maskrcnn_shufflenet_v2_x0_5_fpn")
    torchvision_twin.check(Config(model=model))
    with pytest.raises(UserError, match=message):
        torchvision_twin.check(Config(model=dataclasses.replace(model, **changes)))


def test_the_same_features_are_pooled_for_speed():
    case = dataclasses.replace(cases.DETECTION[0], size=96, in_features=4, boxes=40)
    maps, boxes = detection.pyramid(case), detection.draw_boxes(case)
    pool = torchvision_network.roi_align(case.kernel)
    theirs = pool(
        {str(i): torch_detection._channels_first(x) for i, x in enumerate(maps)},
        list(torch.tensor(boxes)),
        [(case.size, case.size)],
    )
    ours = detection.roi_align(case, maps, jnp.asarray(boxes))
    assert_near(np.moveaxis(ours[0], -1, 1), theirs, 1e-5)


def test_the_same_boxes_are_kept_for_speed():
    from torchvision import ops

    from drconv_jax.detection import nms

    boxes, scores = detection.candidates(cases.DETECTION[1])
    theirs = ops.nms(torch.tensor(boxes), torch.tensor(scores), detection.NMS_THRESHOLD).numpy()
    kept, real = nms(jnp.asarray(boxes), jnp.asarray(scores), detection.NMS_THRESHOLD)
    assert 200 < len(theirs) < 1900
    np.testing.assert_array_equal(np.asarray(kept)[np.asarray(real)], theirs)
