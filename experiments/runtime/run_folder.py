"""A run's folder: used by one run at a time, with its options and a record of its data."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import filelock

from experiments.runtime import configs
from experiments.runtime.errors import UserError
from experiments.runtime.files import write_text

T = TypeVar("T")
Facts = Mapping[str, str | int]

# One is the system's lock, which ends with its process; the other says whose it is, and is renewed
# by a thread, for other hosts, whose system may know nothing of this one's locks.
_LOCK, _HOLDER = ".lock", ".holder"
_CONFIG, _DATA = "config.json", "data.json"
# Seconds without renewal after which the holder on another host is taken to be dead.
_SILENCE = 60.0
_NO_LOCKS_HERE = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def held(folder: pathlib.Path, option: str, *, new: bool = False) -> Iterator[pathlib.Path]:
    """Makes a run's folder if it is not there, and keeps all other runs out of it.

    The lock ends with this process, however that ends. If nothing was written into the folder, it
    is as before in the end.

    Args:
      folder: the run's.
      option: that named it, for errors.
      new: whether it must be new; one with -2, -3, ... behind its name is made where it is not.

    Yields:
      The folder.

    Raises:
      UserError: another process holds it, or it cannot be written to.
    """
    made = [path for path in folder.parents if not path.exists()]
    with contextlib.ExitStack() as locks:
        try:
            if new:
                folder = made_anew(folder)
            if new or not folder.exists():
                made.insert(0, folder)
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder, option, locks)
        except OSError as error:
            _unmake(folder, made, locks)
            raise UserError(
                f'{option}: "{folder}" cannot be written to: {error.strerror or error}.'
            ) from None
        try:
            yield folder
        finally:
            _unmake(folder, made, locks)


@contextlib.contextmanager
def held_without(
    result: str, chosen: pathlib.Path | None, default: pathlib.Path
) -> Iterator[pathlib.Path]:
    """`held`, for a command that does not continue a run.

    Args:
      result: a file that a run's folder holds.
      chosen: the folder that --run-dir names, or None.
      default: where it names none.

    Yields:
      The folder.

    Raises:
      UserError: it holds a run already, or as of `held`.
    """
    with held(chosen or default, "--run-dir", new=chosen is None) as folder:
        if (folder / result).exists():
            raise UserError(f'--run-dir: "{folder}" holds a run already; name another folder.')
        yield folder


def made_anew(folder: pathlib.Path) -> pathlib.Path:
    """Makes the first folder of this name, and with -2, -3, ... behind it, that is not there."""
    for number in itertools.count(1):
        path = folder.with_name(f"{folder.name}-{number}") if number > 1 else folder
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


def results_folder(chosen: pathlib.Path | None, parent: pathlib.Path) -> pathlib.Path:
    """Makes the folder for what a command finds with a trained network.

    Args:
      chosen: the folder that --out names, which may be there already, or None.
      parent: where it names none, of a new folder that has the time for a name.
    """
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        return chosen
    return made_anew(parent / time.strftime("%Y%m%d-%H%M%S"))


def write_config(folder: pathlib.Path, config: Any) -> None:
    """Saves a run's options, a dataclass, in its folder.

    Raises:
      UserError: it cannot be written to.
    """
    try:
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_text(folder / _CONFIG, text)
    except OSError as error:
        raise UserError(
            f'--run-dir: "{folder}" cannot be written to: {error.strerror or error}.'
        ) from None


def read_config(kind: type[T], option: str, folder: pathlib.Path) -> T:
    """The options of the run in a folder.

    Args:
      kind: their dataclass.
      option: that named the folder, for errors.
      folder: the run's.

    Raises:
      UserError: there is no run, or not of this version.
    """
    path = folder / _CONFIG
    if not path.exists():
        raise UserError(f'{option}: there is no run in "{folder}" (no {_CONFIG}).')
    try:
        return configs.from_json(kind, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'{option}: "{path}" is not the config of a run of this version: {error}.'
        ) from None


def newest_step(folder: pathlib.Path) -> int:
    """Of the checkpoints of the run in a folder; 0 where there is none."""
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def check_data(folder: pathlib.Path, facts: Facts, *, new: bool = False) -> None:
    """Compares the data with what the run's folder says that the run is trained on.

    Args:
      folder: the run's; one without a record agrees with all data.
      facts: what is known of the data now, by short names; those of them that the record has not
        are not compared.
      new: whether the run begins, and the record is what its first process has read.

    Raises:
      UserError: they differ, or the record cannot be read.
    """
    path = folder / _DATA
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not recorded:
            raise ValueError("it is empty")
        differences = [
            f"{name} was {value} and is {facts.get(name, 'unknown')}"
            for name, value in recorded.items()
            if facts.get(name) != value
        ]
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f'"{path}", the record of the data, cannot be read: {error}; remove it if you are sure '
            "that --data is what the run was trained on."
        ) from None
    if differences and new:
        raise UserError(
            f"--data: the processes of this run read different data: {', '.join(differences)}; "
            "show all of them the same."
        )
    if differences:
        raise UserError(
            f'--data: the run in "{folder}" is trained on other data: {", ".join(differences)}. '
            "Continue it with the data as it was (--data says where that is now), or begin a run "
            "in another folder."
        )


def has_data_record(folder: pathlib.Path) -> bool:
    """Whether the folder says what its run is trained on; those of older versions do not."""
    return (folder / _DATA).exists()


def record_data(folder: pathlib.Path, facts: Facts) -> None:
    """Writes down what the run is trained on."""
    write_text(folder / _DATA, json.dumps(dict(facts), indent=2) + "\n")


def _unmake(folder: pathlib.Path, made: list[pathlib.Path], locks: contextlib.ExitStack) -> None:
    """Leaves a folder into which no run has written anything as it was before."""
    if {path.name for path in folder.glob("*")} <= {_LOCK, _HOLDER}:
        locks.close()
        with contextlib.suppress(OSError):  # somebody else uses it by now
            (folder / _LOCK).unlink(missing_ok=True)
            for path in made:
                path.rmdir()


def _lock(folder: pathlib.Path, option: str, locks: contextlib.ExitStack) -> None:
    def lost(_: filelock.LeaseCompromise) -> None:
        if holder.owner is not None:  # else the folder is gone, and what happens shows why
            print(f'error: "{folder}" was taken over by {_owner_of(holder)}.', file=sys.stderr)
            os._exit(1)

    holder = filelock.SoftFileLease(
        folder / _HOLDER, lease_duration=_SILENCE, on_compromise=lost, thread_local=False
    )
    try:
        lock = filelock.FileLock(folder / _LOCK, fallback_to_soft=False)
        locks.enter_context(lock.acquire(timeout=0))
    except filelock.Timeout:
        raise _in_use(folder, option, holder) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
    try:
        _drop_if_empty(folder / _HOLDER)
        try:
            locks.enter_context(holder.acquire(timeout=0))
        except filelock.Timeout:
            print(
                f'"{folder}" was last used by {_owner_of(holder)}; seeing whether that is still '
                f"alive, which takes {_SILENCE:.0f} s",
                flush=True,
            )
            locks.enter_context(holder.acquire(timeout=1.25 * _SILENCE, poll_interval=1))
    except filelock.Timeout:
        raise _in_use(folder, option, holder) from None


def _drop_if_empty(holder: pathlib.Path) -> None:
    """Takes away what a cut of power has left of the file that says whose the folder is."""
    with contextlib.suppress(OSError):
        found = holder.stat()
        if found.st_size == 0 and time.time() - found.st_mtime > _SILENCE:
            holder.unlink()


def _in_use(folder: pathlib.Path, option: str, holder: filelock.SoftFileLease) -> UserError:
    return UserError(
        f'{option}: "{folder}" is in use by {_owner_of(holder)}; wait until that has ended, stop '
        "it, or name another folder."
    )


def _owner_of(holder: filelock.SoftFileLease) -> str:
    if (owner := holder.owner) is None:
        return "another process"
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
