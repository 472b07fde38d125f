"""What an experiment brings to the training loop: a task, and the batches that feed it.

The loop (`loop.py`) and the compiled steps (`training.py`) know of an experiment what stands here,
and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.runtime.metrics import Row

Variables = Mapping[str, Any]
"""A network's "params" and "batch_stats"."""
DeviceBatch = Mapping[str, jax.Array]
"""A global batch on the devices; the first axis of every array is the batch."""
BatchShapes = Mapping[str, jax.ShapeDtypeStruct]
"""The shapes of a `DeviceBatch`."""


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """A process's share of a batch.

    Attributes:
      arrays: what goes to the devices; the first axis of each is the share.
      index: the samples' places in their split. In evaluation, -1 is padding, and the arrays of a
        sample that is in `broken` do not count either.
      broken: places of samples that could not be read on the way, and why.
    """

    arrays: dict[str, np.ndarray]
    index: Int[np.ndarray, share]
    broken: dict[int, str]


class Task(Protocol):
    """What is trained, and how it is judged."""

    @property
    def best(self) -> str:
        """The metric in an evaluation's row that ranks checkpoints, the higher the better.

        Where the recipe asks for an average of the weights, it is the average's that counts.
        """

    @property
    def reduces(self) -> bool:
        """Whether `evaluate` gives sums over the batch, which every process gets.

        If not, the first axis of all results is the batch, and a process gets its own share's.
        """

    def init(self, key: PRNGKeyArray) -> Variables:
        """The variables that training begins with."""

    def trained(self, params: Any) -> Any:
        """For every parameter, whether it is trained; the others stay as `init` made them."""

    def parted(self, params: Any) -> Any:
        """For every parameter, whether it lies in parts over all devices for good.

        Its first axis is parted, and nobody ever puts the parts together. In `loss` and `evaluate`
        there are zeros behind it, as many as make the parts equal; their gradients must be zero.
        """

    def batch_shapes(self, batch_size: int) -> tuple[BatchShapes, ...]:
        """Those of global batches of training, one for each size of the canvas."""

    def evaluation_batch_shapes(self, batch_size: int) -> tuple[BatchShapes, ...]:
        """Those of evaluation, whose batches may have other arrays."""

    def loss(
        self, variables: Variables, batch: DeviceBatch, key: PRNGKeyArray, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Any, Mapping[str, Float[Array, ""]]]]:
        """The loss of a batch, as a mean over its samples.

        Args:
          variables: of the network.
          batch: all samples count. With `Recipe.accumulate`, it is a part of a batch.
          key: of all that is random; another at every step.
          step: steps taken before.

        Returns:
          The loss, and with it the new batch statistics and named scalars, means too, that are
          shown and written down beside it: parts of the loss, an accuracy. The names "loss",
          "gradient_norm" and "learning_rate" are taken.
        """

    def evaluate(self, variables: Variables, batch: DeviceBatch) -> Any:
        """What an evaluation takes of a batch, as a tree of arrays; see `reduces`.

        Here and in `loss`, `jax.sharding.get_abstract_mesh` gives the mesh; batches are parted over
        all its axes.
        """

    def evaluation(self) -> Evaluation:
        """A new evaluation of the whole held-out split."""


class Evaluation(Protocol):
    """Makes metrics of what `Task.evaluate` gives, batch after batch."""

    def add(self, batch: HostBatch, results: Any) -> None:
        """Takes in a batch.

        Args:
          batch: this process's share of it.
          results: of `Task.evaluate`, on the host; unless they are sums, of this share.
        """

    def row(self) -> Row:
        """The metrics, the same on every process; it may exchange results with the others.

        Numbers are shown as they are; "regions", if there, is by layer what `regions.use` gives.

        Raises:
          DataLost: there is nothing to evaluate.
        """


class Named(Protocol):
    """A split whose samples have names."""

    def name_of(self, index: int) -> str:
        """Which sample it is, for people; also of one that cannot be read."""


class Feed(Protocol):
    """Where the batches of a task come from."""

    @property
    def train(self) -> Named:
        """The training split."""

    @property
    def test(self) -> Named:
        """The held-out split."""

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training split; UserError where there is none."""

    def training(self, step: int) -> Iterator[HostBatch]:
        """Endless full batches from a step on, a function of the seed and the step.

        On all processes the batches of a step have the same shapes: those of one canvas.

        Raises:
          DataLost: the data cannot be read any more.
        """

    def evaluation(self) -> Iterator[HostBatch]:
        """Batches that have every sample of the held-out split once, and padding.

        All processes have equally many, of the same shapes at the same turn.

        Raises:
          DataLost: the data cannot be read any more.
        """
