"""COCO json to samples and batches."""

import collections
import io
import itertools
import json
import os
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from pycocotools import mask as codec
from pycocotools.coco import COCO

from experiments.detection import canvases, coco, resampling, rle, samples
from experiments.detection.annotations import parse
from experiments.detection.canvases import Canvases
from experiments.detection.coco import Paths
from experiments.detection.feed import CocoImages
from experiments.detection.rle import Window
from experiments.detection.samples import Canvas, Preparation
from experiments.runtime.errors import UserError
from experiments.runtime.images import BrokenImageError
from experiments.runtime.pipeline import Loading, Share

GOLDEN = pathlib.Path(__file__).parent / "data"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
# The folder with tiny_coco.zip and nuclei_coco.zip, which are too large for the repository.
OUTSIDE = os.environ.get("DRCONV_DATA")


def golden(name):
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)


def mask_of(code, height, width):
    return codec.decode({"size": [height, width], "counts": code})


# --- Masks


def test_run_length_code():
    cases = json.loads((GOLDEN / "coco/rle.json").read_text())
    for case in cases["rle"]:
        height, width = case["size"]
        code = case["string"].encode()
        assert rle.run_lengths(code).tolist() == case["counts"]
        assert rle.from_lengths(case["counts"], height, width) == code
        mask = rle.decoded(code, height, Window(0, 0, height, width))
        np.testing.assert_array_equal(mask, mask_of(code, height, width))
        assert rle.encoded(mask > 0, 0, 0, height, width) == code
    for case in cases["polygons"]:
        assert rle.from_polygons([case["polygon"]], *case["size"]) == case["string"].encode()


@pytest.mark.parametrize("code", [b"", b"P", b"0\xff", b"!0", b"ooooooo0"])
def test_no_run_length_code(code):
    with pytest.raises(ValueError, match="no run-length code"):
        rle.run_lengths(code)


@st.composite
def masks_and_windows(draw):
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    cells = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    top, left = draw(st.integers(0, height)), draw(st.integers(0, width))
    bottom, right = draw(st.integers(top, height)), draw(st.integers(left, width))
    return np.array(cells).reshape(height, width), Window(top, left, bottom, right)


@settings(max_examples=60, deadline=None)
@given(masks_and_windows())
def test_masks_within_a_window(case):
    mask, window = case
    height, width = mask.shape
    part = (slice(window.top, window.bottom), slice(window.left, window.right))
    code = codec.encode(np.asfortranarray(mask, np.uint8))["counts"]
    np.testing.assert_array_equal(rle.decoded(code, height, window), mask[part])
    alone = np.zeros_like(mask)
    alone[part] = mask[part]
    expected = codec.encode(np.asfortranarray(alone, np.uint8))["counts"]
    assert rle.encoded(mask[part], window.top, window.left, height, width) == expected


def test_masks_of_every_kind_of_annotation():
    content = (GOLDEN / "coco/annotations.json").read_bytes()
    found = parse(content, "annotations.json", masks=True)
    expected = golden("coco/masks.npz")
    by_image = collections.defaultdict(list)
    for annotation in json.loads(content)["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    assert len(found.labels) == sum(map(len, by_image.values())) and not len(found.left_out)
    for image, key in enumerate(found.image_ids):
        height, width = int(found.heights[image]), int(found.widths[image])
        objects = found.objects(image)
        for j, annotation in enumerate(by_image[key]):
            packed = expected[f"annotations/{annotation['id']}"]
            mask = np.unpackbits(packed, count=height * width).reshape(height, width)
            whole = Window(0, 0, height, width)
            np.testing.assert_array_equal(rle.decoded(objects.masks[j], height, whole), mask)
            assert objects.boxes[j].tolist() == annotation["bbox"]
            assert objects.crowd[j] == annotation["iscrowd"]
            label = objects.labels[j]
            assert found.category_ids[label - 1] == annotation["category_id"]


def roi_align(mask, box, size):
    """The definition (torchvision's, not aligned, adaptive), sample by sample."""
    height, width = mask.shape
    x1, y1, x2, y2 = map(float, box)
    w, h = max(x2 - x1, 1), max(y2 - y1, 1)
    nx, ny = (int(np.ceil(np.float32(side) / np.float32(size))) for side in (w, h))

    def value(y, x):
        if not (-1 <= y <= height and -1 <= x <= width):
            return 0
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        total = 0
        for yy, wy in ((int(y), 1 - y % 1), (min(int(y) + 1, height - 1), y % 1)):
            for xx, wx in ((int(x), 1 - x % 1), (min(int(x) + 1, width - 1), x % 1)):
                total += wy * wx * mask[yy, xx]
        return total

    result = np.empty((size, size))
    for i, j in np.ndindex(size, size):
        ys = [y1 + (i + (k + 0.5) / ny) * h / size for k in range(ny)]
        xs = [x1 + (j + (k + 0.5) / nx) * w / size for k in range(nx)]
        result[i, j] = np.mean([value(y, x) for y in ys for x in xs])
    return result


@st.composite
def masks_and_boxes(draw):
    height, width = draw(st.integers(2, 14)), draw(st.integers(2, 14))
    cells = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    x1, x2 = sorted(draw(st.lists(st.integers(0, 8 * width), min_size=2, max_size=2)))
    y1, y2 = sorted(draw(st.lists(st.integers(0, 8 * height), min_size=2, max_size=2)))
    box = np.array([x1, y1, x2, y2], np.float32) / 8
    return np.array(cells, np.uint8).reshape(height, width), box


@settings(max_examples=60, deadline=None)
@given(masks_and_boxes(), st.integers(1, 5), st.booleans())
def test_a_mask_cut_to_its_box(case, size, mirrored):
    mask, box = case
    height, width = mask.shape
    code = codec.encode(np.asfortranarray(mask))["counts"]
    found = resampling.mask_of_box(code, box, height, width, size, mirrored=mirrored)
    if mirrored:
        mask, box = mask[:, ::-1], np.array([width - box[2], box[1], width - box[0], box[3]])
    # Rounded: half a step, and what float32 adds to it.
    assert np.abs(found - 255 * roi_align(mask, box, size)).max() <= 0.5 + 1e-4


# --- Resizing


def test_resizing_as_torchvision_does():
    arrays = golden("detection/transform.npz")
    config = json.loads(str(arrays["config"]))
    mean, std = (np.array(config[name]) for name in ("image_mean", "image_std"))
    for c, case in enumerate(config["cases"]):
        for i, (height, width) in enumerate(case["sizes"]):
            size = samples.resized_size(height, width, case["min_size"], case["max_size"])
            assert list(size) == case["image_sizes"][i]
            pixels = resampling.resized(arrays[f"{c}/image/{i}"], *size)
            expected = arrays[f"{c}/batch"][i, : size[0], : size[1]] * std + mean
            # Rounded: half a step; torchvision's coordinates are 1e-5 off, a pixel's step is 255.
            assert np.abs(pixels - 255 * expected).max() <= 0.5 + 255e-5
            boxes = samples._moved(arrays[f"{c}/boxes/{i}"], height, width, size, mirrored=False)
            np.testing.assert_array_equal(boxes, arrays[f"{c}/boxes_out/{i}"])


# --- Reading a json

IMAGES = [
    {"id": 7, "file_name": "b.png", "height": 20, "width": 30},
    {"id": 3, "file_name": "a.png", "height": 24, "width": 16},
    {"id": 5, "file_name": "c.png", "height": 20, "width": 30},
]
CATEGORIES = [{"id": 90, "name": "dog"}, {"id": 2, "name": "cat"}]


def square(number, image=7, category=90, x=4, y=5, side=8, **changes):
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    entry = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, side, side],
        "area": side * side,
        "iscrowd": 0,
        "segmentation": [polygon],
    } | changes
    return {key: value for key, value in entry.items() if value is not None}


def document(*objects, **changes):
    whole = {"images": IMAGES, "annotations": objects, "categories": CATEGORIES} | changes
    return {key: value for key, value in whole.items() if value is not None}


def parsed(*annotations, masks=True, **changes):
    return parse(json.dumps(document(*annotations, **changes)).encode(), "x.json", masks=masks)


def test_objects_are_their_images_and_labels_in_order():
    found = parsed(
        square(0, image=3, category=2), square(1), square(2, image=3, iscrowd=1), square(3, x=9)
    )
    assert found.category_ids.tolist() == [2, 90] and found.category_names.tolist() == [
        "cat",
        "dog",
    ]
    assert [found.objects(i).labels.tolist() for i in range(3)] == [[2, 2], [1, 2], []]
    assert found.objects(0).boxes[:, 0].tolist() == [4, 9]
    assert found.objects(1).crowd.tolist() == [False, True]
    kept = found.of_images(found.object_counts() > 0)
    assert kept.image_ids.tolist() == [7, 3] and found.object_counts().tolist() == [2, 1, 0]
    kept = found.of_images(np.array([False, True, True]))
    assert kept.objects(0).masks == found.objects(1).masks and not kept.objects(1).masks
    without = parsed(square(0, segmentation=None, area=None), masks=False)
    assert without.areas.tolist() == [64] and not without.has_masks
    by_mask = parsed(square(0, bbox=[1, 1, 20, 18], area=None))
    assert by_mask.areas.tolist() == [mask_of(by_mask.code(0), 20, 30).sum()]


CODE = {"size": [20, 30], "counts": codec.encode(np.zeros((20, 30), np.uint8, "F"))["counts"]}
CODE["counts"] = CODE["counts"].decode()


@pytest.mark.parametrize(
    "bad,why",
    [
        ({"bbox": [1, 2, 3]}, "without a box of four numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "without a box of four numbers"),
        ({"bbox": [1, 2, 0, 3]}, "with a box of no size"),
        ({"bbox": [30, 2, 4, 4]}, "with a box outside the image"),
        ({"segmentation": [[1, 1, 4, 4]]}, "with a polygon of fewer than 3 points"),
        ({"segmentation": [[1, 1, 4, 4, 5, 6, 7]]}, "with a polygon that is no list of"),
        ({"segmentation": [[1, 1, 4, 1e9, 5, 6]]}, "with a polygon far outside the image"),
        ({"segmentation": None}, "without a mask"),
        ({"segmentation": "x"}, "with a mask that is neither"),
        ({"segmentation": CODE | {"counts": "é"}}, "with a run-length code that is damaged"),
        ({"segmentation": CODE | {"counts": [600.5]}}, "with a run-length code that is damaged"),
        ({"segmentation": CODE | {"counts": "0"}}, "that does not fill the image"),
        ({"segmentation": CODE | {"counts": [700, -100]}}, "that does not fill the image"),
    ],
)
def test_single_bad_annotations_are_left_out(bad, why):
    found = parsed(square(11, **bad), square(12), square(13, **bad), square(14, image=3))
    (line,) = found.left_out
    assert line.startswith("2 annotations ") and line.endswith("(id 11, 13)") and why in line
    assert found.object_counts().tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "content,message",
    [
        (b"{", '"x.json" is not JSON, or damaged: Expecting'),
        (b"\xff\xfe\x00", '"x.json" is not JSON, or damaged'),
        (b"[]", "no COCO json of objects: it holds no lists .* but is a list"),
        ({"images": None}, "has no list \"images\", but 'annotations', 'categories'"),
        ({"categories": []}, 'the list "categories" of "x.json" is empty'),
        ({"annotations": [{"id": 1, "caption": "a dog"}]}, 'have no "category_id", but \'id\''),
        ({"annotations": [square(4), 5]}, 'annotation number 1 of "x.json" is no object'),
        ({"annotations": [square(4, image=8)]}, 'annotation 4 of "x.json" has the image_id 8'),
        ({"annotations": [square(4, category=[1])]}, "has the category_id \\[1\\], which none of"),
        ({"images": [{"id": "b"}]}, "image 'b' of \"x.json\" has the \"id\" 'b'; it must be a"),
        ({"images": [{"id": 1}]}, 'image 1 of "x.json" has no "file_name"'),
        ({"images": [IMAGES[0] | {"height": 0}]}, 'has the "height" 0; it must be at least 1'),
        ({"images": [*IMAGES, IMAGES[1]]}, '2 images of "x.json" have the id 3'),
        ({"categories": CATEGORIES * 2}, '2 categories of "x.json" have the id 90'),
        (
            {"annotations": [square(4), square(5, image=3, segmentation=CODE)]},
            r"annotation 5 of .* \(height, width\) \[20, 30\], but its image has \[24, 16\]",
        ),
        (
            {"annotations": [square(4, segmentation=[1, 2, 8, 8])]},
            "annotation 4 of .* has a list of 4 numbers where polygons are due",
        ),
        (
            {"annotations": [square(4, segmentation=None), square(5, segmentation=[])]},
            "no annotation of \"x.json\" has a mask .*; train a detector of boxes",
        ),
    ],
)  # fmt: skip
def test_a_json_that_is_wrong_as_a_whole(content, message):
    if isinstance(content, dict):
        content = (
            json.dumps(document(square(1)) | content).encode().replace(b'"images": null, ', b"")
        )
    with pytest.raises(UserError, match=message):
        parse(content, "x.json", masks=True)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_anything_may_stand_anywhere(data):
    """In a json that is wrong in one place, either something is left out or an error tells it."""
    whole = json.loads(json.dumps(document(square(1), square(2, segmentation=CODE))))
    places = [(whole, key) for key in whole]
    places += [(entry, key) for entries in whole.values() for entry in entries for key in entry]
    places += [(whole["annotations"][1]["segmentation"], key) for key in CODE]
    entry, key = data.draw(st.sampled_from(places))
    entry[key] = data.draw(ANYTHING)
    count = len(whole["annotations"]) if isinstance(whole["annotations"], list) else None
    try:
        found = parse(json.dumps(whole).encode(), "x.json", masks=True)
    except UserError as error:
        assert "x.json" in str(error)
    else:
        assert len(found.labels) + len(found.left_out) == count


# --- Data sets

COLOURS = {"a.png": 40, "b.png": 80, "c.png": 120}


def encoded(pixels, kind="png", **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def write_split(root, split, *annotations, folder=None, **changes):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    whole = document(*annotations, **changes)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(whole))
    (root / (folder or split)).mkdir(exist_ok=True)
    for image in whole["images"]:
        colour = COLOURS.get(image["file_name"], 0)
        pixels = np.full((image["height"], image["width"], 3), colour, np.uint8)
        (root / (folder or split) / image["file_name"]).write_bytes(encoded(pixels))


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "coco"
    write_split(root, "train2017", square(1), square(2, image=3), square(3, image=5, iscrowd=1))
    write_split(root, "val2017", square(1))
    return root


@pytest.fixture
def load(tmp_path):
    """Loads with masks, and a cache of the test's own."""

    def load(path, **options):
        options = {"masks": True, "cache": tmp_path / "cache"} | options
        return coco.load(f"coco:{path}", **options)

    return load


@pytest.mark.parametrize("kind", ["folder", "zip", "zip with a folder", "folder in a folder"])
def test_where_a_data_set_may_lie(root, load, kind):
    expected = load(root).identity()
    if kind == "folder in a folder":
        root = shutil.move(root, root.parent / "outer" / "coco")
        root = root.parent
    elif kind == "zip":
        root = shutil.make_archive(root.parent / "all", "zip", root)
    elif kind == "zip with a folder":
        root = shutil.make_archive(root.parent / "all", "zip", root.parent, "coco")
    found = load(root)
    assert found.identity() == expected
    assert found.category_names == ("cat", "dog") and found.left_out == ()
    split = pickle.loads(pickle.dumps(found.train))  # as for worker processes
    assert [split.name_of(i).rpartition("/")[2] for i in range(3)] == [
        "b.png (id 7)",
        "a.png (id 3)",
        "c.png (id 5)",
    ]
    for index, colour in enumerate((80, 40, 120)):
        assert np.asarray(Image.open(io.BytesIO(split.content(index))))[0, 0, 0] == colour


def test_the_data_is_told_from_other_data(root, load):
    identity = load(root).identity()
    write_split(root, "val2017", square(1, x=5))
    changed = {name for name, value in load(root).identity().items() if value != identity[name]}
    assert changed == {"val digest"}
    (root / "train2017/a.png").write_bytes(encoded(np.zeros((24, 16, 3), np.uint8)))
    assert load(root).identity()["training digest"] != identity["training digest"]


def test_parts_that_lie_elsewhere(root, load, tmp_path):
    expected = load(root).identity()
    json_file = shutil.move(root / "annotations/instances_val2017.json", tmp_path / "truth.json")
    images = shutil.move(root / "val2017", tmp_path / "pictures")
    val = Paths(pathlib.Path(json_file), pathlib.Path(images))
    assert load(root, val=val).identity() == expected
    with pytest.raises(UserError, match=r"no annotations/instances_val\*.json; name the file with"):
        load(root)
    with pytest.raises(UserError, match='no folder "truth", and not exactly one val.*--val-images'):
        load(root, val=Paths(annotations=val.annotations))
    with pytest.raises(UserError, match='there is no file ".*x.json" \\(--val-annotations\\)'):
        load(root, val=Paths(annotations=tmp_path / "x.json"))


def test_images_without_objects_are_kept_or_left_out(root, load):
    assert len(load(root).train) == 3
    few = load(root, empty_images=False)
    assert few.train.annotations.image_ids.tolist() == [7, 3] and len(few.val) == 3
    assert [pathlib.Path(name).name for name in few.train.files] == ["b.png", "a.png"]


def test_a_json_is_parsed_once(root, load, tmp_path, monkeypatch):
    expected = load(root).identity()
    kept = sorted((tmp_path / "cache").glob("*.npz"))
    assert len(kept) == 2
    with monkeypatch.context() as patch:
        patch.setattr(coco, "parse", None)
        assert load(root).identity() == expected
    for file in kept:
        file.write_bytes(file.read_bytes()[:-200])
    assert load(root).identity() == expected
    monkeypatch.setattr(coco, "parse", None)
    assert load(root).identity() == expected  # mended
    (tmp_path / "no folder").write_text("")
    with pytest.raises(TypeError):  # what cannot be kept is parsed each time
        load(root, cache=tmp_path / "no folder")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda root: shutil.rmtree(root), 'there is no "'),
        (lambda root: shutil.rmtree(root / "annotations"), r"no annotations/instances_train\*"),
        (lambda root: shutil.rmtree(root / "train2017"), 'has no folder "train2017", and not'),
        (
            lambda root: (root / "train2017/a.png").unlink(),
            r'1 image of ".*train2017.json" cannot be found in ".*", as "a.png" \(id 3\); add',
        ),
        (
            lambda root: write_split(root, "train", square(1)),
            'has "annotations/instances_train.json" and "annotations/instances_train2017.json"',
        ),
        (
            lambda root: write_split(root, "val2017", categories=CATEGORIES[:1]),
            'train2017.json" has the category 2, "cat", which ".*val2017.json" has not',
        ),
        (
            lambda root: write_split(root, "train2017", square(1, iscrowd=1)),
            'train2017.json" has no object to train on; give annotations that have some',
        ),
        (
            lambda root: write_split(root, "train2017", square(1, bbox=[0, 0, 0, 0])),
            "no object to train on, but 1 annotation with a box of no size \\(id 1\\); give",
        ),
    ],
)
def test_no_data_set(root, load, change, message):
    change(root)
    with pytest.raises(UserError, match=message):
        load(root)


def test_no_place_of_a_data_set(root, load, tmp_path):
    with pytest.raises(UserError, match='--data must be "coco:PATH", got "folder:x"'):
        coco.load("folder:x", masks=True)
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match="neither a folder nor a zip file"):
        load(tmp_path / "x.zip")
    archive = shutil.make_archive(root.parent / "all", "zip", root)
    with zipfile.ZipFile(archive) as zipped:
        member = zipped.getinfo("annotations/instances_train2017.json")
    with open(archive, "r+b") as file:
        file.seek(member.header_offset + 70)
        file.write(b"damaged")
    with pytest.raises(UserError, match='instances_train2017.json" cannot be read: '):
        load(archive)


def test_what_is_left_out_is_told(root, load):
    bad = [square(k, bbox=[0, 0, 0, 1]) for k in range(2, 9)]
    write_split(root, "train2017", square(1), *bad)
    (line,) = load(root).left_out
    assert line.startswith("7 annotations with a box of no size (id 2, 3, 4, 5, 6, ...) of ")
    split = load(root).val
    assert split.without_slot(1) is None
    write_split(root, "val2017", *map(square, range(1, 6)), square(6, image=3))
    assert load(root).val.without_slot(2).startswith("3 objects beyond 2 in 1 image of ")


# --- Samples


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "I;16", "RGBA", "1"])
def test_modes_of_images(mode):
    image = Image.fromarray(picture(20, 30))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    content = encoded(image, "tiff" if mode == "CMYK" else "png")
    pixels = samples.decode(content, 20, 30)
    expected = image.convert("RGB") if mode != "I;16" else Image.fromarray(picture(20, 30)[..., 0])
    np.testing.assert_array_equal(pixels, np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_that_are_to_be_turned(orientation):
    stored = picture(20, 30)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(stored, exif=exif)
    np.testing.assert_array_equal(samples.decode(content, *upright.shape[:2]), upright)
    if orientation >= 5:  # people have annotated what is stored
        np.testing.assert_array_equal(samples.decode(content, 20, 30), stored)
    with pytest.raises(BrokenImageError, match=r"but 25 x 30 in the annotations"):
        samples.decode(content, 25, 30)


@pytest.mark.parametrize(
    "content,why",
    [
        (b"", "the file is empty"),
        (b"GIF", "not an image of a format"),
        (encoded(picture(20, 30))[:-300], "truncated"),
    ],
)
def test_images_that_cannot_be_decoded(content, why):
    with pytest.raises(BrokenImageError, match=why):
        samples.decode(content, 20, 30)


def test_a_training_sample():
    image = picture(24, 16)
    annotations = parsed(
        square(1, image=3, category=2, x=1, y=2, side=6),
        square(2, image=3, iscrowd=1),
        square(3, image=3, x=12, y=20, side=8),  # partly outside
        square(4, image=3, bbox=[15.999999999, 3, 1, 1]),  # no size in float32
    )
    objects = annotations.objects(1)
    preparation = Preparation(min_size=32, max_size=64, slots=4, mask_size=4, flip=True)
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(6):
        sample = preparation.training(encoded(image), 24, 16, objects, Canvas(64, 64), generator)
        assert sample["size"].tolist() == [48, 32]
        assert not sample["image"][48:].any() and not sample["image"][:, 32:].any()
        assert sample["labels"].tolist() == [1, 2, 0, 0]
        pixels = sample["image"][:48, :32]
        mirrored = sample["boxes"][0, 0] > 16
        seen.add(bool(mirrored))
        source = image[:, ::-1] if mirrored else image
        np.testing.assert_array_equal(pixels, resampling.resized(source, 48, 32))
        boxes = (
            [[18, 4, 30, 16], [0, 40, 8, 48]] if mirrored else [[2, 4, 14, 16], [24, 40, 32, 48]]
        )
        np.testing.assert_array_equal(sample["boxes"], [*boxes, [0] * 4, [0] * 4])
        mask = mask_of(objects.masks[2], 24, 16)
        box = [0, 20, 4, 24] if mirrored else [12, 20, 16, 24]
        expected = 255 * roi_align(mask[:, ::-1] if mirrored else mask, box, 4)
        assert np.abs(sample["masks"][1] - expected).max() <= 0.5 + 1e-4
        assert not sample["masks"][2:].any()
    assert seen == {True, False}
    shapes = preparation.batch_shapes(Canvas(64, 64), 2)
    assert {n: (2, *a.shape) for n, a in sample.items()} == {n: s.shape for n, s in shapes.items()}
    assert {n: a.dtype for n, a in sample.items()} == {n: s.dtype for n, s in shapes.items()}
    evaluated = preparation.evaluation(encoded(image), 24, 16, Canvas(64, 64))
    np.testing.assert_array_equal(evaluated["image"][:48, :32], resampling.resized(image, 48, 32))
    shapes = preparation.evaluation_batch_shapes(Canvas(64, 64), 2)
    assert {n: (2, *a.shape) for n, a in evaluated.items()} == {
        n: s.shape for n, s in shapes.items()
    }


def test_scale_is_drawn_and_a_canvas_too_small_is_filled():
    preparation = Preparation(32, 64, slots=1, mask_size=0, jitter=(0.5, 1.0))
    generator = np.random.default_rng(0)
    objects = parsed(square(1, image=3), square(2, image=3, x=6), masks=False).objects(1)
    content = encoded(picture(24, 16))

    def drawn(canvas):
        return preparation.training(content, 24, 16, objects, canvas, generator)

    found = [drawn(Canvas(64, 32)) for _ in range(30)]
    heights = [int(sample["size"][0]) for sample in found]
    assert min(heights) >= 24 and max(heights) <= 48 and len(set(heights)) > 5
    for sample in found:
        assert set(sample) == {"image", "size", "boxes", "labels"}
        ratio = (sample["size"] / np.array([24, 16])).astype(np.float32)[[1, 0, 1, 0]]
        boxes = np.array([[4, 5, 12, 13], [6, 5, 14, 13]], np.float32) * ratio
        assert np.abs(sample["boxes"] - boxes).max(axis=1).min() < 1e-4  # either of the two
    assert len({tuple(sample["boxes"][0] / sample["size"][0]) for sample in found}) > 10
    assert {tuple(drawn(Canvas(32, 64))["size"]) for _ in range(30)} >= {(32, 21)}
    with pytest.raises(ValueError, match="jitter must be a range"):
        Preparation(32, 64, 1, 0, jitter=(0.5, 1.5))
    with pytest.raises(ValueError, match="min_size must be at least 1 and at most max_size"):
        Preparation(65, 64, 1, 0)
    with pytest.raises(ValueError, match="slots must be at least 1"):
        Preparation(32, 64, 0, 0)


# --- Batches

SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 7), st.integers(0, 3))
def test_every_image_on_a_canvas_once(sizes, batch_size, epoch):
    heights, widths = np.array(sizes).T
    found = Canvases.of(heights, widths, 96, 160)
    assert set(found.shapes) <= {(96, 96), (96, 128), (128, 96), (96, 160), (160, 96)}
    resized = [samples.resized_size(h, w, 96, 160) for h, w in sizes]
    for size, place in zip(resized, found.smallest, strict=True):
        holding = [c for c in found.shapes if c.height >= size[0] and c.width >= size[1]]
        assert found.shapes[place] in holding
        assert np.prod(found.shapes[place]) == min(np.prod(canvas) for canvas in holding)
    groups = found.epoch(batch_size, 0, epoch)
    assert len(groups) == found.steps(batch_size) == len(sizes) // batch_size
    images = [i for group in groups for i in group.images.tolist()]
    assert len(set(images)) == len(images) == len(groups) * batch_size
    too_small = [
        group
        for group in groups
        if any(s > c for i in group.images for s, c in zip(resized[i], group.canvas, strict=True))
    ]
    assert len(too_small) <= 1
    evaluated = found.evaluation(batch_size)
    for group in evaluated:
        assert len(group.images) == batch_size
        assert {found.shapes[found.smallest[i]] for i in group.images if i >= 0} == {group.canvas}
    images = np.concatenate([group.images for group in evaluated])
    assert sorted(images[images >= 0]) == list(range(len(sizes)))


def test_the_order_is_drawn_by_seed_and_epoch():
    heights, widths = np.random.default_rng(0).integers(100, 300, (2, 50))
    found = Canvases.of(heights, widths, 96, 160)

    def order(*args):
        return [group.images.tolist() for group in found.epoch(4, *args)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    left_out = [set(range(50)).difference(*order(0, epoch)) for epoch in range(30)]
    assert {len(images) for images in left_out} == {2} and len(set().union(*left_out)) > 20


def test_canvases_of_photographs():
    found = Canvases.of(np.array([480, 640, 427, 500]), np.array([640, 427, 640, 500]), 800, 1333)
    assert found.shapes == ((800, 800), (800, 1088), (800, 1344), (1344, 800))
    assert found.smallest.tolist() == [1, 3, 2, 0]
    assert canvases._shapes(320, 320) == [(320, 320)]


COUNT = 17


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Images each of one colour that is its own, upright and lying, with a square on each."""
    root = tmp_path_factory.mktemp("many")
    for split in ("train", "val"):
        images, objects = [], []
        for i in range(COUNT):
            size = [(40, 60), (60, 40), (50, 50)][i % 3]
            name = f"{i}.png"
            images.append({"id": 100 - i, "file_name": name, "height": size[0], "width": size[1]})
            objects.append(square(i, image=100 - i, side=6 + i, segmentation=None))
            COLOURS[name] = 10 + 7 * i
        write_split(root, split, *objects, images=images)
    return coco.load(f"coco:{root}", masks=False, cache=root / "cache")


def feed(dataset, processes=1, process=0, batch=4, workers=0):
    preparation = Preparation(32, 64, slots=2, mask_size=0, jitter=(0.8, 1.0), flip=True)
    share = Share(batch, process, processes)
    return CocoImages(dataset.train, dataset.val, share, preparation, 0, Loading(workers, 2))


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.index.tolist() == other.index.tolist()
        assert batch.broken == other.broken
        for name in batch.arrays.keys() | other.arrays.keys():
            np.testing.assert_array_equal(batch.arrays[name], other.arrays[name])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_no_image_is_lost_or_twice(many, processes):
    parts = [feed(many, processes, process) for process in range(processes)]
    steps = parts[0].steps_per_epoch
    assert steps == COUNT // 4
    training = [take(part.training(0), 2 * steps) for part in parts]
    alone = take(feed(many).training(0), 2 * steps)
    expected = parts[0].canvases
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            shares = [part[step] for part in training]
            indices = np.concatenate([share.index for share in shares])
            assert sorted(indices) == sorted(alone[step].index)
            assert len({share.arrays["image"].shape for share in shares}) == 1
            assert shares[0].arrays["image"].shape[1:3] in expected.shapes
            for share in shares:
                for row, i in enumerate(share.index):
                    assert share.arrays["image"][row, 0, 0, 0] == 10 + 7 * i
                    box, size = share.arrays["boxes"][row, 0], share.arrays["size"][row]
                    height = many.train.annotations.heights[i]
                    assert abs(box[3] - box[1] - (6 + i) * size[0] / height) < 1e-4
            seen += indices.tolist()
        assert len(set(seen)) == len(seen) == steps * 4
    evaluation = [list(part.evaluation()) for part in parts]
    seen = []
    for shares in zip(*evaluation, strict=True):
        assert len({share.arrays["image"].shape for share in shares}) == 1
        for share in shares:
            assert set(share.arrays) == {"image", "size"}
            colours = np.where(share.index < 0, 0, 10 + 7 * share.index)
            np.testing.assert_array_equal(share.arrays["image"][:, 0, 0, 0], colours)
            seen += share.index[share.index >= 0].tolist()
    assert sorted(seen) == list(range(COUNT))


def test_going_on_in_the_midst_of_an_epoch(many):
    whole = take(feed(many).training(0), 9)
    assert_same(take(feed(many).training(6), 3), whole[6:])
    assert_same(take(feed(many, workers=1).training(6), 3), whole[6:])


def test_broken_images(many, tmp_path):
    root = shutil.copytree(many.train.reader.root, tmp_path / "broken")
    for name in ("train/4.png", "val/3.png"):
        (root / name).write_bytes(b"no image")
    dataset = coco.load(f"coco:{root}", masks=False, cache=root / "cache")
    why = "it is not an image of a format that Pillow reads"
    batches = take(feed(dataset).training(0), 12)
    broken = [batch for batch in batches if batch.broken]
    assert broken and all(batch.broken == {4: why} for batch in broken)
    for batch in batches:
        np.testing.assert_array_equal(batch.arrays["image"][:, 0, 0, 0], 10 + 7 * batch.index)
        assert 4 not in batch.index
    (batch,) = (batch for batch in feed(dataset).evaluation() if batch.broken)
    assert batch.broken == {3: why} and 3 in batch.index
    assert not batch.arrays["image"][batch.index == 3].any()


def test_what_cannot_be_fed(many):
    with pytest.raises(ValueError, match="mask_size must be 0 for annotations .* without masks"):
        masks = Preparation(32, 64, slots=2, mask_size=4)
        CocoImages(many.train, many.val, Share(4), masks, 0, Loading())
    with pytest.raises(UserError, match="--train.batch-size must be at most the 17 training"):
        _ = feed(many, batch=18).steps_per_epoch


# --- Real data


@pytest.mark.skipif(OUTSIDE is None, reason="DRCONV_DATA does not name the folder of data")
@pytest.mark.parametrize("name", ["tiny_coco", "nuclei_coco"])
def test_all_of_a_real_data_set(name, load, tmp_path):
    archive = pathlib.Path(OUTSIDE) / f"{name}.zip"
    dataset = load(archive)
    assert dataset.left_out == ()
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(tmp_path / name)
    for split, pattern in ((dataset.train, "train"), (dataset.val, "val")):
        (json_file,) = (tmp_path / name).glob(f"*/annotations/instances_{pattern}*.json")
        truth = COCO(json_file)
        found = split.annotations
        preparation = Preparation(800, 1333, slots=400, mask_size=28)
        shapes = Canvases.of(found.heights, found.widths, 800, 1333)
        for i, key in enumerate(found.image_ids):
            height, width = int(found.heights[i]), int(found.widths[i])
            objects = found.objects(i)
            theirs = truth.loadAnns(truth.getAnnIds(imgIds=[key]))
            for j, annotation in enumerate(theirs):
                assert truth.annToRLE(annotation)["counts"] in (
                    objects.masks[j],
                    objects.masks[j].decode(),
                )
                if name == "tiny_coco":
                    mask = rle.decoded(objects.masks[j], height, Window(0, 0, height, width))
                    np.testing.assert_array_equal(mask, truth.annToMask(annotation))
            if i < 100:
                sample = preparation.training(
                    split.content(i),
                    height,
                    width,
                    objects,
                    shapes.shapes[shapes.smallest[i]],
                    np.random.default_rng(0),
                )
                assert (sample["labels"] > 0).sum() == (~objects.crowd).sum()
