"""SIGTERM, which a machine gets before it is taken away, and SIGINT, which Ctrl-C sends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

from experiments.runtime.errors import STATUS_OF_SIGNAL

# Seconds that a process has to tidy up in before it is ended.
_GRACE = 1.0


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Ends the process soon after SIGTERM or Ctrl-C, without a traceback, where nothing is to save.

    An exception lets the code under way tidy up. Python raises it only when the main thread comes
    back from compiled code, which takes a minute where XLA compiles, so a thread waits for the
    signal too and ends the process when its time is up.
    """
    unsaid = threading.Lock()

    def say(number: int) -> None:
        if unsaid.acquire(blocking=False):
            _say(f"stopped by {name_of(number)}")

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        say(number)
        # Where the exception comes up in a callback that can raise none, Python would print it.
        sys.unraisablehook = lambda _: None
        raise SystemExit(STATUS_OF_SIGNAL[number])

    def wait_for_a_signal() -> None:
        while numbers := os.read(receiver, 1):
            if numbers[0] in STATUS_OF_SIGNAL:
                say(numbers[0])
                time.sleep(_GRACE)
                os._exit(STATUS_OF_SIGNAL[numbers[0]])
        os.close(receiver)

    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    with _handled(end, sender):
        threading.Thread(target=wait_for_a_signal, daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            os.close(sender)


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], signal.Signals | None]]:
    """Gives a function that tells which of SIGTERM and SIGINT has come first, None if none has.

    The second of a kind kills.
    """
    came: signal.Signals | None = None

    def note(number: int, _: Any) -> None:
        nonlocal came
        came = came or signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT:
            # A second Ctrl-C leaves no time to show the cursor that a progress line hides.
            cursor = "\x1b[?25h" if os.isatty(2) else ""
            _say(f"{cursor}stopping as soon as everything is saved; Ctrl-C again ends it at once")

    with _handled(note, -1):
        yield lambda: came


@contextlib.contextmanager
def workers_unreached() -> Iterator[None]:
    """Keeps SIGTERM and Ctrl-C from worker processes that are started within.

    A terminal sends Ctrl-C to all processes of a command, a batch system SIGTERM to all of a job;
    the process that started the workers still needs them to come to an end. They call
    `end_with_parent`.
    """
    resource_tracker.ensure_running()  # by itself it would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS_OF_SIGNAL)  # processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(*_: Any) -> None:
    """Makes a worker process end when the process that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def name_of(number: int) -> str:
    """A signal, for people."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None], wakeup: int) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in STATUS_OF_SIGNAL}
    wakeup_before = signal.set_wakeup_fd(wakeup)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, old in before.items():
            signal.signal(number, old)


def _say(line: str) -> None:
    """Writes to stderr from a signal's handler, where Python's own buffers must be left alone."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
