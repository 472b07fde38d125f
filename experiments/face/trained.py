"""The network of a run of face recognition, for what uses it when it is trained."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from drconv_jax.models import EmbeddingNetwork, MobileFaceNet
from experiments.face.config import Config
from experiments.face.task import network_of, task_of
from experiments.runtime import run_folder
from experiments.runtime.errors import UserError
from experiments.runtime.loop import trained_variables
from experiments.runtime.task import Variables


class Embedder(NamedTuple):
    """A run's network.

    Attributes:
      config: the run's options.
      model: called as `model.apply(network, images)`, of normalized images, for embeddings.
      network: its variables; the moving average's, where the run has one.
    """

    config: Config
    model: MobileFaceNet | EmbeddingNetwork
    network: Variables


def read_embedder(option: str, run_dir: pathlib.Path) -> Embedder:
    """The network of a run at its newest checkpoint.

    Args:
      option: that named the folder, for errors.
      run_dir: the run's folder.

    Raises:
      UserError: there is no such run, or it has no checkpoint.
    """
    config = run_folder.read_config(Config, option, run_dir)
    people = _read_json(option, run_dir / "people.json")
    task = task_of(config, len(people))
    variables = trained_variables(task, config.train, run_dir, option)
    return Embedder(config, task.model, network_of(variables))


def _read_json(option: str, path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f'{option}: "{path}" cannot be read: {error}.') from None
