"""Timing: contenders take turns, so that whatever disturbs the machine disturbs all alike."""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")

_SHARE = 2.0  # seconds that one contender may take of a case before it sits out further rounds
_FEWEST = 3  # rounds that even a slow contender takes part in
_TURN = 0.05  # seconds that the calls of a fast contender take in one round
_CALLS = 5  # at most so many in one round


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes:
      name: what it is.
      regions: its m; None for what knows no regions.
      direction: what `run` computes.
      run: computes and waits for the result.
      temporary_bytes: XLA's memory besides inputs and outputs; None where it is not XLA's.
      standard: whether it is a standard operation, what the others are compared with.
    """

    name: str
    regions: int | None
    direction: Direction
    run: Callable[[], object]
    temporary_bytes: int | None = None
    standard: bool = False


def compiled(
    name: str,
    regions: int | None,
    direction: Direction,
    function: Callable[..., Any],
    *args: Any,
    standard: bool = False,
) -> Contender:
    """A contender that is a jitted JAX function, compiled for these arguments."""
    program = jax.jit(function).lower(*args).compile()
    return Contender(
        name,
        regions,
        direction,
        lambda: jax.block_until_ready(program(*args)),
        temporary_bytes(program),
        standard,
    )


def temporary_bytes(program: jax.stages.Compiled) -> int | None:
    """XLA's memory besides inputs and outputs, where the platform tells."""
    memory = program.memory_analysis()
    return None if memory is None else int(memory.temp_size_in_bytes)


def time_rounds(
    contenders: Sequence[Contender], rounds: int, tick: Callable[[], None]
) -> list[tuple[float, ...]]:
    """Seconds of every contender in every round.

    The order is drawn anew in each round. A contender that has had its share of seconds sits out
    the last rounds, so the i-th entries of two contenders are always of the same round.

    Args:
      contenders: what to time.
      rounds: at most this many.
      tick: called after each round.
    """
    for contender in contenders:
        contender.run()
    seconds: list[list[float]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    shuffle = random.Random(0).shuffle
    for done in range(rounds):
        shuffle(order)
        for i in order:
            if done < _FEWEST or sum(seconds[i]) < _SHARE:
                seconds[i].append(_turn(contenders[i].run))
        tick()
    return [tuple(s) for s in seconds]


def _turn(run: Callable[[], object]) -> float:
    """Seconds of a call: after one untimed, the median of those that fit a short turn.

    Another contender's turn leaves caches, threads and allocator in a state of its own.
    """
    if (first := _seconds(run)) > _TURN:  # a long call hardly feels what was before it
        return first
    times: list[float] = []
    while not times or (len(times) < _CALLS and sum(times) < _TURN):
        times.append(_seconds(run))
    return statistics.median(times)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@functools.cache
def _square_product(dtype: str) -> tuple[int, Contender]:
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    return n**3, compiled("peak", None, "forward", jnp.matmul, a, a)


def matmul_peak(dtype: str) -> float:
    """Multiply-adds per second of a large square matrix product, the best of some calls.

    Others on the machine can only lower it: ask several times and take the largest.
    """
    work, product = _square_product(dtype)
    return work / min(_turn(product.run) for _ in range(3))
