"""Trains a network, with DRConv or plain, to tell people's faces apart.

`--data folder:PATH` is a tree PERSON/x.jpg or a zip of one. With a list of pairs as LFW's, it is
judged by pairs of people who were not trained on; with `--fold` by one fold of them, as LFW's
protocol "unrestricted, labelled outside data: none" has it, and `python -m experiments.face.lfw`
does so for several folds. The run's folder gets config.json, metrics.jsonl, tensorboard/,
checkpoints/, report.json, and the pictures roc.png, similarities.png, hardest_pairs.png and
guide_masks.png. `python -m experiments.face.compare RUN A.jpg B.jpg` compares two images. Exit
status: as that of experiments.classification.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments.face import faces, report
from experiments.face.config import PRESETS, Config, Preset
from experiments.face.feed import Decoded, FaceImages, in_memory
from experiments.face.task import FaceEvaluation, Recognition, task_of
from experiments.runtime import experiment
from experiments.runtime.errors import UserError
from experiments.runtime.experiment import Experiment, Setup
from experiments.runtime.pipeline import Loading, Share


@dataclasses.dataclass(frozen=True)
class Arguments(experiment.Arguments):
    """Trains a network, with DRConv or plain, to tell people's faces apart."""

    recipe: Preset = "lfw"
    """What all other options start from: "paper" and "insightface" are for millions of images."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    people: int = 1_000_000
    """People in the dry run, which reads no data."""

    def __post_init__(self) -> None:
        if self.people < 2:
            raise UserError(f"--people must be at least 2, got {self.people}.")


def main() -> None:
    """The command."""
    experiment.main(EXPERIMENT)


def set_up(config: Config, loading: Loading) -> Setup:
    """Finds the faces, and builds the network.

    Raises:
      UserError: there is something wrong with the data, or with the network for such images.
    """
    if not config.data:
        raise UserError('--data must be given: "folder:PATH", a tree PERSON/x.jpg or a zip of one.')
    found = faces.load(config)
    skipped: list[str] = []
    train, held_out = (
        in_memory(split, config.image_size, config.hold, f"reading {title} images", skipped)
        for split, title in ((found.train, "training"), (found.held_out, "held-out"))
    )
    labels = train.labels if isinstance(train, Decoded) else found.train.labels
    share = Share(config.train.batch_size, jax.process_index(), jax.process_count())
    feed = FaceImages(train, held_out, labels, share, config.image_size, config.train, loading)
    last: list[FaceEvaluation] = []
    task = dataclasses.replace(
        task_of(config, len(found.people), feed.steps_per_epoch),
        held_out=held_out.places if isinstance(held_out, Decoded) else np.arange(len(held_out)),
        pairs=found.pairs,
        judged=found.judged,
        seen=last.append,
    )
    try:
        jax.eval_shape(task.init, jax.random.key(0))
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"--model: {error}") from None
    return Setup(
        task,
        feed,
        facts=found.identity(),
        summary=f"{len(train):,} training images of {len(found.people):,} people and "
        f"{int(found.judged.sum()):,} pairs of {len(held_out):,} held-out images",
        skipped=skipped,
        left_out=found.left_out,
        files={"people.json": found.people},
        pictures=report.at_the_end(config, task, found, last),
    )


def _task_without_data(arguments: Any) -> Recognition:
    return task_of(arguments.config, arguments.people)


def _absolute(config: Config) -> Config:
    def full(path: str | None) -> str | None:
        return None if path is None else str(pathlib.Path(path).expanduser().absolute())

    def source(name: str) -> str:
        kind, _, path = name.partition(":")
        named = kind == "hf" and not pathlib.Path(path).expanduser().exists()
        return name if not path or named else f"{kind}:{full(path)}"

    pairs_data = None if config.pairs_data is None else source(config.pairs_data)
    return dataclasses.replace(
        config, data=source(config.data), pairs=full(config.pairs), pairs_data=pairs_data
    )


EXPERIMENT = Experiment(
    name="face",
    description=__doc__,
    arguments=Arguments,
    presets=PRESETS,
    set_up=set_up,
    task_without_data=_task_without_data,
    absolute=_absolute,
    may_change=("data", "pairs", "pairs_data", "train.epochs", "train.remat", "checkpoint."),
)


if __name__ == "__main__":
    main()
