"""A task's training and evaluation steps as compiled functions over a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from experiments.runtime.mesh import by_batch, whole, with_sharding
from experiments.runtime.recipes import Recipe, learning_rate, optimizer
from experiments.runtime.task import BatchShapes, DeviceBatch, Task, Variables

Scalars = dict[str, Float[Array, ""]]


class TrainState(struct.PyTreeNode):
    """All that changes in training.

    Attributes:
      step: steps taken.
      variables: "params" and "batch_stats".
      opt_state: the optimizer's, of the parameters that are trained.
      average: a moving average of the variables, or None where the recipe asks for none.
    """

    step: jax.Array
    variables: dict[str, Any]
    opt_state: optax.OptState
    average: dict[str, Any] | None


class CompiledStep:
    """A step that is compiled for every shape of its batches before it is first called."""

    def __init__(self, step: jax.stages.Wrapped, first: Any, shapes: tuple[BatchShapes, ...]):
        self._by_shapes = {_shapes_of(s): step.lower(first, s).compile() for s in shapes}

    def __call__(self, first: Any, batch: DeviceBatch) -> Any:
        """Calls the step that is for such a batch.

        Args:
          first: the step's first argument, the training state or the variables.
          batch: of one of the shapes that were compiled.
        """
        return self._by_shapes[_shapes_of(batch)](first, batch)


class CompiledSteps(NamedTuple):
    """What `Program` has, compiled."""

    train: CompiledStep
    evaluate: CompiledStep


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on the devices.

    Attributes:
      mesh: the devices.
      state: shapes of the state, and where its arrays lie.
      batch_shapes, evaluation_batch_shapes: see `Task`.
      init: makes the state of a new run.
      train_step: (state, batch) to the next state and scalars: "loss", the task's own,
        "gradient_norm" and "learning_rate". The state it is given is gone.
      eval_step: (variables, batch) to what the task's `evaluate` gives.
    """

    mesh: Mesh
    state: TrainState
    batch_shapes: tuple[BatchShapes, ...]
    evaluation_batch_shapes: tuple[BatchShapes, ...]
    init: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    @functools.cached_property
    def steps(self) -> CompiledSteps:
        """The steps of all shapes of batches, compiled when this is first asked for."""
        return CompiledSteps(
            CompiledStep(self.train_step, self.state, self.batch_shapes),
            CompiledStep(self.eval_step, self.state.variables, self.evaluation_batch_shapes),
        )


def program(task: Task, recipe: Recipe, mesh: Mesh, *, steps_per_epoch: int) -> Program:
    """Builds the functions; nothing is computed yet.

    Args:
      task: what is trained.
      recipe: how to train.
      mesh: where.
      steps_per_epoch: for the schedule.
    """
    update = optimizer(recipe, steps_per_epoch)
    rate = learning_rate(recipe, steps_per_epoch)

    def init() -> TrainState:
        variables = {"batch_stats": {}, **task.init(jax.random.key(recipe.seed))}
        variables["params"] = _in_equal_parts(task, variables["params"], mesh.size)
        opt_state = update.init(_split(task, variables["params"])[0])
        average = jax.tree.map(jnp.copy, variables) if recipe.ema else None
        return TrainState(jnp.zeros((), jnp.int32), variables, opt_state, average)

    def placed(shapes: tuple[BatchShapes, ...]) -> tuple[BatchShapes, ...]:
        return jax.tree.map(lambda shape: shape.update(sharding=by_batch(mesh)), shapes)

    state = _placed(task, jax.eval_shape(init), update, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Program(
        mesh=mesh,
        state=state,
        batch_shapes=placed(task.batch_shapes(recipe.batch_size)),
        evaluation_batch_shapes=placed(task.evaluation_batch_shapes(recipe.batch_size)),
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            _train_step(task, recipe, mesh, update, rate),
            donate_argnums=0,
            out_shardings=(shardings, whole(mesh)),
        ),
        eval_step=jax.jit(
            _eval_step(task, mesh), out_shardings=whole(mesh) if task.reduces else by_batch(mesh)
        ),
    )


def _train_step(
    task: Task,
    recipe: Recipe,
    mesh: Mesh,
    update: optax.GradientTransformation,
    rate: optax.Schedule,
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Scalars]]:
    def loss_of(
        trained: Any, frozen: Any, batch_stats: Any, batch: DeviceBatch, key: Array, step: Array
    ) -> tuple[Array, tuple[Any, Mapping[str, Array]]]:
        variables = {"params": _join(trained, frozen), "batch_stats": batch_stats}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return task.loss(variables, batch, key, step)

    if recipe.remat:
        loss_of = jax.checkpoint(loss_of, policy=_is_dear)

    gradients_of = jax.value_and_grad(loss_of, has_aux=True)

    def in_parts(
        trained: Any, frozen: Any, batch_stats: Any, batch: DeviceBatch, key: Array, step: Array
    ) -> Any:
        """Means over the parts of a batch; every device computes its own share of each part."""
        count = recipe.accumulate

        def parts_of(array: Array) -> Array:
            return jnp.swapaxes(array.reshape(-1, count, *array.shape[1:]), 0, 1)

        def add_part(total: Any, part: tuple[DeviceBatch, Array]) -> tuple[Any, None]:
            sums, batch_stats = total
            (loss, (batch_stats, scalars)), gradients = gradients_of(
                trained, frozen, batch_stats, *part, step
            )
            return (jax.tree.map(jnp.add, sums, (loss, scalars, gradients)), batch_stats), None

        parts = jax.tree.map(parts_of, batch), jax.random.split(key, count)
        first = jax.tree.map(lambda array: array[0], parts)
        (loss, (_, scalars)), gradients = jax.eval_shape(
            gradients_of, trained, frozen, batch_stats, *first, step
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, scalars, gradients))
        (sums, batch_stats), _ = jax.lax.scan(add_part, (zeros, batch_stats), parts)
        loss, scalars, gradients = jax.tree.map(lambda total: total / count, sums)
        return (loss, (batch_stats, scalars)), gradients

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Scalars]:
        # The seed itself is that of the initial values.
        key = jax.random.fold_in(jax.random.key(recipe.seed + 1), state.step)
        params, batch_stats = state.variables["params"], state.variables["batch_stats"]
        gathered = _gathered(task, params, mesh)
        compute = gradients_of if recipe.accumulate == 1 else in_parts
        (loss, (batch_stats, scalars)), gradients = compute(
            *_split(task, gathered), batch_stats, batch, key, state.step
        )
        trained, frozen = _split(task, params)
        changes, opt_state = update.update(gradients, state.opt_state, trained)
        params = _join(optax.apply_updates(trained, changes), frozen)
        variables = {"params": params, "batch_stats": batch_stats}
        average = state.average
        if average is not None:
            # The first steps count for more, so that the initial values are soon forgotten.
            steps = state.step.astype(jnp.float32)
            decay = jnp.minimum(recipe.ema, (1 + steps) / (10 + steps))
            average = optax.incremental_update(variables, average, 1 - decay)
        results = {
            "loss": loss,
            **scalars,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(rate(state.step)),
        }
        return TrainState(state.step + 1, variables, opt_state, average), results

    return step


def _eval_step(task: Task, mesh: Mesh) -> Callable[[Variables, DeviceBatch], Any]:
    def step(variables: Variables, batch: DeviceBatch) -> Any:
        params = _gathered(task, variables["params"], mesh)
        others = {name: tree for name, tree in variables.items() if name != "params"}
        gathered = {**jax.lax.with_sharding_constraint(others, whole(mesh)), "params": params}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return task.evaluate(gathered, batch)

    return step


def _in_equal_parts(task: Task, params: Any, count: int) -> Any:
    """What lies in parts, with zeros behind it so that there are `count` equal ones."""

    def lengthened(param: Array, is_parted: bool) -> Array:
        behind = -len(param) % count if is_parted else 0
        return jnp.pad(param, [(0, behind), *((0, 0),) * (param.ndim - 1)]) if behind else param

    return jax.tree.map(lengthened, params, task.parted(params))


def _placed(
    task: Task, state: TrainState, update: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The shapes of a state, and where its arrays lie; moments lie where their parameters do."""

    def place(shape: Any, is_parted: bool = False) -> Any:
        return shape.update(sharding=by_batch(mesh)) if is_parted else with_sharding(shape, mesh)

    def variables_placed(variables: Any) -> Any:
        params = variables["params"]
        rest = jax.tree.map(place, {k: v for k, v in variables.items() if k != "params"})
        return {**rest, "params": jax.tree.map(place, params, task.parted(params))}

    params = state.variables["params"]
    parted = jax.tree.map(
        lambda is_trained, is_parted: is_parted if is_trained else None,
        task.trained(params),
        task.parted(params),
    )
    return TrainState(
        place(state.step),
        variables_placed(state.variables),
        optax.tree.map_params(update, place, state.opt_state, parted, transform_non_params=place),
        None if state.average is None else variables_placed(state.average),
    )


def _gathered(task: Task, params: Any, mesh: Mesh) -> Any:
    """A copy of the parameters on every device, but for those that nobody puts together.

    Where parameters lie in parts, XLA would exchange activations rather than gather them.
    """
    shardings = jax.tree.map(
        lambda is_parted: by_batch(mesh) if is_parted else whole(mesh), task.parted(params)
    )
    return jax.lax.with_sharding_constraint(params, shardings)


def _split(task: Task, params: Any) -> tuple[Any, Any]:
    """The parameters that are trained and those that are not; None stands for each other one.

    None is no leaf to JAX, so that what is not trained has no gradient and no momentum.
    """
    chosen = task.trained(params)
    trained = jax.tree.map(lambda param, is_trained: param if is_trained else None, params, chosen)
    frozen = jax.tree.map(lambda param, is_trained: None if is_trained else param, params, chosen)
    return trained, frozen


def _join(trained: Any, frozen: Any) -> Any:
    """The parameters that `_split` has split."""
    return jax.tree.map(
        lambda param, other: other if param is None else param,
        trained,
        frozen,
        is_leaf=lambda node: node is None,
    )


def _shapes_of(batch: DeviceBatch | BatchShapes) -> tuple[Any, ...]:
    return tuple(sorted((name, array.shape) for name, array in batch.items()))


def _is_dear(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether remat keeps a result: convolutions and products that all samples share weights in."""
    if primitive.name == "dot_general":
        _, (batch, _) = params["dimension_numbers"]
        return not batch
    return primitive.name == "conv_general_dilated"
