"""The training loop of a classifier."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from experiments.runtime.checkpoints import Checkpoints
from experiments.runtime.data import Dataset, augment, batches
from experiments.runtime.errors import UserError
from experiments.runtime.files import write_text


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    epochs: int = 15
    """Passes over the training split."""
    batch_size: int = 64
    """Images in a step."""
    learning_rate: float = 0.1
    """Peak of the schedule: linear warm-up, then a cosine down to zero."""
    warmup_epochs: float = 1.0
    """Length of the warm-up."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 4e-5
    """On everything but norms and biases."""
    label_smoothing: float = 0.1
    """Of the training loss."""
    augment: bool = True
    """Pad and crop at random; image folders are also mirrored."""
    seed: int = 0
    """Of initial values, order and augmentation."""

    def __post_init__(self) -> None:
        for name, within, allowed in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "at least 0 and finite"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and less than 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and less than 1"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 4294967295"),
        ):
            if not within:
                option = name.replace("_", "-")
                raise UserError(f"--train.{option} must be {allowed}, got {getattr(self, name)}.")


class TrainState(struct.PyTreeNode):
    """All that changes in training."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState


def steps_per_epoch(dataset: Dataset, config: TrainConfig) -> int:
    """Full batches in the training split.

    Raises:
      UserError: there is none.
    """
    images = len(dataset.train.labels)
    if config.batch_size > images:
        raise UserError(
            f"--train.batch-size must be at most the {images} training images, got "
            f"{config.batch_size}."
        )
    return images // config.batch_size


def train(
    model: nn.Module, dataset: Dataset, config: TrainConfig, run_dir: pathlib.Path
) -> tuple[TrainState, dict[str, float]]:
    """Trains from where the run's folder stands, and evaluates after every epoch.

    Args:
      model: called as `model.apply(variables, images, train=...)`.
      dataset: the data.
      config: how to train.
      run_dir: where checkpoints and `metrics.jsonl` are kept.

    Returns:
      The last state, and the metrics of the last epoch.

    Raises:
      UserError: a batch is larger than the training split, or the checkpoint does not fit.
    """
    steps = steps_per_epoch(dataset, config)
    optimizer = _optimizer(config, steps)
    state = _init(model, dataset, optimizer, config.seed)
    checkpoints = Checkpoints(run_dir)
    state = checkpoints.restore(state) or state
    train_step = jax.jit(
        _train_step(model, optimizer, config, dataset.flips), donate_argnames="state"
    )
    eval_step = jax.jit(_eval_step(model))
    done = int(state.step) // steps
    metrics = _read_metrics(run_dir, done)
    if done and (not metrics or metrics[-1]["epoch"] != done):  # its row was lost
        scores = evaluate(eval_step, state, dataset, config.batch_size)
        metrics.append({"epoch": done, "step": int(state.step), **scores})
    console = Console()
    _write_metrics(run_dir, metrics)
    with (
        _progress(console) as progress,
        open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as log,
    ):
        task = progress.add_task("", total=config.epochs * steps, completed=done * steps, shown="")
        for epoch in range(done, config.epochs):
            order = np.random.default_rng((config.seed, epoch)).permutation(
                len(dataset.train.labels)
            )
            start, sums = time.perf_counter(), np.zeros(2)
            pending: dict[str, jax.Array] = {}
            for number, batch in enumerate(
                batches(dataset.train, config.batch_size, order=order), start=1
            ):
                state, result = train_step(state=state, batch=batch)
                if pending:  # one step behind, so that the device is never waited for
                    sums += float(pending["loss"]), float(pending["accuracy"])
                    speed = number * config.batch_size / (time.perf_counter() - start)
                    loss, accuracy = sums / (number - 1)
                    shown = _shown(loss, accuracy, speed)
                    progress.update(
                        task,
                        advance=1,
                        description=f"epoch {epoch + 1}/{config.epochs}",
                        shown=shown,
                    )
                pending = result
            sums += float(pending["loss"]), float(pending["accuracy"])
            progress.update(task, advance=1)
            seconds = time.perf_counter() - start
            loss, accuracy = sums / steps
            if not np.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} in epoch {epoch + 1}; lower --train.learning-rate (now "
                    f"{config.learning_rate})."
                )
            row = {
                "epoch": epoch + 1,
                "step": int(state.step),
                "train_loss": loss,
                "train_accuracy": accuracy,
                "images_per_second": steps * config.batch_size / seconds,
                **evaluate(eval_step, state, dataset, config.batch_size),
            }
            metrics.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            checkpoints.save(int(state.step), state)
            progress.console.print(
                f"epoch {epoch + 1:3d}  loss {loss:.3f}  train {accuracy:.3f}  "
                f"test {row['test_accuracy']:.4f}  {row['images_per_second']:,.0f} images/s"
            )
    checkpoints.close()
    return state, metrics[-1]


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    state: TrainState,
    dataset: Dataset,
    batch_size: int,
) -> dict[str, float]:
    """Mean loss and accuracy over the whole held-out split."""
    images, labels = dataset.test.images, dataset.test.labels
    totals = np.zeros(2)
    for start in range(0, len(labels), batch_size):
        chunk = images[start : start + batch_size], labels[start : start + batch_size]
        missing = batch_size - len(chunk[1])  # one shape for every batch: padded, label -1
        padded = (
            np.pad(chunk[0], ((0, missing), (0, 0), (0, 0), (0, 0))),
            np.pad(chunk[1], (0, missing), constant_values=-1),
        )
        result = eval_step(state, padded)
        totals += float(result["loss"]), float(result["correct"])
    return {"test_loss": totals[0] / len(labels), "test_accuracy": totals[1] / len(labels)}


def normalize(images: jax.Array) -> jax.Array:
    """uint8 pixels to about zero mean and unit variance."""
    return (images.astype(jnp.float32) - 127.5) / 64.0


def _optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    total = config.epochs * steps
    warmup = min(int(config.warmup_epochs * steps), total - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, total)

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith(("bias", "scale")), params
        )

    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.sgd(schedule, momentum=config.momentum, nesterov=True),
    )


def _init(
    model: nn.Module, dataset: Dataset, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    def init(key: jax.Array) -> TrainState:
        images = jnp.zeros((1, *dataset.train.images.shape[1:]))
        variables = model.init(key, images, train=False)
        params = variables["params"]
        return TrainState(
            jnp.zeros((), jnp.int32),
            params,
            variables.get("batch_stats", {}),
            optimizer.init(params),
        )

    return jax.jit(init)(jax.random.key(seed))


def _train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, config: TrainConfig, flip: bool
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    def step(
        state: TrainState, batch: tuple[jax.Array, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        images, labels = batch
        if config.augment:
            key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
            images = augment(key, images, flip=flip)
        images = normalize(images)

        def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            targets = optax.smooth_labels(
                jax.nn.one_hot(labels, logits.shape[-1]), config.label_smoothing
            )
            loss = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()
            return loss, (logits, updates)

        (loss, (logits, updates)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        new = TrainState(
            state.step + 1,
            optax.apply_updates(state.params, changes),
            updates.get("batch_stats", {}),
            opt_state,
        )
        accuracy = (logits.argmax(-1) == labels).mean()
        return new, {"loss": loss, "accuracy": accuracy}

    return step


def _eval_step(model: nn.Module) -> Callable[..., dict[str, jax.Array]]:
    def step(state: TrainState, batch: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        images, labels = batch
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = jnp.asarray(model.apply(variables, normalize(images), train=False), jnp.float32)
        real = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return {
            "loss": jnp.where(real, losses, 0).sum(),
            "correct": (real & (logits.argmax(-1) == labels)).sum(),
        }

    return step


def _read_metrics(run_dir: pathlib.Path, epochs: int) -> list[dict[str, float]]:
    """The rows of epochs that the checkpoint has seen."""
    path = run_dir / "metrics.jsonl"
    if not epochs or not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a line cut short when the run was stopped
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and 1 <= row.get("epoch", 0) <= epochs]


def _write_metrics(run_dir: pathlib.Path, rows: list[dict[str, float]]) -> None:
    """Drops rows that no checkpoint has seen, all at once or not at all."""
    write_text(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _shown(loss: float, accuracy: float, speed: float) -> str:
    return f"loss {loss:.3f}  accuracy {accuracy:.3f}  {speed:,.0f} img/s"


def _progress(console: Console) -> Progress:
    return Progress(  # within 80 columns
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
