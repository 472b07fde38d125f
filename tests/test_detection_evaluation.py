"""COCO's metrics, and detections back in their images' frames."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as codec
from pycocotools.coco import COCO

from experiments.detection import evaluation
from experiments.detection.annotations import parse
from experiments.detection.evaluation import METRICS, Results, evaluate, paste, results_of
from experiments.runtime.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "data"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools


def golden(name):
    if name.endswith(".json"):
        return json.loads((GOLDEN / name).read_text())
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def truth():
    content = (GOLDEN / "coco/annotations.json").read_bytes()
    return parse(content, "annotations.json", masks=True)


@pytest.fixture(scope="module")
def results(truth):
    return Results(tuple(truth.image_ids.tolist()), golden("coco/detections.json"))


@pytest.fixture(params=["pycocotools", "hotcoco"])
def evaluator(request):
    pytest.importorskip(request.param)
    return getattr(evaluation, request.param)


@pytest.mark.parametrize(
    "name,kind,area_of_box",
    [
        ("bbox", "bbox", False),
        ("segm", "segm", False),
        ("segm_area_from_bbox", "segm", True),
    ],
)
def test_the_official_numbers(truth, results, evaluator, name, kind, area_of_box, capsys):
    found = evaluate(truth, results, kind, area_of_box=area_of_box, evaluator=evaluator)
    expected, curves = golden("coco/summary.json"), golden("coco/curves.npz")
    assert list(METRICS) == expected["order"]
    assert found.summary == expected["results"][name]["summary"]
    by_category = {str(key): values for key, values in found.by_category.items()}
    assert by_category == expected["results"][name]["per_category"]
    for part in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(getattr(found, part), curves[f"{name}/{part}"])
    assert capsys.readouterr().out == ""
    # The means of a curve over its recalls are AP, AP50 and AP75, but for the order of summation.
    found = {name: curve.mean() for name, curve in found.curves().items()}
    expected = [expected["results"][name]["summary"][n] for n in ("AP50", "AP75", "AP")]
    np.testing.assert_allclose(
        [found[n] for n in ("0.5", "0.75", "0.5:0.95")], expected, rtol=1e-13
    )


def test_results_of_several_processes(truth, results):
    ids = results.image_ids
    parts = [
        Results(part, [d for d in results.detections if d["image_id"] in part])
        for part in (ids[20:], ids[:7], ids[7:20])
    ]
    joined = Results.joined(parts)
    assert sorted(joined.image_ids) == sorted(ids)
    assert evaluate(truth, joined, "bbox").summary == evaluate(truth, results, "bbox").summary
    with pytest.raises(ValueError, match=f"the image with the id {ids[3]} was evaluated twice"):
        Results.joined([*parts, Results((ids[3],), [])])
    with pytest.raises(ValueError, match="results of 29 images are no results of the 30 images"):
        evaluate(truth, Results(ids[1:], []), "bbox")


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_nothing_found_and_nothing_to_find(truth, kind, evaluator):
    found = evaluate(truth, Results(tuple(truth.image_ids.tolist()), []), kind, evaluator=evaluator)
    assert set(found.summary.values()) == {0.0} and set(found.by_category[90].values()) == {-1.0}
    (image,) = np.flatnonzero(truth.object_counts() == 0)[:1]
    nothing = truth.of_images(np.arange(len(truth)) == image)
    key = int(nothing.image_ids[0])
    code = codec.encode(np.ones((nothing.heights[0], nothing.widths[0]), np.uint8, "F"))
    code["counts"] = code["counts"].decode()
    detection = {"image_id": key, "category_id": 1, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
    detection["segmentation"] = code
    found = evaluate(nothing, Results((key,), [detection]), kind, evaluator=evaluator)
    assert set(found.summary.values()) == {-1.0} and found.curves() == {}


def test_an_object_with_the_id_0_is_matched():
    """It is 0 in pycocotools' own reading, which takes it for no object."""
    annotation = {"id": 0, "image_id": 0, "category_id": 0, "bbox": [1, 1, 4, 4], "area": 16}
    content = {
        "images": [{"id": 0, "file_name": "x", "height": 8, "width": 8}],
        "categories": [{"id": 0, "name": "x"}],
        "annotations": [annotation | {"iscrowd": 0}],
    }
    found = parse(json.dumps(content).encode(), "x.json", masks=False)
    detection = {"image_id": 0, "category_id": 0, "bbox": [1, 1, 4, 4], "score": 0.5}
    assert evaluate(found, Results((0,), [detection]), "bbox").summary["AP"] == pytest.approx(1)


def test_masks_are_pasted_as_torchvision_does():
    arrays = golden("detection/paste_masks.npz")
    height, width = arrays["y"].shape[1:]
    for masks, pasted in (("masks", "y"), ("masks_14", "y_14")):
        for mask, box, expected in zip(arrays[masks], arrays["boxes"], arrays[pasted], strict=True):
            top, left, values = paste(mask, box, height, width)
            rows, columns = values.shape
            found = np.zeros_like(expected)
            found[top : top + rows, left : left + columns] = values
            np.testing.assert_allclose(found, expected, atol=3e-6)  # of float32 coordinates
            code = evaluation.pasted(mask, box, height, width)
            decoded = codec.decode({"size": [height, width], "counts": code})
            np.testing.assert_array_equal(decoded, expected > 0.5)


def paste_slowly(mask, box, height, width):
    """The definition, pixel by pixel."""
    size = len(mask)
    padded = np.zeros((size + 2, size + 2))
    padded[1:-1, 1:-1] = mask
    ends = []
    for low, high in ((box[1], box[3]), (box[0], box[2])):
        middle, half = (low + high) / 2, (high - low) / 2 * (size + 2) / size
        ends.append((int(middle - half), int(middle + half)))
    result = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        at = []
        for pixel, (first, last) in zip((y, x), ends, strict=True):
            if first <= pixel <= last:
                at.append(max((pixel - first + 0.5) * (size + 2) / (last - first + 1) - 0.5, 0))
        if len(at) == 2:
            low = [min(int(a), size + 1) for a in at]
            high = [min(a + 1, size + 1) for a in low]
            wy, wx = (a - b for a, b in zip(at, low, strict=True))
            result[y, x] = (1 - wy) * (
                (1 - wx) * padded[low[0], low[1]] + wx * padded[low[0], high[1]]
            ) + wy * ((1 - wx) * padded[high[0], low[1]] + wx * padded[high[0], high[1]])
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=16, max_size=16),
    st.lists(st.integers(-80, 240), min_size=4, max_size=4),
    st.integers(1, 16),
    st.integers(1, 16),
)
def test_masks_are_pasted(cells, corners, height, width):
    mask = np.array(cells, np.float32).reshape(4, 4) / 8
    # In eighths of a pixel: made half as long again, the box is exact in float32.
    (x1, x2), (y1, y2) = sorted(corners[:2]), sorted(corners[2:])
    box = np.array([x1, y1, x2, y2], np.float32) / 8
    top, left, values = paste(mask, box, height, width)
    found = np.zeros((height, width), np.float32)
    found[top : top + values.shape[0], left : left + values.shape[1]] = values
    np.testing.assert_allclose(found, paste_slowly(mask, box, height, width), atol=2e-6)


def test_detections_in_the_frame_of_their_image(truth, tmp_path):
    image = 4
    height, width = int(truth.heights[image]), int(truth.widths[image])
    size = np.array([[height * 2, width // 2], [10, 10], [10, 10]])
    mask = np.zeros((3, 3, 4, 4), np.float32)
    mask[0, 1] = 1
    found = results_of(
        truth,
        index=np.array([image, -1, 6]),
        size=size,
        boxes=np.tile(np.array([20, 40, 50, 120], np.float32), (3, 3, 1)),
        scores=np.full((3, 3), 0.25, np.float32),
        labels=np.array([[0, 3, 0], [1, 1, 1], [1, 1, 1]]),
        masks=mask,
        broken={6: "why"},
    )
    assert found.image_ids == (truth.image_ids[image], truth.image_ids[6])
    (detection,) = found.detections
    ratio = width / (width // 2)
    x1, y1, x2, y2 = 20 * ratio, 20, 50 * ratio, 60
    np.testing.assert_allclose(detection["bbox"], [x1, y1, x2 - x1, y2 - y1], rtol=1e-6)
    assert detection["image_id"] == truth.image_ids[image] and detection["score"] == 0.25
    assert detection["category_id"] == truth.category_ids[2]
    assert detection["segmentation"]["size"] == [height, width]
    x, y, w, h = codec.toBbox(detection["segmentation"])
    np.testing.assert_allclose([x, y, x + w, y + h], [x1, y1, x2, y2], atol=1.5)
    found.write(tmp_path / "results.json")
    index = COCO(GOLDEN / "coco/annotations.json").loadRes(str(tmp_path / "results.json"))
    (read,) = index.loadAnns(index.getAnnIds())
    assert read["bbox"] == detection["bbox"]
    boxes = results_of(
        truth,
        np.array([image]),
        size[:1],
        np.zeros((1, 1, 4), np.float32),
        np.zeros((1, 1), np.float32),
        np.ones((1, 1), np.int32),
        masks=None,
    )
    assert "segmentation" not in boxes.detections[0]


def test_the_truth_is_found_perfectly(truth):
    """Boxes and masks that go to a canvas and back score 1 where only crowds are not found."""
    uncrowded = truth.of_images(truth.object_counts() > 0)
    parts = []
    for image in range(len(uncrowded)):
        objects = uncrowded.objects(image)
        boxes = objects.boxes[~objects.crowd]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        old = np.array([uncrowded.heights[image], uncrowded.widths[image]])
        size = np.array([[97, 153]])
        ratio = np.tile(size[0, ::-1] / old[::-1], 2)
        parts.append(
            results_of(
                uncrowded,
                np.array([image]),
                size,
                (corners * ratio)[None].astype(np.float32),
                np.ones((1, len(boxes)), np.float32),
                objects.labels[~objects.crowd][None],
                masks=None,
            )
        )
    summary = evaluate(uncrowded, Results.joined(parts), "bbox").summary
    assert summary["AP"] == summary["AR100"] == pytest.approx(1)


def test_an_evaluator_that_is_not_installed(truth, results, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hotcoco", None)
    with pytest.raises(UserError, match="hotcoco is not installed; pip install hotcoco"):
        evaluate(truth, results, "bbox", evaluator=evaluation.hotcoco)
