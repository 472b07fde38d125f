"""Mistakes that are the user's to mend: one sentence, exit status 2."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something in what the user asked for is wrong; the message says what and how to mend it."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a UserError into its sentence on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
