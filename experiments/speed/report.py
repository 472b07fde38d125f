"""A run's files and its tables."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.runtime.files import write_text
from experiments.speed import mark
from experiments.speed.measure import DEVICE_CALLS
from experiments.speed.results import (
    Measured,
    Result,
    best_standard,
    fastest_anywhere,
    fraction_of_peak,
    ratio,
)

_RESULT_HEADS = (
    "case", "contender", "m", "direction", "ms", "quartiles", "ratio", "quartiles", "to fastest",
    "of peak", "temp MB",
)  # fmt: skip
_COMPILED_HEADS = (
    *("target", "layer", "direction", "DRConv MB", "nn.Conv MB", "ratio"),
    *("temp MB", "temp / (x + dy)", "kernels", "nn.Conv's"),
)
_COMPILED_TEXT = (
    "What compilers for accelerators say, without one: bytes that the programs access (that for "
    "GPUs does not tell), memory beside arguments and results, and how many kernels a GPU is told "
    "to start, whose names are in results.json. Layers have their guides; forward+backward has the "
    "gradients of the input and all parameters."
)
_MARK_HEADS = ("the mark", "mark", "measured", "quartiles", "met")


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "numpy", "torch", "torchvision", "libtpu", "drconv_jax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
    }


def as_json(measured: Measured, about: dict[str, Any]) -> str:
    """Everything, times of all rounds included; seconds and bytes."""
    results = []
    for r in measured.results:
        standard = best_standard(measured.results, r.case, r.direction)
        entry = dataclasses.asdict(r) | {"median": r.median, "quartiles": r.quartiles}
        entry["ratio_to_best_standard"] = dataclasses.asdict(ratio(r, standard or r))
        entry["fraction_of_peak"] = fraction_of_peak(r, measured.peak)
        results.append(entry)
    whole = about | {
        "peak_multiply_adds_per_second": measured.peak,
        "results": results,
        "training_step_bytes": [
            dataclasses.asdict(s) | {"ratio": s.ratio} for s in measured.step_bytes
        ],
        "compiled": [
            dataclasses.asdict(c) | {"ratio": c.ratio, "temporary_ratio": c.temporary_ratio}
            for c in measured.compiled
        ],
        "mark": [dataclasses.asdict(row) | {"met": row.met} for row in mark.rows(measured)],
        "notes": list(measured.notes),
    }
    return json.dumps(whole, indent=2) + "\n"


def as_markdown(measured: Measured, about: dict[str, Any]) -> str:
    """The tables, with what one must know to read them."""
    sections = [
        f"`{about['command']}`",
        f"{about['machine']['cpu']}, {about['machine']['cores']} cores, "
        f"{about['machine']['backend']} ({about['machine']['device']}), "
        + ", ".join(f"{name} {v}" for name, v in about["machine"]["versions"].items()),
        _legend(measured, about["guide"]),
    ]
    if marked := mark_cells(measured):
        sections.append("## The mark\n\n" + _markdown_table(_MARK_HEADS, marked))
    sections.append("## Times\n\n" + _markdown_table(_RESULT_HEADS, result_cells(measured)))
    if measured.compiled:
        sections.append(
            f"## Compiled for accelerators\n\n{_COMPILED_TEXT}\n\n"
            + _markdown_table(_COMPILED_HEADS, compiled_cells(measured))
        )
    if measured.step_bytes:
        heads = ("case", "DRConv MB", "nn.Conv MB", "filters MB", "ratio")
        cells = [
            [s.case.label, *(_mega(b) for b in (s.ours, s.standard, s.filters)), f"{s.ratio:.2f}"]
            for s in measured.step_bytes
        ]
        sections.append("## Training step, temporary memory\n\n" + _markdown_table(heads, cells))
    if measured.notes:
        sections.append("\n".join(f"- {note}" for note in measured.notes))
    return "\n\n".join(sections) + "\n"


def show(console: Console, measured: Measured) -> None:
    """The tables on the terminal."""
    console.print(_rich_table(_RESULT_HEADS, result_cells(measured)))
    if measured.compiled:
        console.print(_rich_table(_COMPILED_HEADS, compiled_cells(measured)))
    if marked := mark_cells(measured):
        console.print(_rich_table(_MARK_HEADS, marked))
    for note in measured.notes:
        console.print(note, markup=False)


def mark_cells(measured: Measured) -> list[list[str]]:
    """The mark's rows, or none where nothing of it was measured."""
    rows = mark.rows(measured)
    if all(row.measured is None for row in rows):
        return []
    cells = []
    for row in rows:
        sign = "≥" if row.at_least else "≤"
        met = {True: "met", False: "not met", None: "open"}[row.met]
        value, spread = "", ""
        if row.measured is not None:
            value = f"{row.measured.value:.2f}"
            if row.measured.low != row.measured.high:
                spread = f"{row.measured.low:.2f} to {row.measured.high:.2f}"
        cells.append([row.what, f"{sign} {row.limit:g}", value, spread, met])
    return cells


def result_cells(measured: Measured) -> list[list[str]]:
    """One row for each result; the ratio is to the case's best standard operation."""
    return [_result_row(measured, result) for result in measured.results]


def compiled_cells(measured: Measured) -> list[list[str]]:
    """One row for each target, layer and direction."""
    return [
        [
            c.target,
            f"{c.case.shape_label} {c.case.dtype}",
            c.direction,
            *("" if v is None else _mega(v) for v in (c.ours, c.standard)),
            "" if c.ratio is None else f"{c.ratio:.2f}",
            _mega(c.temporary),
            f"{c.temporary_ratio:.2f}",
            *(str(len(names) or "") for names in (c.kernels, c.standard_kernels)),
        ]
        for c in measured.compiled
    ]


def _result_row(measured: Measured, r: Result) -> list[str]:
    standard = best_standard(measured.results, r.case, r.direction) or r
    relative = ratio(r, standard)
    fastest = fastest_anywhere(measured.results, r.case, r.direction) or r
    low, high = r.quartiles
    fraction = fraction_of_peak(r, measured.peak)
    return [
        " ".join(filter(None, (r.case.level, r.case.network, r.case.shape_label, r.case.dtype))),
        r.contender,
        "" if r.regions is None else str(r.regions),
        r.direction,
        _milli(r.median),
        f"{_milli(low)} to {_milli(high)}",
        f"{relative.value:.2f}",
        f"{relative.low:.2f} to {relative.high:.2f}",
        f"{r.median / fastest.median:.2f}",
        "" if fraction is None else f"{fraction:.0%}",
        "" if r.temporary_bytes is None else _mega(r.temporary_bytes),
    ]


def _legend(measured: Measured, guide: str) -> str:
    features = {
        "random": "random: all regions are used equally",
        "blocky": "constant over squares of 7 pixels",
    }
    peaks = ", ".join(f"{dtype} {2e-9 * peak:.0f}" for dtype, peak in measured.peak.items())
    return (
        "Medians over rounds in which every contender takes one turn (the median of up to five "
        "warm calls), in an order drawn anew; a slow one sits out the last rounds. A ratio is that "
        "of the medians to the case's best standard operation (the faster of convolution and "
        "matrix product; nn.Conv for layers, the plain network for networks, torchvision's for "
        "detection), its quartiles those of the rounds' own ratios; `to fastest` is that to the "
        "fastest standard operation on this "
        "machine, a product and PyTorch's among them. On an accelerator, a contender is "
        f"{DEVICE_CALLS} calls in one program, each waiting for the last, without `temp`; "
        "PyTorch's are as many eager calls, with whatever time its host takes. "
        f"Guide features of the region convolution are {features[guide]}. Forward+backward takes "
        "all gradients; for a network, those of the training loss for the parameters, and its "
        "forward is inference. DRConv mixes filters as it does by default; the PyTorch DRConv, as "
        "its public code does, by the paper's generator. The matrix product's measured peak, in "
        f"GFLOP/s: {peaks or 'not measured'}; `of peak` counts the standard convolution's "
        "arithmetic, three times that for forward+backward. `temp` is XLA's memory besides inputs "
        "and outputs."
    )


def _rich_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _milli(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _mega(count: float) -> str:
    return f"{1e-6 * count:.3g}"


def _cpu_model() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(run_dir: pathlib.Path, measured: Measured, about: dict[str, Any]) -> None:
    """results.json and results.md; the plots are `plots.write`'s."""
    write_text(run_dir / "results.json", as_json(measured, about))
    write_text(run_dir / "results.md", as_markdown(measured, about))
