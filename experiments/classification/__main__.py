"""Trains a network, with DRConv or plain, to classify images.

Without arguments: a small DR-ShuffleNetV2 on scikit-learn's handwritten digits, in a few minutes on
a CPU. The run's folder gets config.json, metrics.jsonl, tensorboard/, checkpoints/, report.json and
guide_masks.png. Exit status: 0 when the run is done, 2 for a mistake that is the user's to mend, 75
when SIGTERM and 130 when Ctrl-C stopped the run; both save where it stands, for --resume, and end
at once where no step has been taken yet.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import jax
import tyro
from flax import linen as nn

from experiments.classification.config import PRESETS, ClassifierRecipe, Config, Preset
from experiments.classification.feed import LabelledImages
from experiments.classification.pictures import draw_guide_masks
from experiments.classification.task import Classification
from experiments.runtime import data, experiment, sources
from experiments.runtime.errors import UserError
from experiments.runtime.experiment import Experiment, Setup
from experiments.runtime.pipeline import Loading, Share


@dataclasses.dataclass(frozen=True)
class Arguments(experiment.Arguments):
    """Trains a network, with DRConv or plain, to classify images."""

    recipe: Preset = "small"
    """What all other options start from: "imagenet" trains as the ShuffleNetV2 paper does,
    "mobilenet" as torchvision trains MobileNetV2."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    classes: int = 1000
    """Classes in the dry run, which reads no data."""

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise UserError(f"--classes must be at least 1, got {self.classes}.")


def main() -> None:
    """The command."""
    experiment.main(EXPERIMENT)


def set_up(config: Config, loading: Loading) -> Setup:
    """Reads the data, and builds the network for its classes.

    Raises:
      UserError: there is something wrong with the data, or with the network for such images.
    """
    dataset = data.load(
        config.data,
        config.image_size,
        hold=config.hold,
        whole_images=config.train.augment == "resized-crop",
    )
    model = config.model.build(len(dataset.classes))
    task, feed = task_and_feed(model, dataset, config.train, config.image_size, loading)
    try:
        jax.eval_shape(task.init, jax.random.key(0))
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"--model: {error}") from None
    draw = functools.partial(draw_guide_masks, model=model, dataset=dataset, config=config)
    return Setup(
        task,
        feed,
        facts=dataset.identity(),
        summary=f"{len(dataset.train):,} training and {len(dataset.test):,} test images in "
        f"{len(dataset.classes)} classes",
        skipped=dataset.skipped,
        left_out=dataset.left_out,
        files={"classes.json": dataset.classes},
        pictures={"guide_masks.png": draw} if config.model.has_guide else {},
    )


def task_and_feed(
    model: nn.Module,
    dataset: sources.Dataset,
    recipe: ClassifierRecipe,
    image_size: int,
    loading: Loading = Loading(),
) -> tuple[Classification, LabelledImages]:
    """What is trained by a recipe, and this process's batches.

    Args:
      model: called as `model.apply(variables, images, train=...)`.
      dataset: the data.
      recipe: how to train.
      image_size: pixels a side.
      loading: how images come from a disk.
    """
    flips = dataset.flips if recipe.mirror == "auto" else recipe.mirror == "yes"
    crops = recipe.augment == "crop"
    task = Classification(model, image_size, crops, flips, recipe.label_smoothing)
    share = Share(recipe.batch_size, jax.process_index(), jax.process_count())
    feed = LabelledImages(
        dataset.train, dataset.test, share, image_size, recipe.augment, flips, recipe.seed, loading
    )
    return task, feed


def _task_without_data(arguments: Arguments) -> Classification:
    config = arguments.config
    model = config.model.build(arguments.classes)
    crops = config.train.augment == "crop"
    return Classification(model, config.image_size, crops, crops, config.train.label_smoothing)


def _absolute(config: Config) -> Config:
    return dataclasses.replace(config, data=data.absolute(config.data))


EXPERIMENT = Experiment(
    name="classification",
    description=__doc__,
    arguments=Arguments,
    presets=PRESETS,
    set_up=set_up,
    task_without_data=_task_without_data,
    absolute=_absolute,
)


if __name__ == "__main__":
    main()
