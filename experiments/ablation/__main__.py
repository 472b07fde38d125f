"""Shows on real images what DRConv gains, and what of it matters.

Trains every network of experiments/ablation/study.py by the same recipe, several seeds each, as
runs of experiments.classification that go side by side. What is finished is skipped, what was
stopped is gone on with; SIGTERM (status 75) and Ctrl-C (130) stop it, and the runs under way, which
save where they stand. --out gets results.json, results.md and a picture after every run. The data
is CIFAR-10 as a tree of images or a zip of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.ablation import plots, report, study
from experiments.ablation.results import Results, Run
from experiments.classification.config import PRESETS
from experiments.runtime import commands, configs, preemption, run_folder
from experiments.runtime.errors import Preempted, UserError

# XLA asks the system for its buffers anew at every step, which is cheaper in large pages. Other
# systems than Linux do not look at this.
_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Shows on real images what DRConv gains, and what of it matters."""

    data: str
    """As that of experiments.classification: folder:PATH of CIFAR-10, a tree or a zip."""
    cases: tuple[str, ...] = tuple(study.CASES)
    """Which networks."""
    seeds: int = 3
    """Runs of each, with seeds 0, 1, ..."""
    epochs: int = 5
    """Of each run."""
    jobs: int | None = None
    """Runs at a time; default: one on every core."""
    runs: commands.Path = pathlib.Path("runs/ablation")
    """The runs' folders."""
    out: commands.Path = pathlib.Path("docs/ablation")
    """Folder of results and pictures."""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}.")
        for name in self.cases:
            if name not in study.CASES:
                known = ", ".join(study.CASES)
                raise UserError(f'--cases must be among {known}, got "{name}".')


@dataclasses.dataclass
class _Job:
    """A run under way on cores of its own."""

    run: Run
    process: subprocess.Popen[bytes]
    folder: pathlib.Path
    cores: set[int]

    def epochs(self) -> int:
        """Those it has behind it."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        return 0


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(Arguments, prog="python -m experiments.ablation", description=__doc__)
        results = Results(arguments.out)
        with run_folder.held(arguments.runs, "--runs"):
            _run_all(arguments, results)
        print(report.text(results.runs))


def _run_all(arguments: Arguments, results: Results) -> None:
    """Does what is left to do."""
    wanted = [
        Run(name, seed, _command(name, seed, arguments))
        for name, seed in study.order(arguments.cases, arguments.seeds)
    ]
    left = [run for run in wanted if not results.has(run)]
    print(f"{len(wanted)} runs, {len(wanted) - len(left)} of them finished before")
    free = _shares(arguments.jobs)
    going: list[_Job] = []
    with _progress() as progress, preemption.noticed() as stopped_by, _ended_with_us(going):
        task = progress.add_task("", total=len(left) * arguments.epochs, names="")
        done = 0
        while left or going:
            while left and free:
                going.append(_start(left.pop(0), free.pop(), arguments.runs))
            names = " ".join(f"{job.run.case}/{job.run.seed}" for job in going)
            epochs = done * arguments.epochs + sum(job.epochs() for job in going)
            progress.update(task, completed=epochs, names=names)
            time.sleep(0.5)
            if by := stopped_by():
                raise Preempted(by)
            for job in [job for job in going if job.process.poll() is not None]:
                going.remove(job)
                free.append(job.cores)
                done += 1
                if job.process.returncode:
                    raise UserError(
                        f"the run in {job.folder} ended with status {job.process.returncode}; see "
                        f'"{_log_of(job.folder)}".'
                    )
                results.add(job.run, job.folder)
                report.write(results.runs, arguments.out, _own_command())
                plots.write(results.runs, arguments.out)


def _command(name: str, seed: int, arguments: Arguments) -> list[str]:
    """The run as a command, but for its folder."""
    config = study.config_of(name, seed, arguments.data, arguments.epochs)
    return ["-m", "experiments.classification", *configs.arguments(config, PRESETS["small"])]


def _own_command() -> str:
    return shlex.join(["python", "-m", "experiments.ablation", *sys.argv[1:]])


def _start(run: Run, cores: set[int], runs: pathlib.Path) -> _Job:
    folder = runs / f"{run.case}-seed{run.seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *run.command, "--run-dir", str(folder), "--auto-resume"]
    with _log_of(folder).open("ab") as log, _on(cores):
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | _LARGE_PAGES)
    return _Job(run, process, folder, cores)


def _log_of(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.log")


def _shares(jobs: int | None) -> list[set[int]]:
    """The cores of each job; small networks gain more from a core each than from all together."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = jobs or len(cores) or os.cpu_count() or 1
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
def _ended_with_us(jobs: list[_Job]) -> Iterator[None]:
    """Stops the runs that are under way when this command stops; each saves where it stands."""
    try:
        yield
    finally:
        for job in jobs:
            job.process.terminate()
        for job in jobs:
            job.process.wait()


def _progress() -> Progress:
    return Progress(
        TextColumn("epochs"),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[names]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )


if __name__ == "__main__":
    main()
