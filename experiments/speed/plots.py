"""A run's pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.speed.cases import Case
from experiments.speed.contenders import OURS
from experiments.speed.measure import DIRECTIONS, Direction
from experiments.speed.results import Result, best_standard, ratio

_COLOURS = {"forward": "#0072b2", "forward+backward": "#d55e00"}
_TITLES = {"op": "Region convolution", "layer": "Whole layer", "network": "Network"}


def write(run_dir: pathlib.Path, results: Sequence[Result]) -> None:
    """ratio_LEVEL.png for each level measured, and time_by_regions.png where m varies."""
    for level in OURS:
        at_level = [r for r in results if r.case.level == level]
        if at_level:
            _ratios(at_level, run_dir / f"ratio_{level}.png")
    if sweeps := _cases([r for r in results if len(r.case.regions) > 1]):
        _times_by_regions(results, sweeps, run_dir / "time_by_regions.png")


def _ratios(results: Sequence[Result], path: pathlib.Path) -> None:
    """Horizontal bars by shape: how many times as long as the best standard operation."""
    by_name: dict[str, Case] = {}
    for case in _cases(results):
        by_name.setdefault(_name(case), case)
    cases = list(by_name.values())
    names = list(dict.fromkeys(r.contender for r in results if not r.standard))
    bar = 0.8 / len(names)
    figure, axes = plt.subplots(
        1, 2, sharey=True, figsize=(11, 1.3 + len(cases) * (0.2 + 0.16 * len(names))),
        layout="constrained",
    )  # fmt: skip
    for direction, ax in zip(DIRECTIONS, axes, strict=True):
        for i, name in enumerate(names):
            places, values = [], []
            for place, case in enumerate(cases):
                if (value := _ratio(results, case, name, direction)) is not None:
                    places.append(place + (i - (len(names) - 1) / 2) * bar)
                    values.append(value)
            bars = ax.barh(places, [v - 1 for v in values], bar * 0.92, left=1, label=name)
            ax.bar_label(bars, [f"{v:.3g}" for v in values], padding=2, fontsize=7)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.margins(x=0.12)
        ax.set_title(direction)
        ax.set_xlabel("time / best standard operation")
    axes[0].set_yticks(range(len(cases)), list(by_name))
    axes[0].set_ylim(len(cases) - 0.5, -0.5)
    figure.suptitle(f"{_TITLES[results[0].case.level]}, against what it replaces")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _times_by_regions(results: Sequence[Result], cases: Sequence[Case], path: pathlib.Path) -> None:
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(5 * columns, 3.6 * rows), layout="constrained"
    )
    for ax in axes.flat[len(cases) :]:
        ax.set_axis_off()
    for case, ax in zip(cases, axes.flat, strict=False):
        _sweep(results, case, ax)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _sweep(results: Sequence[Result], case: Case, ax: Axes) -> None:
    """Time against m: medians and quartiles, and the best standard operation as a dashed line."""
    for direction in DIRECTIONS:
        colour = _COLOURS[direction]
        ours = [
            r
            for r in results
            if (r.case, r.direction, r.contender) == (case, direction, OURS[case.level])
        ]
        ours.sort(key=lambda r: r.regions or 0)
        medians = [1e3 * r.median for r in ours]
        below = [m - 1e3 * r.quartiles[0] for m, r in zip(medians, ours, strict=True)]
        above = [1e3 * r.quartiles[1] - m for m, r in zip(medians, ours, strict=True)]
        ms = [r.regions or 0 for r in ours]
        ax.errorbar(
            ms, medians, (below, above), marker="o", capsize=3, color=colour,
            label=f"{OURS[case.level]}, {direction}",
        )  # fmt: skip
        if standard := best_standard(results, case, direction):
            label = f"{standard.contender}, {direction}"
            ax.axhline(1e3 * standard.median, color=colour, linestyle="--", label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(case.regions, [str(m) for m in case.regions])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_xlabel("m, regions")
    ax.set_ylabel("milliseconds")
    ax.set_title(f"{case.level} {_name(case)}", fontsize=9)


def _ratio(results: Sequence[Result], case: Case, name: str, direction: Direction) -> float | None:
    """At m = 8, or at the first m measured; of what has no regions, as it is."""
    m = 8 if 8 in case.regions else case.regions[0]
    standard = best_standard(results, case, direction)
    for r in results:
        if (r.case, r.contender, r.direction) == (case, name, direction) and r.regions in (m, None):
            return ratio(r, standard).value if standard else None
    return None


def _cases(results: Sequence[Result]) -> list[Case]:
    return list(dict.fromkeys(r.case for r in results))


def _name(case: Case) -> str:
    return f"{case.shape_label} {case.dtype}"
