"""How well embeddings tell people apart: verification of pairs, identification among many.

What grows with the number of faces is computed by JAX, in blocks; counts and curves, of which there
is one number a pair, by NumPy in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

THRESHOLDS = np.arange(0, 4, 0.01)
"""Of the squared distance, among which a fold's is chosen (InsightFace, FaceNet)."""
_FINE_THRESHOLDS = np.arange(0, 4, 0.001)


def templates(
    embeddings: Float[Array, "n features"], flipped: Float[Array, "n features"] | None = None
) -> Float[Array, "n features"]:
    """What faces are compared by: embeddings of length 1, in float32.

    Args:
      embeddings: of images.
      flipped: of the same images mirrored, which are added before the length is made 1.
    """
    total = embeddings.astype(jnp.float32)
    if flipped is not None:
        total += flipped.astype(jnp.float32)
    length = jnp.linalg.norm(total, axis=1, keepdims=True)
    return total / jnp.maximum(length, 1e-12)


@jax.jit
def squared_distances(
    first: Float[Array, "n features"], second: Float[Array, "n features"]
) -> Float[Array, " n"]:
    """Between the templates of pairs; from 0 to 4. The cosine is 1 less half of it."""
    return jnp.square(first - second).sum(axis=1)


# Verification.


class Verification(NamedTuple):
    """Accuracy over folds.

    Attributes:
      accuracy: the mean over folds.
      std: the standard deviation over folds, that of a population (NumPy's default).
      fold_accuracy: of each fold.
      fold_threshold: the squared distance below which its pairs were taken for one person's.
    """

    accuracy: float
    std: float
    fold_accuracy: np.ndarray
    fold_threshold: np.ndarray


def verification(
    distances: Float[np.ndarray, " n"], same: Bool[np.ndarray, " n"], folds: Int[np.ndarray, " n"]
) -> Verification:
    """LFW's protocol: each fold is judged at the threshold that is best on all others.

    A pair counts as one person where its distance is below the threshold; of equally good
    thresholds, the smallest is taken.

    Args:
      distances: squared, of pairs.
      same: which are of one person.
      folds: which fold a pair is in.

    Raises:
      ValueError: there are fewer than two folds.
    """
    accuracies, thresholds = [], []
    for test in _folds(folds):
        right = _right(distances[~test], same[~test])
        threshold = THRESHOLDS[np.argmax(right)]
        thresholds.append(threshold)
        accuracies.append(float(np.mean((distances[test] < threshold) == same[test])))
    return Verification(
        float(np.mean(accuracies)),
        float(np.std(accuracies)),
        np.array(accuracies),
        np.array(thresholds),
    )


class Validation(NamedTuple):
    """The validation rate, as FaceNet calls a TAR, over folds.

    Attributes:
      val, std: the mean over folds and the standard deviation.
      far: the mean over folds of the false accept rate in the fold itself.
      fold_threshold: the squared distance below which a fold's pairs were accepted.
    """

    val: float
    std: float
    far: float
    fold_threshold: np.ndarray


def validation_at_far(
    distances: Float[np.ndarray, " n"],
    same: Bool[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    target: float,
) -> Validation:
    """The TAR of each fold at the largest threshold whose FAR on all others is at most a target.

    As in Schroff et al., FaceNet, CVPR 2015, Section 4. Thresholds are multiples of 0.001, and
    nothing is interpolated between them.

    Args:
      distances, same, folds: see `verification`.
      target: the false accept rate.

    Raises:
      ValueError: there are fewer than two folds.
    """
    rates, fars, thresholds = [], [], []
    for test in _folds(folds):
        impostors = distances[~test & ~same]
        allowed = _below(impostors, _FINE_THRESHOLDS) <= target * len(impostors)
        threshold = _FINE_THRESHOLDS[np.flatnonzero(allowed)[-1]]
        accepted = distances[test] < threshold
        rates.append(_rate(accepted, same[test]))
        fars.append(_rate(accepted, ~same[test]))
        thresholds.append(threshold)
    return Validation(
        float(np.mean(rates)), float(np.std(rates)), float(np.mean(fars)), np.array(thresholds)
    )


class Roc(NamedTuple):
    """Rates at every threshold that makes a difference, from the strictest on.

    Attributes:
      thresholds: of the similarity; pairs of at least that are accepted. The first accepts none.
      tar: true accept rates.
      far: false accept rates.
    """

    thresholds: Float[np.ndarray, " points"]
    tar: Float[np.ndarray, " points"]
    far: Float[np.ndarray, " points"]


class TarAtFar(NamedTuple):
    """A point of a ROC curve."""

    tar: float
    far: float
    threshold: float


def roc(similarities: Float[np.ndarray, " n"], same: Bool[np.ndarray, " n"]) -> Roc:
    """The ROC curve of pairs; those of equal similarity are accepted together.

    Args:
      similarities: of pairs.
      same: which are of one person.

    Raises:
      ValueError: all pairs are of one person, or none is.
    """
    if same.all() or not same.any():
        raise ValueError(
            f"same must have pairs of one person and of two, got {same.sum()} of {same.size}."
        )
    order = np.argsort(-similarities, kind="stable")
    similarities, same = similarities[order], same[order]
    last = np.flatnonzero(np.append(np.diff(similarities) != 0, True))
    accepted = np.cumsum(same)[last]
    return Roc(
        np.append(np.inf, similarities[last]),
        np.append(0, accepted / same.sum()),
        np.append(0, (last + 1 - accepted) / (~same).sum()),
    )


def tar_at_far(curve: Roc, target: float) -> TarAtFar:
    """The best TAR whose FAR is at most a target; of the points that have it, the last."""
    return _point(curve, int(np.searchsorted(curve.far, target, side="right")) - 1)


def tar_nearest_far(curve: Roc, target: float) -> TarAtFar:
    """The corner of the curve whose FAR is nearest to a target, above or below it.

    As InsightFace's evaluation on IJB: of corners with the same FAR the one of the best TAR, of a
    lower and a higher FAR that are equally near the higher.
    """
    # Of the points behind the origin, those that do not lie on a line through their neighbours.
    bends = np.abs(np.diff([curve.far[1:], curve.tar[1:]], n=2)).max(axis=0)
    ends = np.ones(len(curve.far) - len(bends))
    corners = np.flatnonzero(np.concatenate([ends[:2], bends, ends[2:]]) > 1e-12)  # above rounding
    distances = np.abs(curve.far[corners] - target)
    return _point(curve, int(corners[np.flatnonzero(distances == distances.min())[-1]]))


def equal_error_rate(curve: Roc) -> float:
    """Where the line through the curve's points has as many false accepts as false rejects."""
    excess = curve.far - (1 - curve.tar)  # rises from -1 to 1
    after = int(np.argmax(excess >= 0))
    part = -excess[after - 1] / (excess[after] - excess[after - 1])
    return float(curve.far[after - 1] + part * (curve.far[after] - curve.far[after - 1]))


def area_under(curve: Roc) -> float:
    """The area under the line through the curve's points."""
    return float(np.trapezoid(curve.tar, curve.far))


def all_pairs(
    faces: Float[Array, "n features"], ids: Int[np.ndarray, " n"], *, block: int = 1024
) -> tuple[Float[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]:
    """Cosines of every face with every later one, and which pairs are of one person.

    The device holds `block` rows of the matrix at a time, the host a number for each of the
    n (n - 1) / 2 pairs.

    Args:
      faces: templates.
      ids: whose they are.
      block: rows.
    """

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(ids), block):
            rows = np.arange(start, min(start + block, len(ids)))
            later = np.arange(len(ids)) > rows[:, None]
            yield (
                np.asarray(_products(faces[rows[0] : rows[-1] + 1], faces))[later],
                (ids[rows, None] == ids)[later],
            )

    cosines, same = zip(*parts(), strict=True)
    return np.concatenate(cosines), np.concatenate(same)


# Identification.


@functools.partial(jax.jit, static_argnames=("first", "axes", "block", "batch"))
def ranks(
    probes: Float[Array, "n features"],
    mates: Float[Array, "n features"],
    others: Float[Array, "m features"],
    *,
    where: Int[Array, " n"] | None = None,
    first: int | None = None,
    axes: tuple[str, ...] = (),
    block: int = 4096,
    batch: int = 1024,
) -> Int[Array, " n"]:
    """Of every probe, the rank of its mate: one more than there are others more similar to it.

    Where `others` are distractors, this is MegaFace's protocol; where they are a gallery that the
    mates are in, with distractors or without, it is identification in a closed set.

    No more than `batch` times `block` similarities are held at once. Over a mesh (`jax.set_mesh`)
    a device compares with its share of the others.

    Args:
      probes, mates, others: templates.
      where: the mate's place among the others, where it does not count; None if it is not there.
      first: how many of the others take part, from the first on; None for all.
      axes: names of the mesh's axes over which rows of `others` are parted; without any, or those
        that the mesh lacks, the computation is one device's.
      block, batch: of others and of probes.

    Raises:
      ValueError: the devices do not divide the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in axes if axis in mesh.axis_names)
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if len(others) % devices:
        raise ValueError(
            f"others must have a number of rows that the {devices} devices along axes={axes} "
            f"divide, got {len(others)}: add rows, and first."
        )
    count = functools.partial(
        _more_similar,
        first=len(others) if first is None else first,
        axes=axes,
        block=min(block, len(others) // devices),
        batch=batch,
    )
    if axes:
        whole = PartitionSpec()
        count = jax.shard_map(
            count,
            in_specs=(whole, whole, PartitionSpec(axes), whole),
            out_specs=whole,
            axis_names=set(axes),
        )
    where = jnp.full(len(probes), -1) if where is None else where
    return 1 + count(probes, mates, others, where.astype(jnp.int32))


def cmc(ranks: Int[Array, " n"], at: Sequence[int]) -> Float[np.ndarray, " k"]:
    """How often the mate is among the nearest k, for each k (cumulative match characteristic)."""
    return (np.asarray(ranks)[:, None] <= np.asarray(at)).mean(axis=0)


def _more_similar(
    probes: Float[Array, "n features"],
    mates: Float[Array, "n features"],
    others: Float[Array, "own features"],
    where: Int[Array, " n"],
    *,
    first: int,
    axes: tuple[str, ...],
    block: int,
    batch: int,
) -> Int[Array, " n"]:
    """How many of the others are more similar to a probe than its mate is."""
    own = len(others)
    offset = jax.lax.axis_index(axes) * own

    def of_probe(arguments: tuple[Array, Array, Array]) -> Array:
        probe, mate, where = arguments
        least = jnp.vdot(probe, mate, precision="highest")

        def of_block(start: Array) -> Array:
            begin = jnp.minimum(start, own - block)  # the last block may begin within another
            rows = begin + jnp.arange(block)
            faces = jax.lax.dynamic_slice_in_dim(others, begin, block)
            nearer = jnp.dot(faces, probe, precision="highest") > least
            place = offset + rows
            counts = (rows >= start) & (place < first) & (place != where)
            return (nearer & counts).sum(dtype=jnp.int32)

        return jax.lax.map(of_block, jnp.arange(0, own, block)).sum()

    counts = jax.lax.map(of_probe, (probes, mates, where), batch_size=batch)
    return jax.lax.psum(counts, axes)


@jax.jit
def _products(rows: Float[Array, "n features"], faces: Float[Array, "m features"]) -> Array:
    return jnp.dot(rows, faces.T, precision="highest")


def _folds(folds: Int[np.ndarray, " n"]) -> list[Bool[np.ndarray, " n"]]:
    names = np.unique(folds)
    if len(names) < 2:
        raise ValueError(f"folds must be two or more, got {names.tolist()}.")
    return [folds == name for name in names]


def _right(distances: Float[np.ndarray, " n"], same: Bool[np.ndarray, " n"]) -> np.ndarray:
    """How many pairs are judged rightly at each of the thresholds."""
    accepted = _below(distances[same], THRESHOLDS)
    return accepted + (~same).sum() - _below(distances[~same], THRESHOLDS)


def _below(values: Float[np.ndarray, " n"], thresholds: Float[np.ndarray, " k"]) -> np.ndarray:
    return np.searchsorted(np.sort(values), thresholds, side="left")


def _rate(accepted: Bool[np.ndarray, " n"], among: Bool[np.ndarray, " n"]) -> float:
    """The part of some pairs that is accepted; 0 where there are none."""
    return float((accepted & among).sum() / max(among.sum(), 1))


def _point(curve: Roc, index: int) -> TarAtFar:
    return TarAtFar(
        float(curve.tar[index]), float(curve.far[index]), float(curve.thresholds[index])
    )
