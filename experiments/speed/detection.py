"""Detection: what its cases compute, and our contenders in them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from drconv_jax import DRConv
from drconv_jax.detection import MaskRCNN, Objects, levels_of, multilevel_roi_align, nms, normalize
from drconv_jax.models import create_model
from experiments.speed.cases import Case
from experiments.speed.measure import (
    DIRECTIONS,
    Contender,
    Direction,
    compiled,
    in_direction,
)

OURS = {"roi_align": "roi_align", "nms": "nms", "detector": "plain"}
WITH_DRCONV = "with DRConv"
STRIDES = (4, 8, 16, 32)
NMS_THRESHOLD = 0.7

_OBJECTS = 40  # in an image, so that the heads learn of about as many positives as they may
_CROP = 56  # pixels a side, of an object's mask


def directions(case: Case) -> tuple[Direction, ...]:
    """Those that a case is computed in; suppression has no gradient."""
    return DIRECTIONS[:1] if case.level == "nms" else DIRECTIONS


def contenders(case: Case, implementation: str | None) -> Iterator[Contender]:
    """Ours, compiled.

    Args:
      case: of detection.
      implementation: of the region convolution.
    """
    if case.level == "detector":
        yield from _detectors(case, implementation)
    elif case.level == "roi_align":
        maps, boxes = pyramid(case), jnp.asarray(draw_boxes(case))
        dy = jnp.ones(jax.eval_shape(functools.partial(roi_align, case), maps, boxes).shape)
        for direction in DIRECTIONS:
            yield in_direction(
                OURS[case.level], None, functools.partial(roi_align, case), maps, boxes,
                direction=direction, dy=dy,
            )  # fmt: skip
    else:
        suppress = functools.partial(nms, iou_threshold=NMS_THRESHOLD)
        boxes, scores = (jnp.asarray(array) for array in candidates(case))
        yield compiled(OURS[case.level], None, "forward", suppress, boxes, scores)


def pyramid(case: Case) -> list[Array]:
    """Feature maps of every one of `STRIDES`, of normal values."""
    rng = np.random.default_rng(0)
    sides = (case.size // stride for stride in STRIDES)
    shapes = ((case.batch, side, side, case.in_features) for side in sides)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def draw_boxes(case: Case) -> Float32[np.ndarray, "batch boxes 4"]:
    """Boxes within the image, from 16 pixels a side to all of it, small ones as often as large."""
    return _draw_boxes(np.random.default_rng(1), (case.batch, case.boxes), 16, case.size, case.size)


def candidates(case: Case) -> tuple[Float32[np.ndarray, "boxes 4"], Float32[np.ndarray, " boxes"]]:
    """Boxes and their scores, 20 boxes about each of the places where there are any."""
    rng = np.random.default_rng(2)
    about = _draw_boxes(rng, (case.boxes // 20,), 16, case.size / 2, case.size)
    sides = np.tile(about[:, 2:] - about[:, :2], 2).repeat(20, axis=0)
    moved = 0.1 * sides * rng.standard_normal((case.boxes, 4))
    return (about.repeat(20, axis=0) + moved).astype(np.float32), rng.random(case.boxes, np.float32)


def roi_align(case: Case, maps: list[Array], boxes: Array) -> Array:
    """The features of boxes, each on its own level of the pyramid."""
    levels = levels_of(boxes, len(maps))
    scales = [1 / stride for stride in STRIDES]
    size = (case.kernel, case.kernel)
    return multilevel_roi_align(maps, boxes, levels, size, spatial_scales=scales)


def detector(case: Case, regions: int | None = None, implementation: str | None = None) -> MaskRCNN:
    """The detector of a case: with DRConv where a number of regions is given, otherwise plain."""
    if regions is None:
        model = create_model(case.network, num_classes=case.features)
    else:
        conv = functools.partial(DRConv, regions=regions, implementation=implementation)
        model = create_model(f"dr_{case.network}", num_classes=case.features, conv=conv)
    assert isinstance(model, MaskRCNN)
    return model


def initial(model: MaskRCNN) -> Any:
    """Variables of a detector that finds as much as it may, as one does that is trained.

    Of one that finds nothing, torchvision's mask head would have nothing to do.
    """
    size = max(STRIDES)
    variables = jax.jit(model.init)(
        jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.array([[size, size]])
    )
    kernel = variables["params"]["box_head"]["class"]["kernel"]
    variables["params"]["box_head"]["class"]["kernel"] = 1000 * kernel
    return variables


def arrays(case: Case) -> dict[str, np.ndarray]:
    """A batch of noise with round objects, as `experiments.detection` reads it from a disk."""
    rng = np.random.default_rng(3)
    of_images = (case.batch, _OBJECTS)
    row, column = np.mgrid[:_CROP, :_CROP] - (_CROP - 1) / 2
    disc = np.where(row**2 + column**2 < (_CROP / 2) ** 2, 255, 0).astype(np.uint8)
    return {
        "image": rng.integers(256, size=(case.batch, case.size, case.size, 3), dtype=np.uint8),
        "size": np.full((case.batch, 2), case.size, np.int32),
        "boxes": _draw_boxes(rng, of_images, 32, case.size / 2, case.size),
        "labels": rng.integers(1, case.features + 1, size=of_images, dtype=np.int32),
        "masks": np.broadcast_to(disc, (*of_images, _CROP, _CROP)),
    }


def _detectors(case: Case, implementation: str | None) -> Iterator[Contender]:
    """Forward is inference; forward and backward is the training loss and its gradient."""
    batch = {name: jnp.asarray(array) for name, array in arrays(case).items()}
    images, sizes = normalize(batch["image"], batch["size"]), batch["size"]
    objects = Objects(batch["boxes"], batch["labels"], batch["masks"])
    for regions in (None, *case.regions):
        name = OURS[case.level] if regions is None else WITH_DRCONV
        model = detector(case, regions, implementation)
        variables = initial(model)
        yield compiled(name, regions, "forward", model.apply, variables, images, sizes)

        def loss(
            params: Any, stats: Any, images: Array, sizes: Array, objects: Objects, key: Array,
            model: MaskRCNN = model,
        ) -> Any:  # fmt: skip
            losses, updates = model.apply(
                {"params": params, **stats}, images, sizes, objects, key,
                method="losses", mutable="batch_stats",
            )  # fmt: skip
            return sum(losses.values(), start=jnp.zeros(())), updates

        params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
        step = jax.value_and_grad(loss, has_aux=True)
        key = jax.random.key(0)
        yield compiled(
            name, regions, "forward+backward", step, params, stats, images, sizes, objects, key
        )


def _draw_boxes(
    rng: np.random.Generator, shape: tuple[int, ...], least: float, most: float, size: int
) -> Float32[np.ndarray, "*shape 4"]:
    """Boxes in a square image, whose sides' logarithms are evenly distributed."""
    sides = np.exp(rng.uniform(np.log(least), np.log(most), (*shape, 2)))
    start = rng.uniform(0, size - sides)
    return np.concatenate([start, start + sides], axis=-1).astype(np.float32)
