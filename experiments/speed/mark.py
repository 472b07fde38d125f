"""The mark: how near to one convolution a region convolution must come (2 CPU cores)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from experiments.speed import cases
from experiments.speed.cases import Case, square
from experiments.speed.contenders import OURS, TORCH_DRCONV
from experiments.speed.measure import DIRECTIONS, Direction
from experiments.speed.results import Measured, Ratio, best_standard, find, ratio


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the mark.

    Attributes:
      what: what is compared, and in which case.
      limit: the mark.
      at_least: whether the figure must reach the limit, rather than stay within it.
      measured: the figure; None where it was not measured.
      uncertain: whether the true figure may be larger than the measured one.
    """

    what: str
    limit: float
    measured: Ratio | None
    at_least: bool = False
    uncertain: bool = False

    @property
    def met(self) -> bool | None:
        """None where nothing can be said."""
        if self.measured is None:
            return None
        if self.at_least:
            return self.measured.value >= self.limit
        within = self.measured.value <= self.limit
        return None if within and self.uncertain else within


def rows(measured: Measured) -> list[Row]:
    """All lines of the mark, in its order."""
    return [
        *_op(measured),
        *_layer(measured),
        *_kernel_3(measured),
        *_torch(measured),
        *_regions(measured),
        *_memory(measured),
        *_tpu(measured),
    ]


def _op(measured: Measured) -> Iterator[Row]:
    limits: dict[Direction, tuple[float | None, ...]] = {
        "forward": (1.5, 1.5, 1.5, 2.5, 3.0),
        "forward+backward": (4.5, 4.5, 4.5, None, 12.0),
    }
    for direction, each in limits.items():
        for shape, limit in zip(cases.SHAPES, each, strict=True):
            if limit is not None:
                yield _to_standard(measured, square("op", shape), direction, limit)


def _layer(measured: Measured) -> Iterator[Row]:
    for direction, limit in zip(DIRECTIONS, (2.5, 5.0), strict=True):
        for shape in cases.SHAPES[:3]:
            yield _to_standard(measured, square("layer", shape), direction, limit)


def _kernel_3(measured: Measured) -> Iterator[Row]:
    for direction, limit in zip(DIRECTIONS, (2.0, 5.0), strict=True):
        yield _to_standard(measured, square("op", cases.KERNEL_3, 3), direction, limit)


def _to_standard(measured: Measured, case: Case, direction: Direction, limit: float) -> Row:
    name = OURS[case.level]
    ours = find(measured.results, case, name, case.regions[0], direction)
    standard = best_standard(measured.results, case, direction)
    to = "nn.Conv" if case.level == "layer" else "best standard op"
    what = f"{name} / {to}, {direction}, {case.shape_label}"
    return Row(what, limit, ratio(ours, standard) if ours and standard else None)


def _torch(measured: Measured) -> Iterator[Row]:
    layers = [square("layer", shape) for shape in cases.SHAPES]
    for case in (*layers, square("layer", cases.KERNEL_3, 3)):
        for direction in DIRECTIONS:
            ours, theirs = (
                find(measured.results, case, name, case.regions[0], direction)
                for name in (OURS["layer"], TORCH_DRCONV)
            )
            what = f"{TORCH_DRCONV} / DRConv, {direction}, {case.shape_label}"
            yield Row(what, 5.0, ratio(theirs, ours) if ours and theirs else None, at_least=True)


def _regions(measured: Measured) -> Iterator[Row]:
    case = square("op", cases.SHAPES[1], regions=cases.ALL_REGIONS)
    many, few = (find(measured.results, case, OURS["op"], m, "forward") for m in (32, 2))
    what = f"region_conv m=32 / m=2, forward, {case.shape_label}"
    yield Row(what, 1.5, ratio(many, few) if many and few else None)


def _memory(measured: Measured) -> Iterator[Row]:
    found = {step.case: step.ratio for step in measured.step_bytes}
    for shape in cases.SHAPES:
        case = square("layer", shape)
        what = f"training step's memory / (nn.Conv's + 2 filters), {case.shape_label}"
        yield Row(what, 1.3, _exact(found.get(case)))


def _tpu(measured: Measured) -> Iterator[Row]:
    for shape in cases.TPU_SHAPES:
        case = square("tpu", shape, dtype="bfloat16")
        best = next((b for b in measured.tpu if b.case == case), None)
        name = f" ({best.implementation})" if best else ""
        what = f"TPU v5e bytes{name} / (conv + filters + guide), {case.shape_label}"
        uncertain = best is not None and best.is_lower_bound
        yield Row(what, 2.0, _exact(best.ratio if best else None), uncertain=uncertain)


def _exact(value: float | None) -> Ratio | None:
    return None if value is None else Ratio(value, value, value)
