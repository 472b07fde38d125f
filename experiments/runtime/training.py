"""A classifier's training as compiled functions over a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from experiments.runtime.images import pad_crop_flip
from experiments.runtime.mesh import by_batch, whole, with_shardings
from experiments.runtime.recipes import Recipe, learning_rate, optimizer
from experiments.runtime.regions import positions_in_regions

Batch = dict[str, jax.Array]
Results = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """All that changes in training.

    Attributes:
      step: steps taken.
      variables: "params" and "batch_stats".
      opt_state: the optimizer's.
      average: a moving average of the variables, or None where the recipe asks for none.
    """

    step: jax.Array
    variables: dict[str, Any]
    opt_state: optax.OptState
    average: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on the devices.

    Attributes:
      mesh: the devices.
      state: shapes of the state, and where its arrays lie.
      batch: shapes of a batch.
      init: makes the state of a new run.
      train_step: (state, batch) to the next state and scalars: "loss", "accuracy",
        "gradient_norm" and "learning_rate". Every image counts, so all must be real ones. The
        state it is given is gone.
      eval_step: (variables, batch) to sums over the images whose label is not -1: "count", "loss",
        "correct" and, by layer, "regions", the positions in each region.
    """

    mesh: Mesh
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    init: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    @functools.cached_property
    def steps(self) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """The training step and that of evaluation, compiled when this is first asked for."""
        return (
            self.train_step.lower(self.state, self.batch).compile(),
            self.eval_step.lower(self.state.variables, self.batch).compile(),
        )


def batch_shapes(batch_size: int, image_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch, split over the devices."""
    split = by_batch(mesh)
    image = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.uint8, sharding=split)
    return {"image": image, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=split)}


def program(
    model: nn.Module,
    recipe: Recipe,
    mesh: Mesh,
    *,
    image_size: int,
    steps_per_epoch: int,
    flips: bool,
) -> Program:
    """Builds the functions; nothing is computed yet.

    Args:
      model: called as `model.apply(variables, images, train=...)`.
      recipe: how to train.
      mesh: where.
      image_size: pixels a side.
      steps_per_epoch: for the schedule.
      flips: whether an image's mirror image is as good as the image.
    """
    update = optimizer(recipe, steps_per_epoch)
    rate = learning_rate(recipe, steps_per_epoch)

    def init() -> TrainState:
        images = jnp.zeros((1, image_size, image_size, 3))
        variables = {"batch_stats": {}, **model.init(jax.random.key(recipe.seed), images)}
        opt_state = update.init(variables["params"])
        average = jax.tree.map(jnp.copy, variables) if recipe.ema else None
        return TrainState(jnp.zeros((), jnp.int32), variables, opt_state, average)

    state = with_shardings(jax.eval_shape(init), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Program(
        mesh=mesh,
        state=state,
        batch=batch_shapes(recipe.batch_size, image_size, mesh),
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            _train_step(model, recipe, mesh, update, rate, flips),
            donate_argnums=0,
            out_shardings=(shardings, whole(mesh)),
        ),
        eval_step=jax.jit(_eval_step(model, mesh), out_shardings=whole(mesh)),
    )


def normalize(images: UInt8[Array, ...]) -> Float[Array, ...]:
    """uint8 pixels to about zero mean and unit variance."""
    return (images.astype(jnp.float32) - 127.5) / 64.0


def _train_step(
    model: nn.Module,
    recipe: Recipe,
    mesh: Mesh,
    update: optax.GradientTransformation,
    rate: optax.Schedule,
    flips: bool,
) -> Callable[[TrainState, Batch], tuple[TrainState, Results]]:
    def forward(params: Any, batch_stats: Any, images: Array) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return jnp.asarray(logits, jnp.float32), updates.get("batch_stats", {})

    if recipe.remat:
        forward = jax.checkpoint(forward, policy=_is_dear)

    def loss_of(
        params: Any, batch_stats: Any, images: Array, labels: Array
    ) -> tuple[Array, tuple[Any, Array]]:
        logits, batch_stats = forward(params, batch_stats, images)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1]), recipe.label_smoothing
        )
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (batch_stats, (logits.argmax(-1) == labels).mean())

    gradients_of = jax.value_and_grad(loss_of, has_aux=True)

    def in_parts(params: Any, batch_stats: Any, images: Array, labels: Array) -> Any:
        """Means over the parts of a batch; every device computes its own share of each part."""
        count = recipe.accumulate

        def parts_of(array: Array) -> Array:
            return jnp.swapaxes(array.reshape(-1, count, *array.shape[1:]), 0, 1)

        def add_part(total: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
            (loss, (batch_stats, accuracy)), gradients = gradients_of(params, total[1], *part)
            sums = jax.tree.map(jnp.add, total[0], (loss, accuracy, gradients))
            return (sums, batch_stats), None

        zeros = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        (sums, batch_stats), _ = jax.lax.scan(
            add_part, (zeros, batch_stats), (parts_of(images), parts_of(labels))
        )
        loss, accuracy, gradients = jax.tree.map(lambda total: total / count, sums)
        return (loss, (batch_stats, accuracy)), gradients

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Results]:
        images, labels = batch["image"], batch["label"]
        if recipe.augment == "crop":
            key = jax.random.fold_in(jax.random.key(recipe.seed + 1), state.step)
            images = pad_crop_flip(key, images, flip=flips)
        images = normalize(images)
        params, batch_stats = state.variables["params"], state.variables["batch_stats"]
        # Where parameters lie in parts, XLA would exchange activations rather than gather them.
        gathered = jax.lax.with_sharding_constraint(params, whole(mesh))
        compute = gradients_of if recipe.accumulate == 1 else in_parts
        (loss, (batch_stats, accuracy)), gradients = compute(gathered, batch_stats, images, labels)
        changes, opt_state = update.update(gradients, state.opt_state, params)
        variables = {"params": optax.apply_updates(params, changes), "batch_stats": batch_stats}
        average = state.average
        if average is not None:
            # The first steps count for more, so that the initial values are soon forgotten.
            step = state.step.astype(jnp.float32)
            decay = jnp.minimum(recipe.ema, (1 + step) / (10 + step))
            average = optax.incremental_update(variables, average, 1 - decay)
        results = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(rate(state.step)),
        }
        return TrainState(state.step + 1, variables, opt_state, average), results

    return step


def _is_dear(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether remat keeps a result: convolutions and products that all samples share weights in."""
    if primitive.name == "dot_general":
        _, (batch, _) = params["dimension_numbers"]
        return not batch
    return primitive.name == "conv_general_dilated"


def _eval_step(model: nn.Module, mesh: Mesh) -> Callable[[dict[str, Any], Batch], dict[str, Any]]:
    def step(variables: dict[str, Any], batch: Batch) -> dict[str, Any]:
        labels = batch["label"]
        variables = jax.lax.with_sharding_constraint(variables, whole(mesh))
        logits, sown = model.apply(
            variables, normalize(batch["image"]), train=False, mutable="intermediates"
        )
        logits = jnp.asarray(logits, jnp.float32)
        real = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return {
            "count": real.sum(),
            "loss": jnp.where(real, losses, 0).sum(),
            "correct": (real & (logits.argmax(-1) == labels)).sum(),
            "regions": positions_in_regions(
                variables["params"], sown.get("intermediates", {}), real
            ),
        }

    return step
