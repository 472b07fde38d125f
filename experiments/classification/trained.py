"""The network of a run of classification, for what uses it when it is trained."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn

from experiments.classification.config import Config
from experiments.classification.task import Classification
from experiments.runtime import run_folder
from experiments.runtime.errors import UserError
from experiments.runtime.loop import trained_variables


class TrainedNetwork(NamedTuple):
    """A network with its weights.

    Attributes:
      config: the run's options.
      model: called as `model.apply(variables, images)`, of normalized images, for logits.
      variables: "params" and "batch_stats".
    """

    config: Config
    model: nn.Module
    variables: dict[str, Any]


def trained_network(
    run_dir: pathlib.Path, option: str, *, in_float32: bool = False
) -> TrainedNetwork:
    """The network of a run at its newest checkpoint.

    Args:
      run_dir: the run's folder.
      option: that named the folder, for errors.
      in_float32: whether it computes in float32 even where the run did not.

    Raises:
      UserError: there is no such run, or it has no checkpoint.
    """
    config = run_folder.read_config(Config, option, run_dir)
    try:
        classes = json.loads((run_dir / "classes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f'{option}: "{run_dir}" has no readable classes.json: {error}.') from None
    network = dataclasses.replace(config.model, dtype="float32") if in_float32 else config.model
    model = network.build(len(classes))
    task = Classification(model, config.image_size)
    return TrainedNetwork(config, model, trained_variables(task, config.train, run_dir, option))
