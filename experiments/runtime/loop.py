"""The training loop of a classifier."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from signal import SIGINT, SIGTERM, Signals
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.runtime import mesh as meshes
from experiments.runtime import preemption, regions
from experiments.runtime.checkpoints import CheckpointConfig, Checkpoints
from experiments.runtime.errors import DataLost, Preempted, UserError
from experiments.runtime.files import write_text
from experiments.runtime.metrics import Metrics, Row
from experiments.runtime.pipeline import Batch, Loading, Pipeline
from experiments.runtime.recipes import Recipe
from experiments.runtime.sources import Dataset, Split
from experiments.runtime.training import Program, Results, TrainState, program

T = TypeVar("T")

# Steps between two points of a curve in TensorBoard.
_CURVE_EVERY = 20
# Broken images that are named as they are met; all of them are in the run's report.
_SHOWN_SKIPPED = 5


@dataclasses.dataclass
class Record:
    """What a run must know to go on, besides its state, whose step says where the data goes on.

    Attributes:
      rows: the metrics of the epochs that are done.
      steps: steps taken in the epoch under way.
      loss, accuracy, seconds: sums over these steps.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    steps: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    seconds: float = 0.0


class Trained(NamedTuple):
    """What a run ends with.

    Attributes:
      state: the last.
      metrics: of the last epoch.
      skipped: images that could not be read on the way, as "path: reason".
    """

    state: TrainState
    metrics: Row
    skipped: list[str]


def steps_per_epoch(dataset: Dataset, recipe: Recipe) -> int:
    """Full batches in the training split.

    Raises:
      UserError: there is none.
    """
    images = len(dataset.train)
    if recipe.batch_size > images:
        raise UserError(
            f"--train.batch-size must be at most the {images} training images, got "
            f"{recipe.batch_size}."
        )
    return images // recipe.batch_size


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    run_dir: pathlib.Path,
    *,
    mesh: Mesh,
    image_size: int,
    checkpoint: CheckpointConfig = CheckpointConfig(),
    loading: Loading = Loading(),
) -> Trained:
    """Trains from where the run's folder stands, and evaluates after every epoch.

    Stopped by SIGTERM or Ctrl-C, it saves where it stands; called again, it goes on as if it had
    never been stopped. Of several processes, each calls this with a folder that all of them see.

    Args:
      model: called as `model.apply(variables, images, train=...)`.
      dataset: the data.
      recipe: how to train.
      run_dir: where checkpoints, `metrics.jsonl` and `tensorboard/` are kept.
      mesh: where to train.
      image_size: pixels a side.
      checkpoint: when to save.
      loading: how images come from a disk.

    Raises:
      UserError: the batch does not fit the data or the devices, the loss is not finite, no
        checkpoint can be read, the data cannot be read any more, or the disk is full.
      Preempted: SIGTERM or Ctrl-C came once steps were being taken.
    """
    meshes.check_batch(recipe.batch_size, mesh, recipe.accumulate)
    steps = steps_per_epoch(dataset, recipe)
    if meshes.leads():
        print(
            f"global batch {recipe.batch_size:,} on {mesh.size:,} devices of {jax.process_count()} "
            f"processes, {recipe.batch_size // mesh.size:,} on each"
        )
    flips = dataset.flips if recipe.mirror == "auto" else recipe.mirror == "yes"
    compiled = program(
        model,
        recipe,
        mesh,
        image_size=image_size,
        steps_per_epoch=steps,
        flips=flips,
    )
    data = Pipeline(
        recipe.batch_size,
        jax.process_index(),
        jax.process_count(),
        image_size,
        recipe.augment,
        flips,
        recipe.seed,
        loading,
    )
    return _Run(compiled, dataset, data, recipe, run_dir, steps, checkpoint).finish()


class _Run:
    """A run under way. All processes take the same turns at the same step."""

    def __init__(
        self,
        compiled: Program,
        dataset: Dataset,
        data: Pipeline,
        recipe: Recipe,
        run_dir: pathlib.Path,
        steps_per_epoch: int,
        checkpoint: CheckpointConfig,
    ):
        self.compiled, self.dataset, self.data, self.recipe = compiled, dataset, data, recipe
        self.run_dir, self.steps_per_epoch = run_dir, steps_per_epoch
        self.checkpoint = checkpoint
        self.stopped_by: Callable[[], Signals | None] = lambda: None
        self.skipped: dict[str, str] = {}
        self.requests = meshes.Requests(compiled.mesh)
        self.checkpoints = Checkpoints(run_dir, checkpoint.keep)
        restored = self.checkpoints.restore(compiled.state)
        if restored is None:
            self.state, self.record = compiled.init(), Record()
        else:
            self.state, self.record = restored[0], Record(**restored[1])
        self.step = int(self.state.step)
        self.batches = self._placed(dataset.train, data.training(dataset.train, self.step))
        self.saved, self.mark = time.monotonic(), time.perf_counter()
        lead = meshes.leads()
        self.metrics = Metrics(run_dir, self.record.rows, self.step) if lead else None
        self.progress = _progress(Console(quiet=not lead, markup=False, emoji=False))
        self.task = self.progress.add_task(
            "", total=recipe.epochs * steps_per_epoch, completed=self.step, shown=""
        )
        if restored is not None:
            self.progress.console.print(f"going on from step {self.step}")

    def finish(self) -> Trained:
        """Trains to the end."""
        metrics = self.metrics or contextlib.nullcontext()
        with self.progress, metrics, contextlib.closing(self.batches):
            if len(self.record.rows) < self.recipe.epochs:
                self._compile()
            with preemption.noticed() as self.stopped_by:
                while len(self.record.rows) < self.recipe.epochs:
                    self._train_epoch()
                    try:
                        self._end_epoch()
                    except DataLost as error:  # the epoch's steps are saved
                        self._leave_without_data(error)
        self.checkpoints.close()
        skipped = meshes.strings_of_all_processes(list(self.skipped.values()))
        return Trained(self.state, self.record.rows[-1], skipped)

    def _compile(self) -> None:
        """Compiles the steps before the first is taken, so that no step's time has it in it."""
        self.progress.update(self.task, description="compiling")
        self.progress.console.print("compiling the training step and the evaluation")
        self.train_step, self.eval_step = self.compiled.steps
        self._requests(False)
        self.requests.forget()

    def _placed(
        self, split: Split, batches: Iterator[Batch]
    ) -> Generator[tuple[np.ndarray, dict[str, jax.Array]], None, None]:
        """Each batch's indices, and the batch on the devices, where the next is on its way too."""

        def place(batch: Batch) -> tuple[np.ndarray, dict[str, jax.Array]]:
            for index, why in batch["broken"].items():
                self._skip(split, index, why)
            arrays = {"image": batch["image"], "label": batch["label"]}
            return batch["index"], meshes.on_devices(arrays, self.compiled.mesh)

        return _one_behind(map(place, batches))

    def _skip(self, split: Split, index: int, why: str) -> None:
        name = split.name_of(index)
        if name not in self.skipped:
            self.skipped[name] = f"{name}: {why}"
            if len(self.skipped) <= _SHOWN_SKIPPED:
                print(f"skipped {self.skipped[name]}", file=sys.stderr)

    def _train_epoch(self) -> None:
        """Takes the steps that are left of the epoch."""
        pending: tuple[int, Results, np.ndarray] | None = None
        first = self.record.steps + 1
        for number in range(first, self.steps_per_epoch + 1):
            try:
                index, batch = next(self.batches)
            except DataLost as error:
                if pending:
                    self._settle(*pending)
                self._leave_without_data(error)
            if number == first:  # what it takes to start reading is not the speed of training
                self.mark = time.perf_counter()
            self.state, results = self.train_step(self.state, batch)
            self.step += 1
            stop, save = self._requests(self._overdue())
            if pending:  # one step behind, so that the device is never waited for
                self._settle(*pending)
            pending = self.step, results, index
            every = self.checkpoint.every_steps
            due = number < self.steps_per_epoch and (save or (every and self.step % every == 0))
            if stop or due:
                self._settle(*pending)
                pending = None
                self._save()
            if stop:
                self._leave(stop)
        if pending:
            self._settle(*pending)

    def _settle(self, step: int, results: Results, index: np.ndarray) -> None:
        """Takes note of a step's results.

        Raises:
          UserError: they are not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(results).items()}
        if not math.isfinite(values["loss"] + values["gradient_norm"]):
            self._refuse(step, values, index)
        now, record = time.perf_counter(), self.record
        record.seconds += now - self.mark
        self.mark = now
        record.steps += 1
        record.loss += values["loss"]
        record.accuracy += values["accuracy"]
        if self.metrics and step % _CURVE_EVERY == 0:
            self.metrics.scalars(step, {"step": values})
        self.progress.update(
            self.task,
            advance=1,
            description=f"epoch {len(record.rows) + 1}/{self.recipe.epochs}",
            shown=_shown(record.loss / record.steps, record.accuracy / record.steps, self._speed()),
        )
        self.checkpoints.check()

    def _end_epoch(self) -> None:
        record = self.record
        scores = self._evaluate(self.state.variables)
        row: Row = {
            "epoch": len(record.rows) + 1,
            "step": self.step,
            "train_loss": record.loss / record.steps,
            "train_accuracy": record.accuracy / record.steps,
            "images_per_second": self._speed(),
            **scores,
        }
        if self.state.average is not None:
            average = self._evaluate(self.state.average)
            row |= {f"average_{name}": average[name] for name in ("test_loss", "test_accuracy")}
        best = row.get("average_test_accuracy", row["test_accuracy"])
        self.record = Record(rows=[*record.rows, row])
        if self.metrics:
            self.metrics.epoch(row)
        self._save(best)
        average_shown = f"  average {best:.4f}" if self.state.average is not None else ""
        self.progress.console.print(
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  "
            f"train {row['train_accuracy']:.3f}  test {row['test_accuracy']:.4f}{average_shown}  "
            f"{row['images_per_second']:,.0f} images/s"
        )
        for layer in regions.collapsed(row["regions"]):
            self.progress.console.print(
                f"warning: the guide of {layer} has collapsed: one of its "
                f"{row['regions'][layer]['of']} regions is in use",
                soft_wrap=True,
            )

    def _evaluate(self, variables: dict[str, Any]) -> Row:
        """Means over the whole held-out split, and how regions are used there."""
        split = self.dataset.test
        batches = self._placed(split, self.data.evaluation(split))
        sums: Any = None
        for results in _one_behind(self.eval_step(variables, b) for _, b in batches):
            values = jax.tree.map(np.float64, jax.device_get(results))
            sums = values if sums is None else jax.tree.map(np.add, sums, values)
            stop, _ = self._requests(False)
            if stop:  # the epoch's steps are saved, and evaluation begins anew
                self._save()
                self._leave(stop)
        count = sums["count"]
        if not count:
            raise DataLost("none of the test images can be read")
        return {
            "test_loss": float(sums["loss"] / count),
            "test_accuracy": float(sums["correct"] / count),
            "regions": {layer: regions.use(n) for layer, n in sums["regions"].items()},
        }

    def _save(self, score: float | None = None) -> None:
        newest = self.checkpoints.newest
        if newest is None or newest.name != str(self.step):
            self.checkpoints.save(self.step, self.state, dataclasses.asdict(self.record), score)
        self.requests.forget()
        self.saved, self.mark = time.monotonic(), time.perf_counter()

    def _requests(self, overdue: bool) -> tuple[Signals | None, bool]:
        """The signal that any process got, and whether one's next checkpoint is due."""
        by = self.stopped_by()
        terminated, interrupted, due = self.requests.exchange(by == SIGTERM, by == SIGINT, overdue)
        return SIGINT if interrupted else SIGTERM if terminated else None, due

    def _leave(self, by: Signals) -> NoReturn:
        """Raises Preempted."""
        self.checkpoints.close()
        self.progress.console.print(
            f"stopped by {preemption.name_of(by)} at step {self.step}; continue with --resume "
            f"{self.run_dir}",
            soft_wrap=True,
        )
        raise Preempted(by)

    def _leave_without_data(self, error: DataLost) -> NoReturn:
        """Raises UserError, with all steps saved that were taken.

        Of several processes, the others do not know of it, and a checkpoint takes all of them.
        """
        if jax.process_count() == 1:
            self._save()
            self.checkpoints.close()
            step = self.step
        else:
            newest = self.checkpoints.newest
            step = 0 if newest is None else int(newest.name)
        raise UserError(
            f"{str(error).rstrip('.')}. The run stopped at step {self.step}, and {step} steps are "
            f"saved; when the data can be read again, continue with --resume {self.run_dir}"
        )

    def _refuse(self, step: int, values: dict[str, float], index: np.ndarray) -> None:
        """Raises UserError about results that are not finite."""
        self.checkpoints.close()
        split = self.dataset.train
        names = [split.name_of(int(i)) for i in meshes.from_all_processes(index)]
        report = self.run_dir / "non_finite.json"
        if meshes.leads():
            found = {"step": step, **values, "samples": names}
            write_text(report, json.dumps(found, indent=2) + "\n")
        raise UserError(
            f"the loss is {values['loss']} and its gradient's norm {values['gradient_norm']} at "
            f"step {step} (epoch {len(self.record.rows) + 1}), on {', '.join(names[:3])} and the "
            f'others named in "{report}"; the last good checkpoint is '
            f"{self.checkpoints.newest or 'none'}; look at these samples, or lower "
            f"--train.learning-rate (now {self.recipe.learning_rate})."
        )

    def _overdue(self) -> bool:
        minutes = self.checkpoint.every_minutes
        return minutes > 0 and time.monotonic() - self.saved > 60 * minutes

    def _speed(self) -> float:
        return self.record.steps * self.recipe.batch_size / self.record.seconds


def _one_behind(results: Iterable[T]) -> Generator[T, None, None]:
    """Each result when the next is already on its way."""
    before: list[T] = []
    for result in results:
        yield from before
        before = [result]
    yield from before


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
