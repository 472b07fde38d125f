"""Classification as a task: cross-entropy, accuracy, and how regions are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.runtime import regions
from experiments.runtime.errors import DataLost
from experiments.runtime.images import normalize, pad_crop_flip
from experiments.runtime.metrics import Row
from experiments.runtime.task import BatchShapes, DeviceBatch, HostBatch, Variables


@dataclasses.dataclass(frozen=True)
class Classification:
    """A classifier's `Task`.

    Batches have an "image", uint8 (batch, size, size, 3), and a "label", int32 (batch,). In
    evaluation, what does not count has label -1.

    Attributes:
      model: called as `model.apply(variables, images, train=...)`.
      image_size: pixels a side.
      crops: whether training pads images and crops them at random.
      flips: whether it mirrors these at random too.
      label_smoothing: of the loss.
    """

    model: nn.Module
    image_size: int
    crops: bool = False
    flips: bool = False
    label_smoothing: float = 0.0

    best = "test_accuracy"
    reduces = True

    def init(self, key: PRNGKeyArray) -> Variables:
        """The network's own initial values."""
        return self.model.init(key, jnp.zeros((1, self.image_size, self.image_size, 3)))

    def trained(self, params: Any) -> Any:
        """All of them."""
        return jax.tree.map(lambda _: True, params)

    def parted(self, params: Any) -> Any:
        """None of them."""
        return jax.tree.map(lambda _: False, params)

    def batch_shapes(self, batch_size: int) -> tuple[BatchShapes, ...]:
        """The one size of images."""
        size = self.image_size
        image = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)
        return ({"image": image, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)},)

    evaluation_batch_shapes = batch_shapes

    def loss(
        self, variables: Variables, batch: DeviceBatch, key: PRNGKeyArray, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Any, Mapping[str, Float[Array, ""]]]]:
        """Cross-entropy with smoothed labels; beside it the "accuracy"."""
        del step
        images, labels = batch["image"], batch["label"]
        if self.crops:
            images = pad_crop_flip(key, images, flip=self.flips)
        logits, updates = self.model.apply(
            variables, normalize(images), train=True, mutable=["batch_stats"]
        )
        logits = jnp.asarray(logits, jnp.float32)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1]), self.label_smoothing
        )
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        accuracy = (logits.argmax(-1) == labels).mean()
        return loss, (updates.get("batch_stats", {}), {"accuracy": accuracy})

    def evaluate(self, variables: Variables, batch: DeviceBatch) -> dict[str, Any]:
        """Sums over the images that count: "count", "loss", "correct", and "regions" by layer."""
        labels = batch["label"]
        logits, sown = self.model.apply(
            variables, normalize(batch["image"]), train=False, mutable="intermediates"
        )
        logits = jnp.asarray(logits, jnp.float32)
        real = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return {
            "count": real.sum(),
            "loss": jnp.where(real, losses, 0).sum(),
            "correct": (real & (logits.argmax(-1) == labels)).sum(),
            "regions": regions.positions_in_regions(
                variables["params"], sown.get("intermediates", {}), real
            ),
        }

    def evaluation(self) -> ClassifierEvaluation:
        """Means over the whole held-out split, and how regions are used there."""
        return ClassifierEvaluation()


class ClassifierEvaluation:
    """Adds up what `Classification.evaluate` gives."""

    def __init__(self) -> None:
        self._sums: Any = None

    def add(self, batch: HostBatch, results: Any) -> None:
        """Takes in a batch's sums."""
        del batch
        values = jax.tree.map(np.float64, results)
        self._sums = values if self._sums is None else jax.tree.map(np.add, self._sums, values)

    def row(self) -> Row:
        """The metrics "test_loss" and "test_accuracy", and "regions"."""
        sums = self._sums
        if not sums["count"]:
            raise DataLost("none of the test images can be read")
        return {
            "test_loss": float(sums["loss"] / sums["count"]),
            "test_accuracy": float(sums["correct"] / sums["count"]),
            "regions": {layer: regions.use(n) for layer, n in sums["regions"].items()},
        }
