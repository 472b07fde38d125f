"""What was measured, and how two measurements compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.speed.cases import Case, DType
from experiments.speed.compiled import Compiled
from experiments.speed.measure import Direction


@dataclasses.dataclass(frozen=True)
class Result:
    """One contender's times in one case; fields as in `measure.Contender`."""

    case: Case
    contender: str
    regions: int | None
    direction: Direction
    standard: bool
    seconds: tuple[float, ...]
    temporary_bytes: int | None

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the quartiles of the rounds' own ratios."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Temporary memory of a layer's training step, see `contenders.training_step_bytes`."""

    case: Case
    ours: int
    standard: int
    filters: int

    @property
    def ratio(self) -> float:
        """To nn.Conv's with the filters and their gradient."""
        return self.ours / (self.standard + 2 * self.filters)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A whole run; `peak` has multiply-adds per second by dtype."""

    results: Sequence[Result]
    peak: Mapping[DType, float]
    step_bytes: Sequence[StepBytes]
    compiled: Sequence[Compiled]
    notes: Sequence[str]


def ratio(of: Result, to: Result) -> Ratio:
    """How many times as long `of` takes; both are of one case."""
    paired = [a / b for a, b in zip(of.seconds, to.seconds, strict=False)]
    low, high = np.quantile(paired, (0.25, 0.75))
    return Ratio(of.median / to.median, float(low), float(high))


def find(
    results: Sequence[Result], case: Case, name: str, regions: int | None, direction: Direction
) -> Result | None:
    """The result of that contender, if it was measured."""
    for r in results:
        if (r.case, r.contender, r.regions, r.direction) == (case, name, regions, direction):
            return r
    return None


def best_standard(results: Sequence[Result], case: Case, direction: Direction) -> Result | None:
    """The fastest standard operation of a case, by its median."""
    found = [r for r in results if r.standard and (r.case, r.direction) == (case, direction)]
    return min(found, key=lambda r: r.median, default=None)


def fastest_anywhere(results: Sequence[Result], case: Case, direction: Direction) -> Result | None:
    """The fastest standard operation of a case on this machine, PyTorch's among them."""
    found = [r for r in results if r.regions is None and (r.case, r.direction) == (case, direction)]
    return min(found, key=lambda r: r.median, default=None)


def fraction_of_peak(result: Result, peak: Mapping[DType, float]) -> float | None:
    """Of the matmul peak, counting as useful the arithmetic of one standard convolution.

    Forward and backward count three times the forward, whatever DRConv needs besides.
    """
    work = result.case.multiply_adds
    if work is None:
        return None
    passes = 1 if result.direction == "forward" else 3
    return passes * work / result.median / peak[result.case.dtype]
