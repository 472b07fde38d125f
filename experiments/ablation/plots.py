"""The study's pictures."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from experiments.ablation import study
from experiments.ablation.report import accuracies
from experiments.ablation.results import Run
from experiments.runtime.files import replacing

_DOT, _MEAN = "#56b4e9", "#d55e00"


def write(runs: Sequence[Run], folder: pathlib.Path) -> None:
    """accuracy.png: for every case that has a run, its seeds' accuracies and their mean."""
    names = [name for name in study.CASES if accuracies(runs, name)][::-1]
    figure, ax = plt.subplots(figsize=(8, 1.2 + 0.32 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        values = accuracies(runs, name)
        ax.plot(values, [place] * len(values), "o", color=_DOT, label="a seed")
        ax.plot(statistics.mean(values), place, "|", color=_MEAN, ms=16, mew=2, label="mean")
    if plain := accuracies(runs, "plain"):
        ax.axvline(statistics.mean(plain), color="grey", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(names)), [study.CASES[name].title for name in names])
    ax.set_xlabel("test accuracy after the last epoch, %")
    ax.grid(axis="x", alpha=0.3)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[:2], labels[:2], fontsize=8)
    with replacing(folder / "accuracy.png") as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
