"""Detection as a task: the losses of a detector, and COCO's metrics of what it finds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from drconv_jax.detection import Detections, FasterRCNN, MaskRCNN, Objects, as_backbone, normalize
from drconv_jax.weights import LoadReport, load_matching
from experiments.detection import evaluation
from experiments.detection.annotations import Annotations
from experiments.detection.samples import Canvas, Preparation
from experiments.runtime import mesh as meshes
from experiments.runtime.errors import DataLost
from experiments.runtime.metrics import Row
from experiments.runtime.task import BatchShapes, DeviceBatch, HostBatch, Variables


@dataclasses.dataclass(frozen=True)
class Detection:
    """A detector's `Task`; for the arrays of its batches, see `Preparation`.

    Attributes:
      model: the detector.
      preparation: how images become samples.
      canvases, evaluation_canvases: of the batches of training and of evaluation.
      annotations: of the held-out images; None where nothing is evaluated.
      evaluator: computes the metrics.
      backbone: variables of a network that the backbone starts from.
      freeze: how the names of parameters begin that are not trained.
      seen: is called, on every process, with what an evaluation has found.
    """

    model: FasterRCNN
    preparation: Preparation
    canvases: tuple[Canvas, ...]
    evaluation_canvases: tuple[Canvas, ...] = ()
    annotations: Annotations | None = None
    evaluator: evaluation.Evaluator = evaluation.pycocotools
    backbone: Variables | None = None
    freeze: tuple[str, ...] = ()
    seen: Callable[[DetectorEvaluation], None] = lambda _: None

    reduces = False

    @property
    def best(self) -> str:
        """Average precision of masks, or of boxes where there are no masks."""
        return "segm_AP" if isinstance(self.model, MaskRCNN) else "bbox_AP"

    def init(self, key: PRNGKeyArray) -> Variables:
        """The network's own initial values, with the backbone's weights where they are given."""
        size = max(self.model.strides)
        images = jnp.zeros((1, size, size, 3))
        variables: Variables = self.model.init(key, images, jnp.array([[size, size]]))
        if self.backbone is not None:
            variables, _ = load_matching(variables, as_backbone(self.backbone))
        return variables

    def fitting(self) -> LoadReport:
        """What of the given weights fits the backbone.

        Raises:
          ValueError: nothing does.
        """
        bare = dataclasses.replace(self, backbone=None)
        shapes = jax.eval_shape(bare.init, jax.random.key(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        assert self.backbone is not None
        _, report = load_matching(zeros, as_backbone(self.backbone))
        return report

    def trained(self, params: Any) -> Any:
        """All but those whose names begin as `freeze` says."""

        def is_trained(path: Any, _: Any) -> bool:
            name = "/".join(part.key for part in path)
            return not name.startswith(self.freeze) if self.freeze else True

        return jax.tree_util.tree_map_with_path(is_trained, params)

    def parted(self, params: Any) -> Any:
        """None of them."""
        return jax.tree.map(lambda _: False, params)

    def batch_shapes(self, batch_size: int) -> tuple[BatchShapes, ...]:
        """Those on each canvas."""
        return tuple(self.preparation.batch_shapes(c, batch_size) for c in self.canvases)

    def evaluation_batch_shapes(self, batch_size: int) -> tuple[BatchShapes, ...]:
        """Images on each canvas, and their sizes."""
        return tuple(
            self.preparation.evaluation_batch_shapes(c, batch_size)
            for c in self.evaluation_canvases
        )

    def loss(
        self, variables: Variables, batch: DeviceBatch, key: PRNGKeyArray, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Any, Mapping[str, Float[Array, ""]]]]:
        """The sum of the detector's losses; beside it each of them."""
        del step
        objects = Objects(batch["boxes"], batch["labels"], batch.get("masks"))
        losses, updates = self.model.apply(
            variables,
            normalize(batch["image"], batch["size"]),
            batch["size"],
            objects,
            key,
            method="losses",
            mutable=["batch_stats"],
        )
        # Where batch norm is frozen, the statistics stay what they are.
        batch_stats = updates.get("batch_stats", variables.get("batch_stats", {}))
        return sum(losses.values(), start=jnp.zeros(())), (batch_stats, losses)

    def evaluate(self, variables: Variables, batch: DeviceBatch) -> dict[str, Array]:
        """What is found in each image, as `named` has it."""
        found: Any = self.model.apply(
            variables, normalize(batch["image"], batch["size"]), batch["size"]
        )
        return named(found)

    def evaluation(self) -> DetectorEvaluation:
        """COCO's metrics of the whole held-out split."""
        assert self.annotations is not None
        kinds: tuple[evaluation.Kind, ...] = ("bbox",)
        if isinstance(self.model, MaskRCNN):
            kinds = ("bbox", "segm")
        return DetectorEvaluation(self.annotations, kinds, self.evaluator, self.seen)


def named(found: Detections) -> dict[str, Array]:
    """Detections as "boxes", "scores", "labels", and, where there are any, "masks" in float16."""
    results = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
    if found.masks is not None:
        results["masks"] = found.masks.astype(jnp.float16)
    return results


class DetectorEvaluation:
    """Collects what `Detection.evaluate` gives.

    Attributes:
      results: what was found, once `row` is called that of all processes.
      metrics: by kind, once `row` is called.
    """

    def __init__(
        self,
        annotations: Annotations,
        kinds: tuple[evaluation.Kind, ...],
        evaluator: evaluation.Evaluator,
        seen: Callable[[DetectorEvaluation], None],
    ):
        self._annotations, self._kinds = annotations, kinds
        self._evaluator, self._seen = evaluator, seen
        self._parts: list[evaluation.Results] = []
        self.results = evaluation.Results((), [])
        self.metrics: dict[evaluation.Kind, evaluation.Evaluation] = {}

    def add(self, batch: HostBatch, results: Any) -> None:
        """Takes in what was found in a batch's images, and puts it into their frames."""
        self._parts.append(
            evaluation.results_of(
                self._annotations,
                batch.index,
                batch.arrays["size"],
                results["boxes"],
                results["scores"],
                results["labels"],
                results.get("masks"),
                batch.broken,
            )
        )

    def row(self) -> Row:
        """COCO's twelve numbers of boxes and of masks, as "bbox_AP" and so on.

        Besides, by category and under "categories", their average precision.
        """
        own = evaluation.Results.joined(self._parts)
        written = json.dumps([own.image_ids, own.detections])
        every = [json.loads(text) for text in meshes.strings_of_all_processes([written])]
        # The order of processes must not matter to the metric, which breaks ties by it.
        detections = [found for _, part in every for found in part]
        detections.sort(key=lambda found: (found["image_id"], -found["score"]))
        ids = evaluation.Results.joined(evaluation.Results(tuple(ids), []) for ids, _ in every)
        self.results = evaluation.Results(ids.image_ids, detections)
        if not self.results.image_ids:
            raise DataLost("none of the held-out images can be read")
        row: Row = {}
        names = dict(
            zip(
                self._annotations.category_ids.tolist(),
                self._annotations.category_names.tolist(),
                strict=True,
            )
        )
        for kind in self._kinds:
            metrics = evaluation.evaluate(
                self._annotations, self.results, kind, evaluator=self._evaluator
            )
            self.metrics[kind] = metrics
            row |= {f"{kind}_{name}": value for name, value in metrics.summary.items()}
            row[f"{kind}_categories"] = {
                names[key]: numbers["AP"] for key, numbers in metrics.by_category.items()
            }
        self._seen(self)
        return row
