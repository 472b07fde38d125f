"""SIGTERM, which a machine gets before it is taken away."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether SIGTERM has come. A second SIGTERM kills."""
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
