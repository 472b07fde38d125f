"""Recipes: how a classifier is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from experiments.runtime.errors import UserError

Augment = Literal["none", "crop", "resized-crop"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train."""

    epochs: int = 15
    """Passes over the training split."""
    batch_size: int = 64
    """Images in a step, on all devices together."""
    learning_rate: float = 0.1
    """Peak of the schedule, which a linear warm-up leads to."""
    schedule: Literal["cosine", "linear", "exponential"] = "cosine"
    """From the peak: a cosine or a line down to zero, or steps down after every epoch."""
    decay_rate: float = 0.98
    """What the exponential schedule multiplies the rate by after every epoch."""
    warmup_epochs: float = 1.0
    """Length of the warm-up."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Whether the momentum is Nesterov's."""
    weight_decay: float = 4e-5
    """On everything but norms and biases."""
    label_smoothing: float = 0.1
    """Of the training loss."""
    ema: float = 0.0
    """Decay, per step, of an average of all weights that is evaluated too; 0 for none."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another, to save memory."""
    remat: bool = False
    """Compute norms, activations and regions again in the backward pass, to save memory."""
    augment: Augment = "crop"
    """For small images, pad and crop at random; for large ones, which stay on disk, cut out a
    random part and resize it, and evaluate on the middle. Mirroring is the next option."""
    mirror: Literal["auto", "yes", "no"] = "auto"
    """Whether augmented images are mirrored at random; "auto" is no for digits, idx files and
    classes that are all named by single characters or words as "zero", and yes for all else."""
    seed: int = 0
    """Of initial values, order and augmentation."""

    def __post_init__(self) -> None:
        for name, within, allowed in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("decay_rate", 0 < self.decay_rate <= 1, "positive and at most 1"),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "at least 0 and finite"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and less than 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and less than 1"),
            ("ema", 0 <= self.ema < 1, "at least 0 and less than 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 4294967295"),
        ):
            if not within:
                option = name.replace("_", "-")
                raise UserError(f"--train.{option} must be {allowed}, got {getattr(self, name)}.")


RECIPES: Mapping[str, Recipe] = {
    # Digits and other small images, in minutes.
    "small": Recipe(),
    # ShuffleNetV2 (Ma et al., ECCV 2018, Section 4) on ImageNet.
    "imagenet": Recipe(
        epochs=240,
        batch_size=1024,
        learning_rate=0.5,
        schedule="linear",
        augment="resized-crop",
        warmup_epochs=0.0,
        nesterov=False,
    ),
    # MobileNetV2 on ImageNet as torchvision trains it (references/classification, 8 x 32 images).
    "mobilenet": Recipe(
        epochs=300,
        batch_size=256,
        learning_rate=0.045,
        schedule="exponential",
        warmup_epochs=0.0,
        nesterov=False,
        label_smoothing=0.0,
        augment="resized-crop",
    ),
}


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the step."""
    total = recipe.epochs * steps_per_epoch
    warmup = min(int(recipe.warmup_epochs * steps_per_epoch), total - 1)
    peak, rest = recipe.learning_rate, total - warmup
    falling = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "exponential": optax.exponential_decay(
            peak, steps_per_epoch, recipe.decay_rate, staircase=True
        ),
    }[recipe.schedule]
    if not warmup:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), falling], [warmup])


def optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum, and weight decay on what is neither a norm's nor a bias."""

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith(("bias", "scale")), params
        )

    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, mask=decays),
        optax.sgd(
            learning_rate(recipe, steps_per_epoch), recipe.momentum, nesterov=recipe.nesterov
        ),
    )
