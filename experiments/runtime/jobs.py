"""Many runs of a study, each a command in a process of its own, side by side on all cores."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.runtime import preemption
from experiments.runtime.errors import Preempted, UserError

# XLA asks the system for its buffers anew at every step, which is cheaper in large pages. Other
# systems than Linux do not look at this.
_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
      name: for the progress bar.
      command: what Python is called with, but for the run's folder.
      folder: the run's, where it goes on if it was stopped.
      epochs: that it has.
    """

    name: str
    command: Sequence[str]
    folder: pathlib.Path
    epochs: int


@dataclasses.dataclass
class _Process:
    """A run under way on cores of its own."""

    job: Job
    process: subprocess.Popen[bytes]
    cores: set[int]

    def epochs(self) -> int:
        """Those it has behind it."""
        with contextlib.suppress(FileNotFoundError):
            return (self.job.folder / "metrics.jsonl").read_bytes().count(b"\n")
        return 0


def run_side_by_side(
    jobs: Sequence[Job], finished: Callable[[Job], None], *, count: int | None = None
) -> None:
    """Makes runs, so many at a time.

    Args:
      jobs: the runs, in their order.
      finished: is called after each.
      count: runs at a time; None is one on every core.

    Raises:
      UserError: a run has failed.
      Preempted: SIGTERM or Ctrl-C came; the runs under way have saved where they stand.
    """
    left, going, done = list(jobs), list[_Process](), 0
    free = _shares(count)
    with _progress() as progress, preemption.noticed() as stopped_by, _ended_with_us(going):
        task = progress.add_task("", total=sum(job.epochs for job in jobs), names="")
        while left or going:
            while left and free:
                going.append(_start(left.pop(0), free.pop()))
            names = " ".join(running.job.name for running in going)
            epochs = done + sum(running.epochs() for running in going)
            progress.update(task, completed=epochs, names=names)
            time.sleep(0.5)
            if by := stopped_by():
                raise Preempted(by)
            for running in [r for r in going if r.process.poll() is not None]:
                going.remove(running)
                free.append(running.cores)
                done += running.job.epochs
                if running.process.returncode:
                    raise UserError(
                        f"the run in {running.job.folder} ended with status "
                        f'{running.process.returncode}; see "{_log_of(running.job.folder)}".'
                    )
                finished(running.job)


def _start(job: Job, cores: set[int]) -> _Process:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *job.command, "--run-dir", str(job.folder), "--auto-resume"]
    with _log_of(job.folder).open("ab") as log, _on(cores):
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | _LARGE_PAGES)
    return _Process(job, process, cores)


def _log_of(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.log")


def _shares(count: int | None) -> list[set[int]]:
    """The cores of each run; small networks gain more from a core each than from all together."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = count or len(cores) or os.cpu_count() or 1
    return [set(cores[i % max(1, len(cores)) :: count]) for i in range(count)]


@contextlib.contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Processes started within run on these cores, where the system can tell them so."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _ended_with_us(running: list[_Process]) -> Iterator[None]:
    """Stops the runs that are under way when this command stops; each saves where it stands."""
    try:
        yield
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.process.wait()


def _progress() -> Progress:
    return Progress(
        TextColumn("epochs"),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[names]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
