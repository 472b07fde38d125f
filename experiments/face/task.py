"""Face recognition as a task: a margin softmax over people, judged by pairs of images of others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from drconv_jax.margin_softmax import Margin, margin_softmax
from drconv_jax.models import EmbeddingNetwork, MobileFaceNet
from experiments.face import protocols
from experiments.face.config import Config
from experiments.face.pairs import Pairs
from experiments.runtime import mesh as meshes
from experiments.runtime.errors import DataLost
from experiments.runtime.images import normalize
from experiments.runtime.metrics import Row
from experiments.runtime.task import BatchShapes, DeviceBatch, HostBatch, Variables

_SPREAD = 0.01  # standard deviation of class centres at first, as InsightFace has it


@dataclasses.dataclass(frozen=True)
class Recognition:
    """A face embedder's `Task`.

    Batches of training have an "image", uint8 (batch, height, width, 3), and a "label", int32
    (batch,); those of evaluation have images alone. The parameters are those of the "network", and
    the "centres" of all people, which lie in parts over the devices for good.

    Attributes:
      model: called as `model.apply(variables, images, train=...)`, for embeddings.
      image_size: height and width.
      people: who are trained on.
      margin: of the softmax.
      grow_steps: steps in which the margin grows from 0.
      sample: see `margin_softmax`.
      flip: whether images of training are mirrored at random, and an embedding is that of an image
        and its mirror image together.
      held_out: the numbers by which `pairs` means the held-out images; some may be missing.
      pairs: pairs of these; None where nothing is evaluated.
      judged: the pairs that count; see `faces.Faces`.
      seen: is called, on every process, with every evaluation.
    """

    model: MobileFaceNet | EmbeddingNetwork
    image_size: tuple[int, int]
    people: int
    margin: Margin
    grow_steps: float = 0.0
    sample: float | None = None
    flip: bool = True
    held_out: Int[np.ndarray, images] | None = None
    pairs: Pairs | None = None
    judged: Bool[np.ndarray, pairs] | None = None
    seen: Callable[[FaceEvaluation], None] = lambda _: None

    best = "accuracy"
    reduces = False

    def init(self, key: PRNGKeyArray) -> Variables:
        """The network's own initial values, and class centres that are drawn."""
        network_key, centres_key = jax.random.split(key)
        variables = self.model.init(network_key, jnp.zeros((1, *self.image_size, 3)))
        assert self.model.embedding_size is not None
        shape = (self.people, self.model.embedding_size)
        centres = _SPREAD * jax.random.normal(centres_key, shape)
        return {**variables, "params": {"network": variables["params"], "centres": centres}}

    def trained(self, params: Any) -> Any:
        """All of them."""
        return jax.tree.map(lambda _: True, params)

    def parted(self, params: Any) -> Any:
        """The class centres."""
        return {"network": jax.tree.map(lambda _: False, params["network"]), "centres": True}

    def batch_shapes(self, batch_size: int) -> tuple[BatchShapes, ...]:
        """The one size of images."""
        (images,) = self.evaluation_batch_shapes(batch_size)
        return ({**images, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)},)

    def evaluation_batch_shapes(self, batch_size: int) -> tuple[BatchShapes, ...]:
        """The one size of images."""
        return ({"image": jax.ShapeDtypeStruct((batch_size, *self.image_size, 3), jnp.uint8)},)

    def loss(
        self, variables: Variables, batch: DeviceBatch, key: PRNGKeyArray, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Any, Mapping[str, Float[Array, ""]]]]:
        """The margin softmax; beside it the "cosine" to the own centre, and the "accuracy"."""
        images = batch["image"]
        flip_key, sample_key = jax.random.split(key)
        if self.flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        params = variables["params"]
        embeddings, updates = self.model.apply(
            network_of(variables),
            normalize(images),
            train=True,
            mutable=["batch_stats"],
        )
        strength = jnp.minimum(step / self.grow_steps, 1.0) if self.grow_steps else 1.0
        found = margin_softmax(
            embeddings,
            params["centres"],
            batch["label"],
            self.margin,
            strength=strength,
            num_classes=self.people,
            axes=meshes.AXES,
            sample=self.sample,
            key=sample_key,
        )
        scalars = {"cosine": found.cosine, "accuracy": found.accuracy}
        return found.loss, (updates.get("batch_stats", {}), scalars)

    def evaluate(
        self, variables: Variables, batch: DeviceBatch
    ) -> Float[Array, "batch embedding_size"]:
        """Embeddings of the images, of unit length, in float32."""
        network = network_of(variables)
        return unit_embeddings(self.model.apply, network, batch["image"], flip=self.flip)

    def evaluation(self) -> FaceEvaluation:
        """The protocol of the pairs."""
        assert self.held_out is not None
        assert self.pairs is not None and self.judged is not None
        return FaceEvaluation(self.held_out, self.pairs, self.judged, self.seen)


def task_of(config: Config, people: int, steps_per_epoch: int = 1) -> Recognition:
    """The task of a run, but for the pairs that it is judged by."""
    sample = config.margin.sample
    return Recognition(
        config.model.build(),
        config.image_size,
        people,
        config.margin.build(),
        config.margin.grow_epochs * steps_per_epoch,
        None if sample == 1 else sample,
        config.train.flip,
    )


def network_of(variables: Variables) -> Variables:
    """The variables of the network alone, without the class centres."""
    return {**variables, "params": variables["params"]["network"]}


def unit_embeddings(
    apply: Callable[..., Any],
    network: Variables,
    images: UInt8[Array, "batch height width 3"],
    *,
    flip: bool,
) -> Float[Array, "batch embedding_size"]:
    """Embeddings of images, of unit length, in float32.

    Args:
      apply: (variables, normalized images) to embeddings of any length, at inference.
      network: the variables.
      images: of the size that the network is for.
      flip: whether the mirror image's embedding is added.
    """
    sides = jnp.stack([images, images[:, :, ::-1]] if flip else [images], axis=1)
    each = apply(network, normalize(sides.reshape(-1, *images.shape[1:])))
    each = each.reshape(-1, sides.shape[1], each.shape[-1])
    return protocols.templates(each[:, 0], each[:, 1] if flip else None)


class FaceEvaluation:
    """Collects embeddings, and compares those of every pair.

    Attributes:
      similarities: cosines of the pairs, NaN where an image is missing; once `row` was called.
      threshold: the cosine from which on two images are taken for one person's.
    """

    def __init__(
        self,
        held_out: Int[np.ndarray, images],
        pairs: Pairs,
        judged: Bool[np.ndarray, pairs],
        seen: Callable[[FaceEvaluation], None],
    ):
        self._held_out, self._pairs, self._judged, self._seen = held_out, pairs, judged, seen
        self._index: list[np.ndarray] = []
        self._embeddings: list[np.ndarray] = []
        self.similarities = np.empty(0)
        self.threshold = math.nan

    def add(self, batch: HostBatch, results: Any) -> None:
        """Takes in a batch's embeddings."""
        broken = np.isin(batch.index, list(batch.broken))
        self._index.append(np.where(broken, -1, batch.index))
        self._embeddings.append(np.asarray(results))

    def row(self) -> Row:
        """The metrics; see `protocols`.

        "accuracy" is that of the pairs which are judged: at the threshold that is best for all
        other pairs, which are those set apart, or, in the ten-fold protocol, those of other folds.
        The "equal_error_rate" and "tar" at two false accept rates know no threshold.
        """
        distances = self._distances()
        self.similarities = 1 - distances / 2
        known = ~np.isnan(distances)
        judged, pairs = self._judged & known, self._pairs
        if not (judged & pairs.same).any() or not (judged & ~pairs.same).any():
            raise DataLost("no pairs are left whose images can be read")
        by_fold = self._judged.all()
        folds = pairs.folds if by_fold else self._judged.astype(int)
        found = protocols.verification(distances[known], pairs.same[known], folds[known])
        threshold = found.fold_threshold.mean() if by_fold else found.fold_threshold[-1]
        self.threshold = 1 - float(threshold) / 2
        curve = protocols.roc(self.similarities[judged], pairs.same[judged])
        row: Row = {
            "accuracy": found.accuracy if by_fold else float(found.fold_accuracy[-1]),
            **({"accuracy_std": found.std} if by_fold else {}),
            "equal_error_rate": protocols.equal_error_rate(curve),
            "tar_at_far_0.1": protocols.tar_at_far(curve, 0.1).tar,
            "tar_at_far_0.01": protocols.tar_at_far(curve, 0.01).tar,
            **self._equal_error_rate_of_others(known),
            "threshold": self.threshold,
            "pairs": int(judged.sum()),
        }
        self._seen(self)
        return row

    def _equal_error_rate_of_others(self, known: Bool[np.ndarray, pairs]) -> Row:
        """Of the pairs that are not judged, by which options may be chosen."""
        others, same = known & ~self._judged, self._pairs.same
        if not (others & same).any() or not (others & ~same).any():
            return {}
        curve = protocols.roc(self.similarities[others], same[others])
        return {"equal_error_rate_of_others": protocols.equal_error_rate(curve)}

    def _distances(self) -> Float[np.ndarray, pairs]:
        """Squared, between the embeddings of each pair."""
        index, embeddings = (
            meshes.from_all_processes(np.concatenate(parts))
            for parts in (self._index, self._embeddings)
        )
        real = index >= 0
        if not real.any():
            raise DataLost("none of the held-out images can be read")
        number = self._held_out[index[real]]
        every = np.full((number.max() + 1, embeddings.shape[1]), np.nan, np.float32)
        every[number] = embeddings[real]
        every = np.append(every, every[:1] * np.nan, axis=0)  # in the place of those behind
        first, second = (
            every[np.minimum(places, len(every) - 1)]
            for places in (self._pairs.first, self._pairs.second)
        )
        return np.asarray(
            protocols.squared_distances(jnp.asarray(first), jnp.asarray(second)), np.float64
        )
