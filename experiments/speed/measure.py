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

DEVICE_CALLS = 20
"""Of a function in one program, on an accelerator."""

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
      calls: how often `run` computes it.
    """

    name: str
    regions: int | None
    direction: Direction
    run: Callable[[], object]
    temporary_bytes: int | None = None
    standard: bool = False
    calls: int = 1


def compiled(
    name: str,
    regions: int | None,
    direction: Direction,
    function: Callable[..., Any],
    *args: Any,
    standard: bool = False,
    calls: int | None = None,
) -> Contender:
    """A contender that is a jitted JAX function, compiled for these arguments.

    An accelerator is faster than its host can tell it what to do. There, one program calls the
    function `calls` times, one after the other, so that the device's time is what is measured.
    """
    if calls is None:
        calls = 1 if jax.default_backend() == "cpu" else DEVICE_CALLS
    program = (
        jax.jit(function if calls == 1 else repeated(function, calls))
        .lower(*args)
        .compile(compiler_options=_compiler_options())
    )
    return Contender(
        name,
        regions,
        direction,
        lambda: jax.block_until_ready(program(*args)),
        temporary_bytes(program) if calls == 1 else None,
        standard,
        calls,
    )


def in_direction(
    name: str,
    regions: int | None,
    function: Callable[..., Any],
    *args: Any,
    direction: Direction,
    dy: Any,
    standard: bool = False,
) -> Contender:
    """`function`, or it and the gradients of all its arguments for the output's gradient dy."""
    if direction == "forward":
        return compiled(name, regions, direction, function, *args, standard=standard)

    def both(dy: Any, *args: Any) -> Any:
        y, pull = jax.vjp(function, *args)
        return y, pull(dy)  # y is returned lest XLA leave the forward out

    return compiled(name, regions, direction, both, dy, *args, standard=standard)


def repeated(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """`function` so many times in one program, each call waiting for all results of the last.

    The first array of floating point among the arguments is carried from call to call, and its
    first entry is written after each from all results: XLA can neither leave a call out nor start
    it early.
    """

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        carried = next(i for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.floating))

        def call(_: Any, array: jax.Array) -> jax.Array:
            # Behind the barrier every argument depends on the call before: nothing is left that XLA
            # could compute once, ahead of all calls.
            given = jax.lax.optimization_barrier([*leaves[:carried], array, *leaves[carried + 1 :]])
            results = jax.tree.leaves(function(*jax.tree.unflatten(tree, given)))
            results = jax.lax.optimization_barrier(results)
            seen = sum(result.ravel()[0].astype(jnp.float32) for result in results)
            first = (0,) * array.ndim
            # The entry is what it was, unless a result is not finite, which XLA cannot know.
            entry = jnp.where(jnp.isfinite(seen), array[first], jnp.nan)
            return array.at[first].set(entry.astype(array.dtype))

        return jax.lax.fori_loop(0, calls, call, leaves[carried])

    return run


def _compiler_options() -> dict[str, Any]:
    """XLA tries for minutes which product is fastest on a GPU; a few ways are enough."""
    return {"xla_gpu_autotune_max_solutions": 4} if jax.default_backend() == "gpu" else {}


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
        contender.run()  # the first call may compile or allocate
    seconds: list[list[float]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    shuffle = random.Random(0).shuffle
    for done in range(rounds):
        shuffle(order)
        for i in order:
            if done < _FEWEST or sum(seconds[i]) < _SHARE:
                seconds[i].append(_turn(contenders[i].run) / contenders[i].calls)
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
    return n**3, compiled("peak", None, "forward", jnp.matmul, a, a, calls=1)


def matmul_peak(dtype: str) -> float:
    """Multiply-adds per second of a large square matrix product, the best of some calls.

    Others on the machine can only lower it: ask several times and take the largest.
    """
    work, product = _square_product(dtype)
    return work / min(_turn(product.run) for _ in range(3))
