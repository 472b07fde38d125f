"""LFW's protocol "unrestricted, labelled outside data: none", for several networks, by one command.

For every fold, each network is trained on the people of the other folds, but for one fold that
chooses the threshold (`--set-apart` of experiments.face), and judged by the pairs of that fold, of
people whom it has not seen. Runs go side by side. What is finished is skipped, what was stopped is
gone on with; SIGTERM (status 75) and Ctrl-C (130) stop it, and the runs under way, which save where
they stand. --out gets lfw.json, lfw.md and lfw.png after every run.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import tyro

from experiments.face.__main__ import EXPERIMENT
from experiments.face.config import PRESETS, Config
from experiments.runtime import commands, configs, run_folder
from experiments.runtime.errors import UserError
from experiments.runtime.files import replacing, write_text
from experiments.runtime.jobs import Job, run_side_by_side

CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "plain": ("`nn.Conv`", {"conv": "standard"}),
    "dr": ("`DRConv`, m = 8", {"conv": "drconv"}),
    "one-region": ("`DRConv`, one region", {"conv": "dynamic"}),
    "local": ("locally connected", {"conv": "local"}),
}
"""The networks: what they are called in tables, and the options of the model that make them."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """LFW's protocol "unrestricted, labelled outside data: none", for several networks."""

    data: str
    """As that of experiments.face: folder:PATH, a tree or a zip of LFW with its pairs.txt, or lfw
    with --pairs."""
    pairs: str | None = None
    """LFW's pairs.txt, if it is not in --data."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which networks."""
    folds: tuple[int, ...] = (0, 1, 2)
    """Which of the ten folds."""
    seeds: int = 2
    """Runs of each network on each fold, with seeds 0, 1, ..."""
    epochs: int = PRESETS["lfw"].train.epochs
    """Of each run."""
    jobs: int | None = None
    """Runs at a time; default: one on every core."""
    runs: commands.Path = pathlib.Path("runs/lfw")
    """The runs' folders."""
    out: commands.Path = pathlib.Path("docs/face")
    """Folder of the results."""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}.")
        if unknown := [case for case in self.cases if case not in CASES]:
            raise UserError(f'--cases must be among {", ".join(CASES)}, got "{unknown[0]}".')


class Run(NamedTuple):
    """A run that is done.

    Attributes:
      case, fold, seed: which it is.
      metrics: of the last epoch.
    """

    case: str
    fold: int
    seed: int
    metrics: Mapping[str, float]


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(Arguments, prog="python -m experiments.face.lfw", description=__doc__)
        jobs = jobs_of(arguments)
        with run_folder.held(arguments.runs, "--runs"):
            left = [job for job in jobs if not _is_done(job, jobs[job])]
            print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished before")
            arguments.out.mkdir(parents=True, exist_ok=True)
            run_side_by_side(left, lambda job: _write(arguments, jobs), count=arguments.jobs)
            _write(arguments, jobs)
        print(table(_runs(jobs)))


def jobs_of(arguments: Arguments) -> dict[Job, tuple[str, Config]]:
    """The runs, all networks of a fold and seed one behind the other, with case and options."""
    found = {}
    for seed in range(arguments.seeds):
        for fold in arguments.folds:
            for case in arguments.cases:
                preset = PRESETS["lfw"]
                config = dataclasses.replace(
                    preset,
                    data=arguments.data,
                    pairs=arguments.pairs,
                    fold=fold,
                    model=dataclasses.replace(preset.model, **CASES[case][1]),
                    train=dataclasses.replace(preset.train, seed=seed, epochs=arguments.epochs),
                )
                config = EXPERIMENT.absolute(config)
                command = ("-m", "experiments.face", *configs.arguments(config, preset))
                name = f"{case}-fold{fold}-seed{seed}"
                job = Job(name, command, arguments.runs / name, arguments.epochs)
                found[job] = (case, config)
    return found


def _is_done(job: Job, wanted: tuple[str, Config]) -> bool:
    if not (job.folder / "report.json").exists():
        return False
    differing = configs.differences(run_folder.read_config(Config, "--runs", job.folder), wanted[1])
    for name in set(EXPERIMENT.may_change) - {"train.epochs"}:
        differing = {key: value for key, value in differing.items() if not key.startswith(name)}
    if differing:
        raise UserError(
            f'--runs: "{job.folder}" is a run with other options '
            f"({', '.join(map(configs.option, differing))}); name another folder."
        )
    return True


def _runs(jobs: Mapping[Job, tuple[str, Config]]) -> list[Run]:
    runs = []
    for job, (case, config) in jobs.items():
        report = job.folder / "report.json"
        if report.exists() and config.fold is not None:
            metrics = json.loads(report.read_text(encoding="utf-8"))
            runs.append(Run(case, config.fold, config.train.seed, metrics))
    return runs


def table(runs: Sequence[Run]) -> str:
    """Means over folds and seeds, and differences to the plain network of the same fold and seed.

    Behind a mean stands the standard deviation over folds and seeds; behind a difference its
    standard error.
    """
    head = (
        "| | accuracy, % | against nn.Conv | equal error rate, % | against nn.Conv | runs |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
    )
    rows = []
    for case, (title, _) in CASES.items():
        cells = []
        for name in ("accuracy", "equal_error_rate"):
            values = _values(runs, case, name)
            cells += [
                _with_spread(list(values.values()), np.std),
                _with_spread(_differences(runs, case, name), _standard_error, sign="+"),
            ]
        if values:
            rows.append(f"| {title} | {' | '.join(cells)} | {len(values)} |\n")
    return head + "".join(rows)


def _values(runs: Sequence[Run], case: str, name: str) -> dict[tuple[int, int], float]:
    """A metric of a network in percent, by fold and seed."""
    return {(r.fold, r.seed): 100 * r.metrics[name] for r in runs if r.case == case}


def _differences(runs: Sequence[Run], case: str, name: str) -> list[float]:
    """To the plain network of the same fold and seed."""
    if case == "plain":
        return []
    plain = _values(runs, "plain", name)
    return [value - plain[k] for k, value in _values(runs, case, name).items() if k in plain]


def _standard_error(values: Sequence[float], ddof: int = 1) -> float:
    return float(np.std(values, ddof=ddof) / np.sqrt(len(values)))


def _with_spread(values: Sequence[float], spread: Any, sign: str = "") -> str:
    if not values:
        return ""
    behind = f" ± {spread(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.2f}{behind}"


def _write(arguments: Arguments, jobs: Mapping[Job, tuple[str, Config]]) -> None:
    """lfw.json, lfw.md and lfw.png, of the runs that are done."""
    runs, out = _runs(jobs), arguments.out
    write_text(out / "lfw.json", json.dumps([run._asdict() for run in runs], indent=2) + "\n")
    command = shlex.join(["python", "-m", "experiments.face.lfw", *sys.argv[1:]])
    write_text(
        out / "lfw.md",
        "# LFW, trained on nothing else\n\n"
        f"Made by `{command}`. Each network is trained on the people of eight of LFW's ten folds; "
        "those of a ninth choose the threshold, those of the tenth judge. Mean and standard "
        "deviation over folds and seeds; differences to the plain network of the same fold and "
        f"seed, and their standard error.\n\n{table(runs)}\n![Accuracy by network](lfw.png)\n",
    )
    if runs:
        _draw(runs, out / "lfw.png")


def _draw(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Every run's accuracy, those of one fold and seed joined by a line."""
    names = [case for case in CASES if _values(runs, case, "accuracy")]
    figure, ax = plt.subplots(figsize=(1.5 + 1.6 * len(names), 4), layout="constrained")
    keys = sorted({(run.fold, run.seed) for run in runs})
    for fold, seed in keys:
        values = [_values(runs, case, "accuracy").get((fold, seed), np.nan) for case in names]
        ax.plot(values, "o-", color=f"C{fold}", alpha=0.5, linewidth=0.8, markersize=4)
    means = [np.mean(list(_values(runs, case, "accuracy").values())) for case in names]
    ax.plot(means, "_", color="black", markersize=28, markeredgewidth=2, label="mean")
    ax.set_xticks(range(len(names)), [CASES[name][0].replace("`", "") for name in names])
    ax.set_ylabel("accuracy on people not seen, %")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
