"""The training loop, whatever the task."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from signal import SIGINT, SIGTERM, Signals
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.runtime import mesh as meshes
from experiments.runtime import preemption, regions
from experiments.runtime.checkpoints import CheckpointConfig, Checkpoints
from experiments.runtime.errors import DataLost, Preempted, UserError
from experiments.runtime.files import write_text
from experiments.runtime.metrics import Metrics, Row
from experiments.runtime.recipes import Recipe
from experiments.runtime.task import DeviceBatch, Feed, HostBatch, Named, Task
from experiments.runtime.training import Program, Scalars, TrainState, program

T = TypeVar("T")

# Steps between two points of a curve in TensorBoard.
_CURVE_EVERY = 20
# Broken images that are named as they are met; all of them are in the run's report.
_SHOWN_SKIPPED = 5
# What a progress line of 80 columns has room for besides the epoch, the bar and the time.
_SHOWN_WIDTH = 44
# Of a step's scalars, those that no epoch's mean is taken of.
_NOT_AVERAGED = ("gradient_norm", "learning_rate")


@dataclasses.dataclass
class Record:
    """What a run must know to go on, besides its state, whose step says where the data goes on.

    Attributes:
      rows: the metrics of the epochs that are done.
      steps: steps taken in the epoch under way.
      sums: over these steps, of the loss and of the task's other scalars.
      seconds: that they took.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    steps: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Record:
        """What `dataclasses.asdict` and JSON made of a record; older versions had two sums only."""
        fields = dict(saved)
        if "sums" not in fields:
            fields["sums"] = {name: fields.pop(name) for name in ("loss", "accuracy")}
        return cls(**fields)

    @property
    def means(self) -> dict[str, float]:
        """Of the loss, and of the task's other scalars, over the steps."""
        return {name: total / self.steps for name, total in self.sums.items()}


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


def train(
    task: Task,
    feed: Feed,
    recipe: Recipe,
    run_dir: pathlib.Path,
    *,
    mesh: Mesh,
    checkpoint: CheckpointConfig = CheckpointConfig(),
) -> Trained:
    """Trains from where the run's folder stands, and evaluates after every epoch.

    Stopped by SIGTERM or Ctrl-C, it saves where it stands; called again, it goes on as if it had
    never been stopped. Of several processes, each calls this with a folder that all of them see.

    Args:
      task: what is trained.
      feed: its batches.
      recipe: how to train.
      run_dir: where checkpoints, `metrics.jsonl` and `tensorboard/` are kept.
      mesh: where to train.
      checkpoint: when to save.

    Raises:
      UserError: the batch does not fit the data or the devices, the loss is not finite, no
        checkpoint can be read, the data cannot be read any more, or the disk is full.
      Preempted: SIGTERM or Ctrl-C came once steps were being taken.
    """
    meshes.check_batch(recipe.batch_size, mesh, recipe.accumulate)
    compiled = program(task, recipe, mesh, steps_per_epoch=feed.steps_per_epoch)
    run = _Run(task, feed, recipe, run_dir, compiled, checkpoint)
    with run.under_way():
        while run.epochs_done < recipe.epochs:
            for batch, arrays in run.batches_left():
                run.state, results = compiled.steps.train(run.state, arrays)
                run.took_step(batch, results)
            metrics = run.evaluate(run.state.variables)
            average = run.evaluate(run.state.average) if recipe.ema else {}
            run.end_epoch(metrics, average)
    skipped = meshes.strings_of_all_processes(list(run.skipped.values()))
    return Trained(run.state, run.record.rows[-1], skipped)


def trained_variables(
    task: Task, recipe: Recipe, run_dir: pathlib.Path, option: str
) -> dict[str, Any]:
    """The network of a run at its newest checkpoint: the average of it, where there is one.

    Args:
      task, recipe: of the run.
      run_dir: the run's folder, which is only read.
      option: that named the folder, for errors.

    Returns:
      "params" and "batch_stats", on the first device.

    Raises:
      UserError: the run has no checkpoint, or one of another network.
    """
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    like = program(task, recipe, mesh, steps_per_epoch=1).state
    checkpoints = Checkpoints(run_dir, keep=1, read_only=True)
    restored = checkpoints.restore(like)
    checkpoints.close()
    if restored is None:
        raise UserError(f'{option}: the run in "{run_dir}" has no checkpoint yet.')
    state, _ = restored
    return state.variables if state.average is None else state.average


class _Run:
    """A run under way: all around its steps. All processes take the same turns at the same step."""

    def __init__(
        self,
        task: Task,
        feed: Feed,
        recipe: Recipe,
        run_dir: pathlib.Path,
        compiled: Program,
        checkpoint: CheckpointConfig,
    ):
        self.task, self.feed, self.recipe, self.run_dir = task, feed, recipe, run_dir
        self.compiled, self.checkpoint = compiled, checkpoint
        self.stopped_by: Callable[[], Signals | None] = lambda: None
        self.skipped: dict[str, str] = {}
        self.requests = meshes.Requests(compiled.mesh)
        self.checkpoints = Checkpoints(run_dir, checkpoint.keep)
        restored = self.checkpoints.restore(compiled.state)
        if restored is None:
            self.state, self.record = compiled.init(), Record()
        else:
            self.state, self.record = restored[0], Record.from_json(restored[1])
        self.step = int(self.state.step)
        self.unsettled: tuple[int, Scalars, HostBatch] | None = None
        self.batches = self._placed(feed.train, feed.training(self.step))
        self.saved, self.mark = time.monotonic(), time.perf_counter()
        lead = meshes.leads()
        self.metrics = Metrics(run_dir, self.record.rows, self.step) if lead else None
        self.progress = _progress(Console(quiet=not lead, markup=False, emoji=False))
        self.line = self.progress.add_task(
            "", total=recipe.epochs * feed.steps_per_epoch, completed=self.step, shown=""
        )
        devices, processes = compiled.mesh.size, jax.process_count()
        self.progress.console.print(
            f"global batch {recipe.batch_size:,} on {devices:,} devices of {processes} "
            f"processes, {recipe.batch_size // devices:,} on each",
            soft_wrap=True,
        )
        if restored is not None:
            self.progress.console.print(f"going on from step {self.step}")

    @property
    def epochs_done(self) -> int:
        """Those that are trained and evaluated."""
        return len(self.record.rows)

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Surrounds the loop: compiles, shows progress, and takes note of signals."""
        metrics = self.metrics or contextlib.nullcontext()
        with self.progress, metrics, contextlib.closing(self.batches):
            if self.epochs_done < self.recipe.epochs:
                self._compile()
            with preemption.noticed() as self.stopped_by:
                yield
        self.checkpoints.close()

    def batches_left(self) -> Iterator[tuple[HostBatch, DeviceBatch]]:
        """The batches that are left of the epoch."""
        first = self.record.steps
        for number in range(first, self.feed.steps_per_epoch):
            try:
                batch = next(self.batches)
            except DataLost as error:
                self._settle()
                self._leave_without_data(error)
            if number == first:  # what it takes to start reading is not the speed of training
                self.mark = time.perf_counter()
            yield batch
        self._settle()

    def took_step(self, batch: HostBatch, results: Scalars) -> None:
        """Takes note of a step that was dispatched; saves, and ends the run, where that is due."""
        self.step += 1
        stop, save = self._requests(self._overdue())
        self._settle()  # the step before, so that the device is never waited for
        self.unsettled = self.step, results, batch
        every = self.checkpoint.every_steps
        ends_epoch = self.step % self.feed.steps_per_epoch == 0  # evaluated, and saved, next
        due = not ends_epoch and (save or (every and self.step % every == 0))
        if stop or due:
            self._settle()
            self._save()
        if stop:
            self._leave(stop)

    def evaluate(self, variables: Any) -> Row:
        """Metrics over the whole held-out split."""
        evaluation, step = self.task.evaluation(), self.compiled.steps.evaluate
        on_host = jax.device_get if self.task.reduces else meshes.own_share
        placed = self._placed(self.feed.test, self.feed.evaluation())
        dispatched = ((batch, step(variables, arrays)) for batch, arrays in placed)
        try:
            for batch, results in _one_behind(dispatched):
                evaluation.add(batch, on_host(results))
                stop, _ = self._requests(False)
                if stop:  # the epoch's steps are saved, and evaluation begins anew
                    self._save()
                    self._leave(stop)
            return evaluation.row()
        except DataLost as error:  # the epoch's steps are saved
            self._leave_without_data(error)

    def end_epoch(self, metrics: Row, average: Row) -> None:
        """Writes down the epoch's metrics, those of the average too, and saves."""
        best, means = self.task.best, self.record.means
        numbers = {n: value for n, value in average.items() if not isinstance(value, Mapping)}
        row: Row = {
            "epoch": self.epochs_done + 1,
            "step": self.step,
            **{f"train_{name}": mean for name, mean in means.items()},
            "images_per_second": self._speed(),
            **metrics,
            **{f"average_{name}": value for name, value in numbers.items()},
        }
        self.record = Record(rows=[*self.record.rows, row])
        if self.metrics:
            self.metrics.epoch(row)
        self._save(average.get(best, metrics[best]))
        average_shown = f"  average {average[best]:.4f}" if average else ""
        self.progress.console.print(
            f"epoch {row['epoch']:3d}  {'  '.join(_columns(means))}  "
            f"{best.replace('_', ' ')} {metrics[best]:.4f}{average_shown}  "
            f"{row['images_per_second']:,.0f} images/s",
            soft_wrap=True,
        )
        used = row.get("regions", {})
        for layer in regions.collapsed(used):
            self.progress.console.print(
                f"warning: the guide of {layer} has collapsed: one of its "
                f"{used[layer]['of']} regions is in use",
                soft_wrap=True,
            )

    def _compile(self) -> None:
        """Compiles the steps before the first is taken, so that no step's time has it in it."""
        self.progress.update(self.line, description="compiling")
        self.progress.console.print("compiling the training step and the evaluation")
        _ = self.compiled.steps
        self._requests(False)
        self.requests.forget()

    def _placed(
        self, split: Named, batches: Iterator[HostBatch]
    ) -> Generator[tuple[HostBatch, DeviceBatch], None, None]:
        """Each batch here and on the devices, where the next is on its way too."""

        def place(batch: HostBatch) -> tuple[HostBatch, DeviceBatch]:
            for index, why in batch.broken.items():
                self._skip(split, index, why)
            return batch, meshes.on_devices(batch.arrays, self.compiled.mesh)

        return _one_behind(map(place, batches))

    def _skip(self, split: Named, index: int, why: str) -> None:
        name = split.name_of(index)
        if name not in self.skipped:
            self.skipped[name] = f"{name}: {why}"
            if len(self.skipped) <= _SHOWN_SKIPPED:
                print(f"skipped {self.skipped[name]}", file=sys.stderr)

    def _settle(self) -> None:
        """Takes note of the results of the step that was taken last, if that is not done yet.

        Raises:
          UserError: they are not finite.
        """
        if self.unsettled is None:
            return
        (step, results, batch), self.unsettled = self.unsettled, None
        values = {name: float(value) for name, value in jax.device_get(results).items()}
        if not math.isfinite(values["loss"] + values["gradient_norm"]):
            self._refuse(step, values, batch.index)
        now, record = time.perf_counter(), self.record
        record.seconds += now - self.mark
        self.mark = now
        record.steps += 1
        for name in ("loss", *sorted(values.keys() - {"loss", *_NOT_AVERAGED})):
            record.sums[name] = record.sums.get(name, 0.0) + values[name]
        if self.metrics and step % _CURVE_EVERY == 0:
            self.metrics.scalars(step, {"step": values})
        self.progress.update(
            self.line,
            advance=1,
            description=f"epoch {self.epochs_done + 1}/{self.recipe.epochs}",
            shown=_shown(record.means, self._speed()),
        )
        self.checkpoints.check()

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
        split, places = self.feed.train, meshes.from_all_processes(index)
        names = [split.name_of(int(place)) for place in places]
        report = self.run_dir / "non_finite.json"
        if meshes.leads():
            found = {"step": step, **values, "samples": names}
            write_text(report, json.dumps(found, indent=2) + "\n")
        raise UserError(
            f"the loss is {values['loss']} and its gradient's norm {values['gradient_norm']} at "
            f"step {step} (epoch {self.epochs_done + 1}), on {', '.join(names[:3])} and the "
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


def _columns(means: Mapping[str, float]) -> list[str]:
    return [f"{name} {mean:.3f}" for name, mean in means.items()]


def _shown(means: Mapping[str, float], speed: float) -> str:
    """The loss, and as many of the other means as a progress line has room for."""
    columns, rate = _columns(means), f"{speed:,.0f} img/s"
    while len("  ".join([*columns, rate])) > _SHOWN_WIDTH and len(columns) > 1:
        columns.pop()
    return "  ".join([*columns, rate])


def _progress(console: Console) -> Progress:
    return Progress(  # within 80 columns
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
