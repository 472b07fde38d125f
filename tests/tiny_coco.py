"""A COCO data set of drawn discs and rectangles, and a detector that learns of it in seconds."""

import importlib
import json
import sys

import numpy as np
from PIL import Image
from pycocotools import mask as codec

from experiments.detection.model import DetectorConfig

SIZES = ((32, 48), (48, 32))
CATEGORIES = [{"id": 7, "name": "rectangle"}, {"id": 90, "name": "disc"}]

NETWORK = [
    "--model.name", "maskrcnn_shufflenet_v2_x0_5_fpn", "--model.features", 8,
    "--model.box-features", 8, "--model.mask-features", 8, "--model.pre-nms", 32, 16,
    "--model.post-nms", 16, 8, "--model.anchors-per-image", 16, "--model.regions-per-image", 16,
    "--model.detections", 8, "--model.anchor-sizes", 8, 16, 32, 48, 64,
]  # fmt: skip
# The images lie on canvases of 64 x 96 and 96 x 64; those of training on the first, as a step is
# compiled for every canvas.
SMALL = [*NETWORK, "--min-size", 64, "--max-size", 96, "--slots", 4, "--mask-crop", 14]


def write(root, train=9, held_out=5):
    """Writes root/annotations/instances_*.json, root/train/ and root/val/."""
    for split, count, seed in (("train", train, 0), ("val", held_out, 1)):
        generator = np.random.default_rng(seed)
        images, objects = [], []
        (root / split).mkdir(parents=True)
        for number in range(count):
            size = SIZES[number % 2 if split == "val" else 0]
            pixels = generator.integers(0, 60, (*size, 3), np.uint8)
            entry = {"id": 10 + number, "file_name": f"{number}.png"}
            images.append(entry | {"height": size[0], "width": size[1]})
            for kind in range(number % 3):  # the first has no object
                objects.append({"id": len(objects) + 1, "image_id": entry["id"]})
                objects[-1] |= _drawn(pixels, kind, generator, crowd=number == 5 and kind == 1)
            Image.fromarray(pixels).save(root / split / entry["file_name"])
        document = {"images": images, "annotations": objects, "categories": CATEGORIES}
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    return root


def _drawn(pixels, kind, generator, *, crowd):
    """Draws a rectangle or a disc, and tells what COCO's json has of it."""
    height, width = pixels.shape[:2]
    side = int(generator.integers(12, 20))
    top, left = (int(generator.integers(0, length - side)) for length in (height, width))
    rows, columns = np.ogrid[:height, :width]
    inside = (abs(rows - top - side / 2) < side / 2) & (abs(columns - left - side / 2) < side / 2)
    if kind == 1:
        inside = np.hypot(rows - top - side / 2, columns - left - side / 2) < side / 2
    pixels[inside] = (220, 60, 40) if kind == 0 else (40, 80, 230)
    right, bottom = left + side, top + side
    annotation = {
        "category_id": CATEGORIES[kind]["id"],
        "bbox": [left, top, side, side],
        "area": int(inside.sum()),
        "iscrowd": int(crowd),
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
    }
    if kind == 1:
        code = codec.encode(np.asfortranarray(inside, np.uint8))
        annotation["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    if crowd:  # COCO's own have codes that are not packed
        runs = np.flatnonzero(np.diff(inside.T.ravel(), prepend=False, append=False))
        lengths = np.diff(runs, prepend=0, append=inside.size).tolist()
        annotation["segmentation"] = {"size": [height, width], "counts": lengths}
    return annotation


def with_one_block_a_stage():
    """Makes all detectors of this process shallow, to be traced and compiled in seconds."""
    build = DetectorConfig.build

    def shallow(config, num_classes):
        detector = build(config, num_classes)
        return detector.clone(backbone=detector.backbone.clone(blocks=(1, 1, 1)))

    DetectorConfig.build = shallow


if __name__ == "__main__":  # the command named by the first argument, with such detectors
    with_one_block_a_stage()
    sys.argv[0] = sys.argv.pop(1)
    importlib.import_module(sys.argv[0]).main()
