"""Shows on real images what DRConv gains, and what of it matters.

Trains every network of experiments/ablation/study.py by the same recipe, several seeds each, as
runs of experiments.classification that go side by side. What is finished is skipped, what was
stopped is gone on with; SIGTERM (status 75) and Ctrl-C (130) stop it, and the runs under way, which
save where they stand. --out gets results.json, results.md and a picture after every run. The data
is CIFAR-10 as a tree of images or a zip of one.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import sys

import tyro

from experiments.ablation import plots, report, study
from experiments.ablation.results import Results, Run
from experiments.classification.config import PRESETS
from experiments.runtime import commands, configs, run_folder
from experiments.runtime.errors import UserError
from experiments.runtime.jobs import Job, run_side_by_side


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
    left = {_job(run, arguments): run for run in wanted if not results.has(run)}
    print(f"{len(wanted)} runs, {len(wanted) - len(left)} of them finished before")

    def finished(job: Job) -> None:
        results.add(left[job], job.folder)
        report.write(results.runs, arguments.out, _own_command())
        plots.write(results.runs, arguments.out)

    run_side_by_side(list(left), finished, count=arguments.jobs)


def _job(run: Run, arguments: Arguments) -> Job:
    folder = arguments.runs / f"{run.case}-seed{run.seed}"
    return Job(f"{run.case}/{run.seed}", tuple(run.command), folder, arguments.epochs)


def _command(name: str, seed: int, arguments: Arguments) -> list[str]:
    """The run as a command, but for its folder."""
    config = study.config_of(name, seed, arguments.data, arguments.epochs)
    return ["-m", "experiments.classification", *configs.arguments(config, PRESETS["small"])]


def _own_command() -> str:
    return shlex.join(["python", "-m", "experiments.ablation", *sys.argv[1:]])


if __name__ == "__main__":
    main()
