"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary name beside `path`, of the same suffix, renamed to `path` at the end."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file, all at once or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
