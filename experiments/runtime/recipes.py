"""Recipes: how a network is trained, whatever its task."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.runtime.configs import check_options
from experiments.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train."""

    epochs: int = 15
    """Passes over the training split."""
    batch_size: int = 64
    """Images in a step, on all devices together."""
    learning_rate: float = 0.1
    """Peak of the schedule, which a linear warm-up leads to."""
    reference_batch: int = 0
    """Images that the learning rate is meant for: with a batch of more or fewer, the peak is higher
    or lower in proportion; 0 takes the rate as it is."""
    schedule: Literal["cosine", "linear", "polynomial", "exponential", "steps"] = "cosine"
    """From the peak: a cosine, a line or the square of one ("polynomial") down to zero, or steps
    down after every epoch ("exponential") or at the epochs of decay ("steps")."""
    decay_rate: float = 0.98
    """What the schedules "exponential" and "steps" multiply the rate by."""
    decay_epochs: tuple[float, ...] = ()
    """When the schedule "steps" does so, in epochs from the beginning of the run."""
    warmup_epochs: float = 1.0
    """Length of the warm-up: its n steps have the rates 1/n, 2/n, ... n/n of the peak."""
    warmup_steps: int = 0
    """Length of the warm-up in steps, in place of that in epochs; 0 for none."""
    warmup_start: float = 0.0
    """Share of the peak that the first of the n steps of the warm-up has, in place of 1/n; 0 for
    none. From there, a line leads to the peak."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Whether the momentum is Nesterov's."""
    weight_decay: float = 4e-5
    """On everything but norms and biases."""
    gradient_clip: float = 0.0
    """Largest norm of all gradients together; larger ones are scaled down to it; 0 for none."""
    ema: float = 0.0
    """Decay, per step, of an average of all weights that is evaluated too; 0 for none."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another, to save memory."""
    remat: bool = False
    """Compute norms, activations and regions again in the backward pass, to save memory."""
    seed: int = 0
    """Of initial values, order and augmentation."""

    def __post_init__(self) -> None:
        rising = (0.0, *self.decay_epochs, math.inf)
        check_options(
            self,
            "train",
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("reference_batch", self.reference_batch >= 0, "at least 0"),
            ("decay_rate", 0 < self.decay_rate <= 1, "positive and at most 1"),
            (
                "decay_epochs",
                all(a < b for a, b in itertools.pairwise(rising)),
                "positive and rising",
            ),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "at least 0 and finite"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("warmup_start", 0 <= self.warmup_start <= 1, "at least 0 and at most 1"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and less than 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("gradient_clip", 0 <= self.gradient_clip < math.inf, "at least 0 and finite"),
            ("ema", 0 <= self.ema < 1, "at least 0 and less than 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 4294967295"),
        )
        if (self.schedule == "steps") != bool(self.decay_epochs):
            raise UserError(
                "--train.decay-epochs says when --train.schedule steps decays and goes with no "
                f'other schedule, got {self.decay_epochs or "none"} and "{self.schedule}".'
            )

    @property
    def peak_rate(self) -> float:
        """The learning rate of this batch size at the end of the warm-up."""
        scale = self.batch_size / self.reference_batch if self.reference_batch else 1.0
        return self.learning_rate * scale


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the number of steps before; no step has rate zero."""
    total = recipe.epochs * steps_per_epoch
    warmup = recipe.warmup_steps or int(recipe.warmup_epochs * steps_per_epoch)
    warmup = min(warmup, total - 1)
    peak, rest = recipe.peak_rate, total - warmup
    decay_steps = [int(epoch * steps_per_epoch) - warmup for epoch in recipe.decay_epochs]

    def stepped(step: Any) -> jax.Array:
        decays = sum(jnp.where(step >= decay, 1.0, 0.0) for decay in decay_steps)
        return peak * jnp.asarray(recipe.decay_rate) ** decays

    falling = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "polynomial": optax.polynomial_schedule(peak, 0.0, 2, rest),
        "exponential": optax.exponential_decay(
            peak, steps_per_epoch, recipe.decay_rate, staircase=True
        ),
        "steps": stepped,
    }[recipe.schedule]
    if not warmup:
        return falling
    start = peak * (recipe.warmup_start or 1 / warmup)
    rising = optax.linear_schedule(start, peak, warmup - 1)
    return optax.join_schedules([rising, falling], [warmup])


def optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum, and weight decay on what is neither a norm's nor a bias."""

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith(("bias", "scale")), params
        )

    clip = [optax.clip_by_global_norm(recipe.gradient_clip)] if recipe.gradient_clip else []
    return optax.chain(
        *clip,
        optax.add_decayed_weights(recipe.weight_decay, mask=decays),
        optax.sgd(
            learning_rate(recipe, steps_per_epoch), recipe.momentum, nesterov=recipe.nesterov
        ),
    )
