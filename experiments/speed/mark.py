"""The mark: how near to one convolution a region convolution must come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from experiments.speed import cases, detection
from experiments.speed.cases import Case, square
from experiments.speed.contenders import OURS, TORCH_DRCONV, TORCH_NETWORK
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
    """

    what: str
    limit: float
    measured: Ratio | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """None where nothing can be said."""
        if self.measured is None:
            return None
        if self.at_least:
            return self.measured.value >= self.limit
        return self.measured.value <= self.limit


def rows(measured: Measured) -> list[Row]:
    """All lines of the mark, in its order."""
    return [
        *_op(measured),
        *_layer(measured),
        *_kernel_3(measured),
        *_torch(measured),
        *_regions(measured),
        *_memory(measured),
        *_networks(measured),
        *_compiled(measured),
        *_gpu(measured),
        *_detection(measured),
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
    where = "" if case.dtype == "float32" else f"on a GPU, {case.dtype}, "
    what = f"{where}{name} / {to}, {direction}, {case.shape_label}"
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


def _networks(measured: Measured) -> Iterator[Row]:
    limits = dict(zip(DIRECTIONS, (1.3, 1.5), strict=True))
    for case in cases.CPU_NETWORKS:
        for direction, limit in limits.items():
            plain, theirs = (
                find(measured.results, case, name, None, direction)
                for name in ("plain", TORCH_NETWORK)
            )
            ours = find(measured.results, case, OURS["network"], case.regions[0], direction)
            for what, a, b in (("plain / PyTorch's", plain, theirs), ("DR / plain", ours, plain)):
                text = f"{case.network} {what}, {direction}, {case.shape_label}"
                yield Row(text, limit, ratio(a, b) if a and b else None)


def _compiled(measured: Measured) -> Iterator[Row]:
    found = {(c.case, c.target, c.direction): c for c in measured.compiled}
    for direction, limit in zip(DIRECTIONS, (1.5, 2.0), strict=True):
        for shape in cases.TPU_SHAPES:
            case = square("compiled", shape, dtype="bfloat16")
            program = found.get((case, "TPU v5e", direction))
            what = f"TPU v5e, bytes of DRConv / nn.Conv, {direction}, {case.shape_label}"
            yield Row(what, limit, _exact(program.ratio if program else None))
    gpu = [square("compiled", shape, dtype="bfloat16") for shape in cases.GPU_SHAPES]
    gpu.append(square("compiled", cases.GPU_KERNEL_3, 3, dtype="bfloat16"))
    tpu = [square("compiled", shape, dtype="bfloat16") for shape in cases.TPU_SHAPES]
    for target, limit, those in (("TPU v5e", 1.5, tpu), ("H100", 1.0, gpu)):
        for case in those:
            program = found.get((case, target, "forward+backward"))  # type: ignore[arg-type]
            what = f"{target}, temporary memory of a gradient / (x + dy), {case.shape_label}"
            yield Row(what, limit, _exact(program.temporary_ratio if program else None))


def _gpu(measured: Measured) -> Iterator[Row]:
    layers = [square("layer", shape, dtype="bfloat16") for shape in cases.GPU_SHAPES]
    layers.append(square("layer", cases.GPU_KERNEL_3, 3, dtype="bfloat16"))
    for direction, limit in zip(DIRECTIONS, (1.5, 3.0), strict=True):
        for case in layers:
            yield _to_standard(measured, case, direction, limit)
    for direction, limit in zip(DIRECTIONS, (1.3, 1.6), strict=True):
        case = cases.GPU_NETWORK
        ours = find(measured.results, case, OURS["network"], case.regions[0], direction)
        plain = find(measured.results, case, "plain", None, direction)
        what = f"{case.network} DR / plain, {direction}, {case.shape_label} {case.dtype}"
        yield Row(what, limit, ratio(ours, plain) if ours and plain else None)


def _detection(measured: Measured) -> Iterator[Row]:
    for case in cases.DETECTION:
        for direction in detection.directions(case):
            ours = find(measured.results, case, detection.OURS[case.level], None, direction)
            theirs = best_standard(measured.results, case, direction)
            name = case.network or case.level
            what = f"{name} / torchvision's, {direction}, {case.shape_label}"
            yield Row(what, 1.0, ratio(ours, theirs) if ours and theirs else None)


def _exact(value: float | None) -> Ratio | None:
    return None if value is None else Ratio(value, value, value)
