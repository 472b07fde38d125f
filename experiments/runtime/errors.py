"""How a command ends early, and with which exit status."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator, Mapping

USER_ERROR = 2
STATUS_OF_SIGNAL: Mapping[int, int] = {
    signal.SIGTERM: 75,  # EX_TEMPFAIL of sysexits.h: try again
    signal.SIGINT: 130,  # as shells have it for Ctrl-C: a person stopped it, nobody tries again
}


class UserError(Exception):
    """Something in what the user asked for is wrong; the message says what and how to mend it."""


class DataLost(Exception):
    """The data cannot be read any more, or most of it; the message says what, and why."""


class Preempted(SystemExit):
    """The run was told to stop, has saved where it stands, and can be continued."""

    def __init__(self, by: int = signal.SIGTERM) -> None:
        super().__init__(STATUS_OF_SIGNAL[by])


@contextlib.contextmanager
def blaming(option: str) -> Iterator[None]:
    """Puts before an error within the option whose value is at fault."""
    try:
        yield
    except (UserError, DataLost) as error:
        raise UserError(f"{option}: {error}") from None


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a UserError, lost data and a full disk into a sentence on stderr and exit status 2."""
    try:
        yield
    except (UserError, DataLost) as error:
        sentence = str(error)
    except OSError as error:
        if not disk_is_full(error):
            raise
        sentence = f"{error}. Free some space; a run is continued with --resume."
    else:
        return
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(USER_ERROR)


def reason(error: BaseException) -> str:
    """Why something failed, in words: an error's own, or its kind where it has none."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def disk_is_full(error: BaseException | None) -> bool:
    """Whether that is the error, or the cause of it."""
    while error is not None:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "quota exceeded" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False
