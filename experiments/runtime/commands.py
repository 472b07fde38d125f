"""What all commands have in common around what they do."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Annotated

import tyro

from experiments.runtime import mesh, preemption, tpu
from experiments.runtime.errors import exit_on_user_error

Path = Annotated[
    pathlib.Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: pathlib.Path(os.path.expanduser(texts[0])),
        is_instance=lambda value: isinstance(value, pathlib.Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""The type of an option that is a path; shells leave the ~ of --out=~/x to the command."""


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Surrounds a command: how it ends early, and what libtpu says where there is no TPU."""
    tpu.be_quiet_without_one()
    with preemption.ending_at_once(), mesh.leaving_at_once(), exit_on_user_error():
        yield
