"""Trained networks: a detector as a run left it, and what a backbone starts from."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from drconv_jax.detection import FasterRCNN
from experiments.classification.trained import trained_network
from experiments.detection.config import Config
from experiments.detection.task import Detection
from experiments.runtime import run_folder
from experiments.runtime.errors import UserError
from experiments.runtime.loop import trained_variables
from experiments.runtime.task import Variables


class Detector(NamedTuple):
    """A run's network.

    Attributes:
      config: the run's options.
      model: the network.
      variables: the moving average's, where the run has one.
      categories: the names of the classes, from class 1 on, and their ids.
    """

    config: Config
    model: FasterRCNN
    variables: Variables
    categories: list[tuple[int, str]]


def read_detector(option: str, run_dir: pathlib.Path) -> Detector:
    """The network of a run of experiments.detection at its newest checkpoint.

    Args:
      option: that named the folder, for errors.
      run_dir: the run's folder.

    Raises:
      UserError: there is no such run, or it has no checkpoint.
    """
    config = run_folder.read_config(Config, option, run_dir)
    categories = _read_json(option, run_dir / "categories.json")
    model = config.model.build(len(categories))
    task = Detection(model, config.preparation, (), freeze=config.train.freeze)
    variables = trained_variables(task, config.train, run_dir, option)
    return Detector(config, model, variables, [(key, name) for key, name in categories])


def read_backbone(path: pathlib.Path) -> Variables:
    """Variables of a network, for a detector to start from.

    Args:
      path: the folder of a run of experiments.classification, of experiments.detection, whose
        backbone it is then, or a safetensors file of `drconv_jax.weights.save_weights`.

    Raises:
      UserError: it is nothing of these.
    """
    if path.is_dir():
        if (path / "categories.json").exists():
            variables = read_detector("--init", path).variables
            return {name: tree["backbone"] for name, tree in variables.items() if tree}
        return trained_network(path, "--init").variables
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f'--init: "{path}" is neither the folder of a run nor a safetensors file: {error}.'
        ) from None
    variables = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        place = variables
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = jnp.asarray(array)
    return variables


def _read_json(option: str, path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f'{option}: "{path}" cannot be read: {error}.') from None
