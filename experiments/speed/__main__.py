"""Measures the region convolution, the layer and a network against what they replace.

Without arguments: the mark, on a CPU in a few minutes. `--suite full` is the sweep over shapes, m,
kernel sizes, dtypes and batches; `--suite gpu` has batches for a GPU, whose own time it measures,
and begins no case after 4 minutes; `--suite detection` has RoIAlign, suppression and a whole
detector. PyTorch and torchvision take part where they are installed (pip install '.[compare]'), and
layers are compiled for a TPU and a GPU that there need not be where their compilers are (pip
install '.[tpu]' and '.[cuda]'); beside these, JAX_PLATFORMS=cpu keeps JAX from looking for devices.
The run's folder gets results.json and results.md, renewed after every case, and plots.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from drconv_jax.region_conv import IMPLEMENTATIONS
from experiments.runtime import commands, run_folder
from experiments.runtime.errors import UserError
from experiments.speed import cases, compiled, contenders, measure, plots, report
from experiments.speed.cases import Case
from experiments.speed.results import Measured, Result, StepBytes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures the region convolution, the layer and a network against what they replace."""

    suite: cases.Suite = "mark"
    """Which cases: the mark, the full sweep, batches for a GPU, detection beside torchvision, or
    tiny ones to try the command."""
    rounds: int = 11
    """Rounds, in each of which every contender of a case takes one turn."""
    select: str = ""
    """Only the cases whose label contains this, such as "op" or "14x14 116"."""
    minutes: float | None = None
    """No case is begun after so many minutes; default: 4 with --suite gpu, otherwise no limit."""
    implementation: str | None = None
    """Of the region convolution; None is the default for these arguments and the platform."""
    guide: contenders.Guide = "random"
    """Guide features: random ones use all regions equally, blocky ones are constant over squares
    of 7 pixels (a layer, whose guide is its own, gets such an input)."""
    run_dir: commands.Path | None = None
    """Folder for this run, which must not hold one yet; default: runs/ and the time."""


def main() -> None:
    """The command."""
    with commands.running():
        run(tyro.cli(Arguments, prog="python -m experiments.speed", description=__doc__))


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {arguments.rounds}.")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UserError(f"--minutes must be positive, got {arguments.minutes:g}.")
    if arguments.implementation not in (None, *IMPLEMENTATIONS):
        raise UserError(
            f"--implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got "
            f'"{arguments.implementation}".'
        )
    chosen = cases.suite(arguments.suite, arguments.select)
    name = f"{arguments.suite}-{time.strftime('%Y%m%d-%H%M%S')}"
    default = pathlib.Path("runs") / "speed" / name
    with run_folder.held_without("results.json", arguments.run_dir, default) as run_dir:
        _run_in(run_dir, arguments, chosen)


def _run_in(run_dir: pathlib.Path, arguments: Arguments, chosen: Sequence[Case]) -> None:
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a file has room for whole rows
    console.print(f"{len(chosen)} cases; run folder {run_dir}", highlight=False)
    start = time.time()
    about = {
        "command": "python -m experiments.speed " + shlex.join(sys.argv[1:]),
        "machine": report.machine(),
        "guide": arguments.guide,
    }
    for measured in _measure(arguments, chosen, console):
        if measured.results or measured.compiled:
            report.write(run_dir, measured, about | {"seconds": time.time() - start})
    if not measured.results and not measured.compiled:
        raise UserError("nothing was measured. " + " ".join(measured.notes))
    report.show(console, measured)
    plots.write(run_dir, measured.results)
    console.print(f"{time.time() - start:.0f} s; see {run_dir}", highlight=False)


def _measure(arguments: Arguments, chosen: Sequence[Case], console: Console) -> Iterator[Measured]:
    """What is measured so far, after every case."""
    timed = [case for case in chosen if case.level != "compiled"]
    minutes = arguments.minutes or (4.0 if arguments.suite == "gpu" else None)
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    results: list[Result] = []
    step_bytes: list[StepBytes] = []
    peak: dict[cases.DType, float] = {}
    notes: list[str] = []
    if not contenders.torch_takes_part():
        notes.append(
            "PyTorch is not installed (pip install '.[compare]'), or not for this device: it takes "
            "no part."
        )
    elif arguments.suite == "detection" and not contenders.torchvision_takes_part():
        notes.append("torchvision is not installed (pip install '.[compare]'): it takes no part.")
    programs: list[compiled.Compiled] = []

    def so_far(done: int) -> Measured:
        missing = [f"Only {done} of {len(chosen)} cases: the run ended before the others."]
        all_notes = notes + (missing if done < len(chosen) else [])
        return Measured(results, peak, step_bytes, programs, all_notes)

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        # Compiling counts as much as the rounds.
        task = progress.add_task("", total=2 * arguments.rounds * len(timed) + len(chosen))
        for done, case in enumerate(timed, start=1):
            if done > 1 and time.monotonic() > end:
                return
            progress.update(task, description=case.label)
            if not console.is_terminal:
                console.print(case.label, highlight=False)
            peak[case.dtype] = max(peak.get(case.dtype, 0.0), measure.matmul_peak(case.dtype))
            try:
                results += _time(case, arguments, functools.partial(progress.advance, task))
            except NotImplementedError as error:
                notes.append(f"{case.label} is left out: {error}")
                progress.advance(task, 2 * arguments.rounds)
            if case.level == "layer" and jax.default_backend() == "cpu":
                found = contenders.training_step_bytes(case, arguments.implementation)
                step_bytes += [StepBytes(case, *found)] if found else []
            progress.advance(task)
            yield so_far(done)
            gc.collect()
        untimed = [case for case in chosen if case.level == "compiled"]
        for done, case in enumerate(untimed, start=len(timed) + 1):
            progress.update(task, description=case.label)
            for target in compiled.TARGETS:
                outcome = compiled.measure(case, arguments.implementation, target)
                if not isinstance(outcome, str):
                    programs += outcome
                elif outcome not in notes:
                    notes.append(outcome)
            progress.advance(task)
            yield so_far(done)


def _time(case: Case, arguments: Arguments, advance: Callable[[int], None]) -> list[Result]:
    parties = contenders.contenders(case, arguments.implementation, arguments.guide)
    advance(arguments.rounds)
    seconds = measure.time_rounds(parties, arguments.rounds, lambda: advance(1))
    return [
        Result(case, c.name, c.regions, c.direction, c.standard, times, c.temporary_bytes)
        for c, times in zip(parties, seconds, strict=True)
    ]


if __name__ == "__main__":
    main()
