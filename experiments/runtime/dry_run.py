"""What the very training step takes on a TPU pod, told by the TPU compiler without a pod."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import jax
from jax.extend import core
from rich.table import Table

from drconv_jax.region_conv import dispatch
from experiments.runtime import tpu
from experiments.runtime.errors import UserError
from experiments.runtime.mesh import make_mesh
from experiments.runtime.recipes import Recipe
from experiments.runtime.task import Task
from experiments.runtime.training import program

# Collectives from this size on are large; batch norm's statistics are smaller.
LARGE = 2**16

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A message among the chips.

    Attributes:
      kind: as XLA names it.
      times: a step.
      bytes: each time, of its results on a chip.
      arrays: that it is about.
      source: the operation that it was made for.
    """

    kind: str
    times: int
    bytes: int
    arrays: int
    source: str


@dataclasses.dataclass(frozen=True)
class Report:
    """A training step on a topology. All but the first three are of one chip.

    Attributes:
      topology, chips, parameters: what it was compiled for.
      images: a step.
      arithmetic: operations of convolutions and products, two a multiply-add, loops in full: the
        program's over the number of chips.
      flops, bytes: operations and bytes accessed as the compiler counts them for the program of
        one chip, which is with the bodies of loops once.
      memory: bytes at the peak.
      collectives: the messages.
      seconds: that the compiler took.
    """

    topology: str
    chips: int
    parameters: int
    images: int
    arithmetic: float
    flops: float
    bytes: float
    memory: int
    collectives: tuple[Collective, ...]
    seconds: float


def compile_step(
    task: Task,
    recipe: Recipe,
    topology: str,
    *,
    chip_batch: int | None = None,
    fsdp: int = 1,
) -> Report:
    """Compiles a training step, that of the largest batches, for all chips of a topology.

    Args:
      task: what is trained.
      recipe: how to train.
      topology: as "v5e:16x16" or "v5p:8x8x16".
      chip_batch: images on a chip; None for the recipe's batch, or the next larger that divides.
      fsdp: chips that hold one copy of the parameters among them.

    Raises:
      UserError: there is no compiler or no such topology, a chip's batch does not divide, or the
        program does not fit the chips' memory.
    """
    if not tpu.compiler_is_installed():
        raise UserError(
            "--dry-run needs libtpu, the TPU compiler; install it with pip install '.[tpu]' in the "
            "folder of this repository."
        )
    try:
        devices = tpu.devices(topology)
    except Exception as error:  # libtpu has no type of its own for it
        raise UserError(f'--topology: "{topology}" is none: {_first_line(error)}') from None
    mesh = make_mesh(fsdp, devices)
    recipe = dataclasses.replace(recipe, batch_size=batch_of(recipe, mesh.size, chip_batch))
    # The number of steps is a constant of the schedule; it makes no difference to the rest.
    built = program(task, recipe, mesh, steps_per_epoch=1000)
    batch = max(built.batch_shapes, key=lambda shapes: sum(s.size for s in shapes.values()))
    traced = built.train_step.trace(built.state, batch)
    lowered = traced.lower(lowering_platforms=("tpu",))
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"--topology: the step does not fit the memory of {topology}: {_first_line(error)}; "
            "take a smaller batch, --train.accumulate, --train.remat or --fsdp."
        ) from None
    seconds = time.perf_counter() - start
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--dry-run: jaxlib {version('jaxlib')} cannot read what libtpu {version('libtpu')} "
            "compiled; install the libtpu that goes with it, pip install '.[tpu]': "
            f"{_first_line(error)}"
        ) from None
    cost = compiled.cost_analysis()
    return Report(
        topology=topology,
        chips=mesh.size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(built.state.variables["params"])),
        images=recipe.batch_size // mesh.size,
        arithmetic=arithmetic(traced.jaxpr.jaxpr) / mesh.size,
        flops=cost["flops"],
        bytes=cost["bytes accessed"],
        memory=compiled.memory_analysis().peak_memory_in_bytes,
        collectives=collectives(text),
        seconds=seconds,
    )


def batch_of(recipe: Recipe, chips: int, chip_batch: int | None) -> int:
    """Images in a step: the recipe's, or the next larger batch that divides among the chips.

    Args:
      recipe: how to train.
      chips: how many there are.
      chip_batch: images on a chip, whatever the recipe's batch; None leaves it to the recipe.

    Raises:
      UserError: a chip's batch does not divide into the parts that it is computed in.
    """
    parts = recipe.accumulate
    if chip_batch is None:
        return -(-recipe.batch_size // (chips * parts)) * chips * parts
    if chip_batch % parts:
        raise UserError(
            f"--chip-batch must be a multiple of --train.accumulate, which is {parts}, got "
            f"{chip_batch}."
        )
    return chip_batch * chips


def arithmetic(jaxpr: core.Jaxpr) -> float:
    """Operations of a program's convolutions and products, two a multiply-add, loops in full."""
    return sum(map(_operations, jaxpr.eqns))


def collectives(hlo: str) -> tuple[Collective, ...]:
    """The messages in a compiled program, the largest first.

    Args:
      hlo: the program's text.
    """
    computations = dict(_computations(hlo))
    times = _times(computations)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            message = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(.*channel_id=(\d+)", line)
            if not message:
                continue
            results, kind, channel = message.groups()
            shapes = re.findall(r"\b(\w+)\[([\d,]*)\]", results)
            source = re.search(r'op_name="([^"]*)"', line)
            found[channel] = Collective(  # what is in several pieces has one channel
                kind="reduce-scatter" if name.startswith("all-reduce-scatter") else kind,
                times=times.get(name, 1),
                bytes=sum(_size(*shape) for shape in shapes),
                arrays=len(shapes),
                source=source.group(1) if source else "",
            )
    return tuple(sorted(found.values(), key=lambda c: -c.bytes * c.times))


def table(reports: Sequence[Report]) -> Table:
    """The reports side by side."""
    rows: dict[str, list[str]] = {}

    def row(name: str, value: Any) -> None:
        rows.setdefault(name, []).append(str(value))

    for report in reports:
        row("chips", f"{report.chips:,}")
        row("images a step", f"{report.images * report.chips:,}")
        row("each chip: images", f"{report.images:,}")
        row("  arithmetic, Gflop", f"{report.arithmetic / 1e9:.2f}")
        row("  compiler's Gflop, loops once", f"{report.flops / 1e9:.2f}")
        row("  compiler's GB accessed, loops once", f"{report.bytes / 1e9:.3f}")
        row("  memory at the peak, MB", f"{report.memory / 1e6:,.0f}")
        for kind in _KINDS.split("|"):
            for size, large in (("large", True), ("small", False)):
                some = [
                    c for c in report.collectives if c.kind == kind and (c.bytes >= LARGE) == large
                ]
                total = sum(c.times * c.bytes for c in some)
                count = sum(c.times for c in some)
                row(f"  {size} {kind}s, MB", f"{total / 1e6:.3f} in {count}" if some else "")
        row("compile time, s", f"{report.seconds:.0f}")
    shown = Table("", *(report.topology for report in reports))
    for name, values in rows.items():
        if any(values):
            shown.add_row(name, *values)
    return shown


def large_collectives(report: Report) -> str:
    """A line for each."""
    return "\n".join(
        f"{c.kind} of {c.arrays} arrays, {c.bytes / 1e6:.3f} MB, {c.times} a step: {c.source}"
        for c in report.collectives
        if c.bytes >= LARGE
    )


def _operations(eqn: core.JaxprEqn) -> float:
    name, params = eqn.primitive.name, eqn.params
    arguments: list[Any] = [variable.aval for variable in eqn.invars]
    results: list[Any] = [variable.aval for variable in eqn.outvars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(arguments[0].shape[axis] for axis in contracted)
        return 2.0 * math.prod(results[0].shape) * terms
    if name == "region_conv":
        on_a_mesh = dispatch.Program("tpu", exported=False, partitioned=True)
        return arithmetic(dispatch.traced(eqn, on_a_mesh))
    if name == "conv_general_dilated":
        _, in_features, *spatial = params["dimension_numbers"].rhs_spec
        terms = math.prod(arguments[1].shape[axis] for axis in (in_features, *spatial))
        zeros = math.prod(params["lhs_dilation"])  # all but one term in so many
        return 2.0 * math.prod(results[0].shape) * terms / zeros
    inner = [sum(map(_operations, jaxpr.eqns)) for jaxpr in _jaxprs(params)]
    if name == "cond":  # a choice by platform: the default is the last, unless a TPU has its own
        return inner[-1] or max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _size(dtype: str, shape: str) -> int:
    return _BYTES[dtype] * math.prod(int(length) for length in shape.split(",") if length)


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """Names and lines of a program's computations."""
    for name, body in re.findall(r"^(?:ENTRY )?%([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.M | re.S):
        yield name, body.splitlines()


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often the bodies of loops run, with what they call."""
    loops, calls = {}, {}
    for name, lines in computations.items():
        calls[name] = set(re.findall(r"(?:calls|to_apply|body)=%([\w.\-]+)", "\n".join(lines)))
        for condition, body in re.findall(
            r"condition=%([\w.\-]+), body=%([\w.\-]+)", "\n".join(lines)
        ):
            bounds = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
            loops[body] = int(bounds[0]) if len(bounds) == 1 else 1
    times: dict[str, int] = {}

    def visit(name: str, outside: int) -> None:
        times[name] = outside * loops.get(name, 1)
        for callee in calls.get(name, ()):
            visit(callee, times[name])

    called = set().union(*calls.values())
    for name in computations.keys() - called:
        visit(name, 1)
    return times


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
