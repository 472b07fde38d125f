"""Softmax over class centres with a margin, as faces are learnt by.

The logits are scaled cosines between embeddings and the centres of classes; that of the true class
is lowered by a margin. With millions of classes neither the centres nor the logits fit a device:
over the axes of a mesh each device holds its share of both, and only embeddings and a few numbers
a row are exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from drconv_jax.checks import check_count, check_precision

# Takes the place of the cosine where a centre has no part in a sum. Minus infinity would give NaN
# where a device has only such centres.
_NONE = -1e30


@dataclasses.dataclass(frozen=True)
class Margin:
    """The logit of the true class: s (cos(m1 θ + m2) - m3), θ the angle to its centre.

    Eq. 4 of Deng et al., ArcFace, CVPR 2019; those of the other classes are s cos θ. `arcface`,
    `cosface` and `combined` make the usual ones.

    Attributes:
      scale: s, the inverse temperature.
      m1: factor of the angle (SphereFace).
      m2: what is added to the angle, in radians (ArcFace).
      m3: what is taken from the cosine (CosFace).
      wide: what takes the place of cos(m1 θ + m2) at wide angles, where it may rise again:
        "fallback", where m1 θ + m2 is beyond π: cos θ - m2 sin m2;
        "easy", where cos θ is not above 0: cos θ;
        "nothing".
      straight_through: whether the margin is left out of the derivative, as InsightFace's
        arcface_torch does.
    """

    scale: float = 64.0
    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    wide: Literal["fallback", "easy", "nothing"] = "nothing"
    straight_through: bool = False

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}.")
        if not self.m1 > 0:
            raise ValueError(f"m1 must be above 0, got {self.m1}; 1 leaves the angle as it is.")
        if self.wide not in ("fallback", "easy", "nothing"):
            raise ValueError(f'wide must be "fallback", "easy" or "nothing", got {self.wide!r}.')

    def __call__(
        self, cosines: Float[Array, "*n"], strength: ArrayLike = 1.0
    ) -> Float[Array, "*n"]:
        """The logits of true classes, in float32.

        The derivative is finite at cosines of 1 and -1 too.

        Args:
          cosines: of embeddings and their classes' centres.
          strength: how much of the margin there is: 1 all of it, 0 none.
        """
        cosines = cosines.astype(jnp.float32)
        strength = jnp.asarray(strength, jnp.float32)
        penalised = cosines
        if self.m1 != 1 or self.m2 != 0:
            m2 = strength * self.m2
            angle = (1 + strength * (self.m1 - 1)) * _angle(cosines) + m2
            penalised = jnp.cos(angle)
            if self.wide == "fallback":
                penalised = jnp.where(angle > math.pi, cosines - m2 * jnp.sin(m2), penalised)
            elif self.wide == "easy":
                penalised = jnp.where(cosines > 0, penalised, cosines)
        penalised -= strength * self.m3
        if self.straight_through:
            penalised = cosines + jax.lax.stop_gradient(penalised - cosines)
        return self.scale * penalised


def arcface(scale: float = 64.0, margin: float = 0.5, easy: bool = False) -> Margin:
    """Additive angular margin (Deng et al., ArcFace, CVPR 2019, Eq. 3).

    Args:
      scale: s.
      margin: added to the angle, in radians.
      easy: whether there is a margin below right angles alone.
    """
    return Margin(scale, m2=margin, wide="easy" if easy else "fallback")


def cosface(scale: float = 64.0, margin: float = 0.35) -> Margin:
    """Additive cosine margin (Wang et al., CosFace, CVPR 2018, Eq. 4; AM-softmax).

    Args:
      scale: s.
      margin: taken from the cosine.
    """
    return Margin(scale, m3=margin)


def combined(scale: float = 64.0, m1: float = 1.0, m2: float = 0.3, m3: float = 0.2) -> Margin:
    """Combined margins (Deng et al., ArcFace, CVPR 2019, Eq. 4).

    Args:
      scale, m1, m2, m3: see `Margin`.
    """
    return Margin(scale, m1, m2, m3)


class MarginLoss(NamedTuple):
    """What `margin_softmax` gives: means over the rows with a label, 0 where there is none.

    Means and not a number a row: the rows may be parted over devices, the means are everyone's.

    Attributes:
      loss: the cross-entropy, to be minimised.
      cosine: between embeddings and the centres of their classes; without gradient.
      accuracy: how often the true class's centre is the nearest; without gradient.
    """

    loss: Float[Array, ""]
    cosine: Float[Array, ""]
    accuracy: Float[Array, ""]


def margin_softmax(
    embeddings: Float[Array, "batch features"],
    centres: Float[Array, "classes features"],
    labels: Int[Array, " batch"],
    margin: Margin,
    *,
    strength: ArrayLike = 1.0,
    num_classes: int | None = None,
    axes: tuple[str, ...] = (),
    sample: float | None = None,
    key: PRNGKeyArray | None = None,
    precision: Any = "highest",
) -> MarginLoss:
    """Softmax cross-entropy of scaled cosines, where the true class's is lowered by a margin.

    Everything is computed in float32; a gradient has the dtype of what it is of.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from drconv_jax.margin_softmax import cosface, margin_softmax
      >>> centres = jax.random.normal(jax.random.key(0), (5, 16))
      >>> margin_softmax(centres[:3], centres, jnp.array([0, 1, -1]), cosface()).accuracy
      Array(1., dtype=float32)

    **Over a mesh** (`jax.set_mesh`), with `axes`: every device has its share of the rows of
    `embeddings`, `labels` and `centres`. It gathers the embeddings of all devices and computes
    their logits with its own centres; the devices then exchange two numbers a row. Centres and
    their gradient stay where they are, that of the embeddings is summed over the devices and parted
    again. Within a `jax.shard_map` over the axes, the arguments are a device's own share.

    **Sampled negatives**, with `sample` (An et al., Partial FC, CVPR 2022): a device computes with
    those of its centres whose classes are in the batch, and with others drawn at random, together
    this share of its centres. The rest is missing in the softmax's sum, so that the loss is lower
    and `accuracy` higher than the exact ones, and gets a gradient of zero. A device never takes
    fewer centres than the batch of all devices has rows, because all of these may be of its
    classes: sampling saves only where it has many more.

    Args:
      embeddings, centres: of any length; they are normalised here.
      labels: classes, from 0 to `num_classes` - 1; rows of -1 do not count.
      margin: of the true class.
      strength: how much of the margin there is, from 0 to 1; it may be traced, and grow over the
        first epochs.
      num_classes: centres from there on are padding, for the devices to have equally many; None
        where there is no padding.
      axes: names of the mesh's axes; those that it lacks are ignored, and without any the
        computation is one device's.
      sample: share of its centres that a device uses, above 0; None for all.
      key: what the sample is drawn with, the same on all devices.
      precision: of the products, where a device's own is not float32's: "highest" is float32,
        "default" rounds to bfloat16 on TPUs and to TF32 on GPUs, which moves a logit of scale 64 by
        up to a quarter.

    Raises:
      TypeError: `num_classes` is no integer.
      ValueError: `num_classes`, `sample` or `precision` is out of range, `key` is missing where
        there is `sample`, or the devices do not divide the rows.
    """
    check_precision(precision)
    if sample is not None and not 0 < sample <= 1:
        raise ValueError(f"sample must be None, or above 0 and at most 1, got {sample}.")
    if sample is not None and key is None:
        raise ValueError("key must be given where sample is, got None.")
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in axes if axis in mesh.axis_names)
    by_hand = set(axes) <= set(mesh.manual_axes)
    devices = math.prod(mesh.shape[axis] for axis in axes)
    rows = centres.shape[0] * (devices if by_hand else 1)
    num_classes = rows if num_classes is None else num_classes
    check_count("num_classes", num_classes)
    if num_classes > rows:
        raise ValueError(
            f"num_classes must be at most the number of centres, {rows}, got {num_classes}."
        )
    compute = functools.partial(
        _of_device,
        margin=margin,
        num_classes=num_classes,
        axes=axes,
        sample=sample,
        precision=precision,
    )
    if not by_hand:
        for name, length, remedy in (
            ("embeddings", embeddings.shape[0], "rows whose label is -1"),
            ("centres", centres.shape[0], "rows, and num_classes"),
        ):
            if length % devices:
                raise ValueError(
                    f"{name} must have a number of rows that the {devices} devices along "
                    f"axes={axes} divide, got {length}: add {remedy}."
                )
        parted, whole = PartitionSpec(axes), PartitionSpec()
        compute = jax.shard_map(
            compute,
            in_specs=(parted, parted, parted, whole, whole),
            out_specs=whole,
            axis_names=set(axes),
        )
    strength = jnp.asarray(strength, jnp.float32)
    return compute(embeddings, centres, labels.astype(jnp.int32), strength, key)


def _of_device(
    embeddings: Float[Array, "rows features"],
    centres: Float[Array, "own features"],
    labels: Int[Array, " rows"],
    strength: Float[Array, ""],
    key: PRNGKeyArray | None,
    *,
    margin: Margin,
    num_classes: int,
    axes: tuple[str, ...],
    sample: float | None,
    precision: Any,
) -> MarginLoss:
    """`margin_softmax` on one device of several; without axes, on the only one."""
    everyone, names = jax.lax.all_gather((_normalised(embeddings), labels), axes, tiled=True)
    device, rows = jax.lax.axis_index(axes), labels.shape[0]
    classes = device * centres.shape[0] + jnp.arange(centres.shape[0], dtype=jnp.int32)
    if sample is not None and key is not None:
        count = max(math.ceil(sample * len(classes)), min(len(names), len(classes)))
        chosen = _drawn(jax.random.fold_in(key, device), classes, names, num_classes, count)
        centres, classes = centres[chosen], classes[chosen]
    cosines, others, nearest = _summary(
        everyone, _normalised(centres), names, classes, num_classes, margin.scale, precision
    )
    # From here on a device has its own rows alone, and of these the sums over all centres.
    nearest = jax.lax.pmax(nearest, axes)
    exponentials = jnp.exp(others - margin.scale * nearest)
    cosines, exponentials = jax.lax.psum_scatter((cosines, exponentials), axes, tiled=True)
    nearest = jax.lax.dynamic_slice_in_dim(nearest, device * rows, rows)
    others = margin.scale * nearest + jnp.log(exponentials)

    # -log(exp(own) / (exp(own) + exp(others)))
    losses = jax.nn.softplus(others - margin(cosines, strength))
    cosines = jax.lax.stop_gradient(cosines)
    told = (losses, cosines, (cosines > nearest).astype(jnp.float32), jnp.ones_like(losses))
    *sums, count = jax.lax.psum([jnp.where(labels >= 0, each, 0).sum() for each in told], axes)
    return MarginLoss(*(each / jnp.maximum(count, 1) for each in sums))


def _summary(
    embeddings: Float[Array, "batch features"],
    centres: Float[Array, "own features"],
    labels: Int[Array, " batch"],
    classes: Int[Array, " own"],
    num_classes: int,
    scale: float,
    precision: Any,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"], Float[Array, " batch"]]:
    """What the softmax needs to know of a device's logits.

    It is written for XLA to keep the cosines alone for the gradient: the margin, which belongs to
    one logit of a row, is left to the caller.

    Args:
      embeddings, centres: of length 1.
      labels: of the rows.
      classes: of the centres; from `num_classes` on they are none.
      num_classes, scale, precision: see `margin_softmax`.

    Returns:
      Of every row the cosine with its own class, 0 if that is elsewhere; the logarithm of the sum
      of the exponentials of the other classes' logits; the largest cosine of these, without
      gradient.
    """
    cosines = jnp.dot(embeddings, centres.T, precision=precision)
    is_own = labels[:, None] == classes[None]
    own = jnp.where(is_own, cosines, 0).sum(axis=1)
    cosines = jnp.where(is_own | (classes >= num_classes)[None], _NONE, cosines)
    nearest = jax.lax.stop_gradient(cosines.max(axis=1))
    exponentials = jnp.exp(scale * (cosines - nearest[:, None]))
    return own, scale * nearest + jnp.log(exponentials.sum(axis=1)), nearest


def _drawn(
    key: PRNGKeyArray,
    classes: Int[Array, " own"],
    labels: Int[Array, " batch"],
    num_classes: int,
    count: int,
) -> Int[Array, " count"]:
    """`count` of the classes: those of the labels, then others at random, then what is padding."""
    places = labels - classes[0]
    places = jnp.where(places < 0, len(classes), places)
    order = jax.random.uniform(key, classes.shape).at[places].set(1, mode="drop")
    return jax.lax.top_k(jnp.where(classes < num_classes, order, -1), count)[1]


def _normalised(vectors: Float[Array, "n features"]) -> Float[Array, "n features"]:
    """In float32, of length 1; nothing is divided by less than 1e-6."""
    vectors = vectors.astype(jnp.float32)
    squares = jnp.square(vectors).sum(axis=1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


@jax.custom_jvp
def _angle(cosine: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The arc cosine, with a derivative of at most 1000: the true one is infinite at 1 and -1.

    There float32 tells angles that are a thousandth of a radian apart only just from each other.
    """
    return jnp.arccos(jnp.clip(cosine, -1, 1))


@_angle.defjvp
def _derivative_of_angle(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (cosine,), (tangent,) = primals, tangents
    sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), 1e-6))
    return _angle(cosine), -tangent / sine
