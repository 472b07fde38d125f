"""How a command ends early, and with which exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

USER_ERROR = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


class UserError(Exception):
    """Something in what the user asked for is wrong; the message says what and how to mend it."""


class Preempted(SystemExit):
    """The run was told to stop, has saved where it stands, and can be continued."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a UserError into its sentence on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
