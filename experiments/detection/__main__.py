"""Trains a detector, with DRConv or plain, on a COCO data set: boxes, or boxes and masks.

`--data coco:PATH` is a folder or a zip with annotations/instances_train*.json and
instances_val*.json and the images' folders. The run's folder gets config.json, metrics.jsonl,
tensorboard/, checkpoints/, report.json, detections.json (COCO's results), evaluation.json (its
metrics, by category too), and the pictures detections.png, precision_recall.png and
guide_masks.png. `python -m experiments.detection.predict RUN IMAGE` finds objects in other images.
Exit status: as that of experiments.classification.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import jax
import tyro

from experiments.detection import coco, evaluation, report
from experiments.detection.canvases import photograph
from experiments.detection.config import PRESETS, Config, Preset
from experiments.detection.feed import CocoImages
from experiments.detection.task import Detection, DetectorEvaluation
from experiments.detection.trained import read_backbone
from experiments.runtime import experiment
from experiments.runtime.errors import UserError
from experiments.runtime.experiment import Experiment, Setup
from experiments.runtime.pipeline import Loading, Share

_EVALUATORS = {"pycocotools": evaluation.pycocotools, "hotcoco": evaluation.hotcoco}


@dataclasses.dataclass(frozen=True)
class Arguments(experiment.Arguments):
    """Trains a detector, with DRConv or plain, on a COCO data set."""

    recipe: Preset = "small"
    """What all other options start from: "1x" is how the field trains on COCO."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    classes: int = 80
    """Classes in the dry run, which reads no data."""

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise UserError(f"--classes must be at least 1, got {self.classes}.")


# Where things lie, and how they are measured: no part of what is trained.
_WHERE = (
    "data", "train_annotations", "train_images", "val_annotations", "val_images", "init",
    "evaluator",
)  # fmt: skip


def main() -> None:
    """The command."""
    experiment.main(EXPERIMENT)


def set_up(config: Config, loading: Loading) -> Setup:
    """Reads the annotations, and builds the network for their categories.

    Raises:
      UserError: there is something wrong with the data, or with what the backbone starts from.
    """
    if not config.data and None in (
        config.train_annotations,
        config.train_images,
        config.val_annotations,
        config.val_images,
    ):
        raise UserError('--data must be given: "coco:PATH", a folder or a zip of a COCO data set.')
    dataset = coco.load(
        config.data or "coco:.",
        masks=config.model.has_masks,
        empty_images=config.empty_images,
        train=config.train_paths,
        val=config.val_paths,
    )
    share = Share(config.train.batch_size, jax.process_index(), jax.process_count())
    feed = CocoImages(
        dataset.train, dataset.val, share, config.preparation, config.train.seed, loading
    )
    last: list[DetectorEvaluation] = []
    task = Detection(
        config.model.build(len(dataset.category_names)),
        config.preparation,
        feed.canvases.shapes,
        feed.test_canvases.shapes,
        dataset.val.annotations,
        _EVALUATORS[config.evaluator],
        None if config.init is None else read_backbone(pathlib.Path(config.init)),
        config.train.freeze,
        last.append,
    )
    if task.backbone is not None:
        try:
            print(f"--init {config.init}: {task.fitting()}")
        except ValueError as error:
            raise UserError(f"--init: {error}") from None
    crowded = dataset.train.without_slot(config.slots)
    annotations = dataset.train.annotations
    return Setup(
        task,
        feed,
        facts=dataset.identity(),
        summary=f"{len(dataset.train):,} training images with {annotations.object_counts().sum():,}"
        f" objects and {len(dataset.val):,} held-out images in {len(dataset.category_names)} "
        "categories",
        left_out=[*dataset.left_out, *([crowded] if crowded else [])],
        files={
            "categories.json": list(
                zip(
                    annotations.category_ids.tolist(),
                    annotations.category_names.tolist(),
                    strict=True,
                )
            )
        },
        pictures=report.at_the_end(config, task, feed, last),
    )


def _task_without_data(arguments: Arguments) -> Detection:
    config = arguments.config
    model = config.model.build(arguments.classes)
    canvases = (photograph(config.min_size, config.max_size),)
    return Detection(model, config.preparation, canvases, canvases, freeze=config.train.freeze)


def _absolute(config: Config) -> Config:
    def full(path: str | None) -> str | None:
        return None if path is None else str(pathlib.Path(path).expanduser().absolute())

    kind, _, path = config.data.partition(":")
    return dataclasses.replace(
        config,
        data=f"{kind}:{full(path)}" if path else config.data,
        init=full(config.init),
        train_annotations=full(config.train_annotations),
        train_images=full(config.train_images),
        val_annotations=full(config.val_annotations),
        val_images=full(config.val_images),
    )


EXPERIMENT = Experiment(
    name="detection",
    description=__doc__,
    arguments=Arguments,
    presets=PRESETS,
    set_up=set_up,
    task_without_data=_task_without_data,
    absolute=_absolute,
    may_change=(*_WHERE, "train.epochs", "train.remat", "checkpoint."),
)


if __name__ == "__main__":
    main()
