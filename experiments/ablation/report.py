"""The study's tables."""

from __future__ import annotations

import functools
import pathlib
import statistics
from collections.abc import Sequence

from drconv_jax import cost
from experiments.ablation import study
from experiments.ablation.results import Run
from experiments.runtime.files import write_text

_IMAGE = (1, 32, 32, 3)
_CLASSES = 10


def accuracies(runs: Sequence[Run], case: str) -> list[float]:
    """Test accuracies of the last epoch, in percent, by seed."""
    chosen = sorted((run for run in runs if run.case == case), key=lambda run: run.seed)
    return [100 * run.report["test_accuracy"] for run in chosen if run.report]


def write(runs: Sequence[Run], folder: pathlib.Path, command: str) -> None:
    """results.md, with the command that made it."""
    introduction = (
        "# What DRConv gains, and what of it matters\n\n"
        f"Made by `{command}`; every run's own command is in results.json. Test accuracy of the "
        "last epoch in percent, mean over seeds and sample standard deviation, and that mean "
        "beside nn.Conv's; multiply-adds of one 32 x 32 image.\n\n"
        "![Accuracy of every case](accuracy.png)\n\n"
    )
    write_text(folder / "results.md", introduction + text(runs))


def text(runs: Sequence[Run]) -> str:
    """The tables, of cases that have a run."""
    parts = []
    for title, names in study.TABLES.items():
        rows = [_row(runs, name) for name in names if accuracies(runs, name)]
        if rows:
            head = (
                "| | test accuracy | against nn.Conv | seeds | multiply-adds | parameters |\n"
                "| --- | --- | --- | --- | --- | --- |\n"
            )
            parts.append(f"## {title}\n\n{head}{''.join(rows)}")
    return "\n".join(parts)


def _row(runs: Sequence[Run], name: str) -> str:
    values, plain = accuracies(runs, name), accuracies(runs, "plain")
    mean = statistics.mean(values)
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    gain = f"{mean - statistics.mean(plain):+.2f}" if plain and name != "plain" else ""
    multiply_adds, parameters = _cost(name)
    return (
        f"| {study.CASES[name].title} | {mean:.2f}{spread} | {gain} | {len(values)} | "
        f"{multiply_adds / 1e6:.2f} M | {parameters / 1e3:,.0f} k |\n"
    )


@functools.cache
def _cost(name: str) -> tuple[int, int]:
    """Multiply-adds and parameters of a case's network."""
    model = study.CASES[name].model.build(_CLASSES)
    return cost.multiply_adds(model, _IMAGE).total, cost.parameters(model, _IMAGE).total
