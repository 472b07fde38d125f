"""Checkpoints of a run, by orbax: written in the background, there whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from experiments.runtime.configs import check_options
from experiments.runtime.errors import UserError, disk_is_full, reason
from experiments.runtime.mesh import is_in_parts, leads, meet


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are made besides that after every epoch, and how many are kept."""

    every_steps: int = 0
    """Steps from one to the next within an epoch; 0 for none."""
    every_minutes: float = 10.0
    """Minutes from one to the next within an epoch; 0 for none."""
    keep: int = 2
    """How many of the last are kept; the best is kept too."""

    def __post_init__(self) -> None:
        check_options(
            self,
            "checkpoint",
            ("every_steps", self.every_steps >= 0, "at least 0"),
            ("every_minutes", 0 <= self.every_minutes < math.inf, "at least 0 and finite"),
            ("keep", self.keep >= 1, "at least 1"),
        )


@dataclasses.dataclass
class _LastAndBest:
    """Which checkpoints are kept (orbax's PreservationPolicy)."""

    last: int
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = [step for step in steps if step in self.scores]
        kept = {*steps[-self.last :], *sorted(scored, key=self.scores.__getitem__)[-1:]}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints in a run's folder.

    A checkpoint holds the training state, and a record: whatever else the run must know to go on,
    as JSON. It also holds sums over the bits of both, by which damage is found.
    """

    def __init__(self, run_dir: pathlib.Path, keep: int, *, read_only: bool = False):
        self._read_only = read_only  # leaves the folder as it is, which a run may be using
        self._folder = run_dir.absolute() / "checkpoints"
        self._kept = _LastAndBest(keep)
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it raises
        with self._clear_errors():
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._kept,
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                ),
            )

    @property
    def newest(self) -> pathlib.Path | None:
        """The newest checkpoint that is whole or being written."""
        step = self._manager.latest_step()
        return None if step is None else self._folder / str(step)

    def save(self, step: int, state: Any, record: Any, score: float | None = None) -> None:
        """Begins to save, once the save before is finished.

        Args:
          step: names the checkpoint.
          state: arrays.
          record: JSON.
          score: the higher, the better; None is not ranked.

        Raises:
          UserError: it cannot be written, or the one before could not.
        """
        if score is not None:
            self._kept.scores[step] = score
        about = json.dumps({"record": record, "scores": self._kept.scores, "bits": _bits(state)})
        with self._clear_errors():
            self._manager.wait_until_finished()
            # Seen beforehand, since orbax finds out halfway, with pages of tracebacks.
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if shutil.disk_usage(self._folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    about=ocp.args.JsonSave({"json": about, "crc32": zlib.crc32(about.encode())}),
                ),
            )

    def check(self) -> None:
        """Raises what a save in the background has met, as `save` would."""
        with self._clear_errors():
            self._manager.check_for_errors()

    def restore(self, like: Any) -> tuple[Any, Any] | None:
        """The state and the record of the newest checkpoint that is not damaged.

        A damaged one is named on stderr and put aside.

        Args:
          like: shapes of the state, and where its arrays shall lie.

        Returns:
          None where there is no checkpoint.

        Raises:
          UserError: none can be read, being damaged or of another model.
        """
        unreadable: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                read = self._read(step, like)
            except Exception as error:  # damage shows in many ways
                unreadable[step] = error
            else:
                for damaged, why in unreadable.items():
                    self._put_aside(damaged, _reason(why))
                return read
        if unreadable:
            sentences = [
                f'the checkpoint "{self._folder / str(step)}" cannot be read: {_reason(why)}'
                for step, why in unreadable.items()
            ]
            if not any(isinstance(why, _OfAnotherModelError) for why in unreadable.values()):
                sentences.append(
                    "put a copy of a checkpoint back, or begin a new run with another --run-dir"
                )
            raise UserError("; ".join(sentences) + ".")
        return None

    def close(self) -> None:
        """Waits for what is being saved; raises as `save` does."""
        with self._clear_errors():
            self._manager.wait_until_finished()
            self._manager.close()

    def _read(self, step: int, like: Any) -> tuple[Any, Any]:
        folder = self._folder / str(step)
        saved = ocp.StandardCheckpointHandler().metadata(folder / "state")
        if difference := _difference(like, saved.tree):
            raise _OfAnotherModelError(
                f"it is of another model: {difference}; resume with the options and the version "
                "that the run was started with"
            )
        with _quiet():
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    # Not strict: what lies in parts has as many zeros behind it as this mesh wants.
                    state=ocp.args.StandardRestore(like, strict=False),
                    about=ocp.args.JsonRestore(),
                ),
            )
        about = read.about["json"]
        if zlib.crc32(about.encode()) != read.about["crc32"]:
            raise _UnfitError("its record is not what was written")
        about = json.loads(about)
        if about["bits"] != _bits(read.state):
            raise _UnfitError("its arrays are not what was written")
        self._kept.scores = {int(step): score for step, score in about["scores"].items()}
        return read.state, about["record"]

    def _put_aside(self, step: int, reason: str) -> None:
        damaged, aside = (
            self._folder / str(step),
            self._folder.parent / f"damaged-checkpoint-{step}",
        )
        if self._read_only:
            print(f'warning: the checkpoint "{damaged}" is damaged: {reason}', file=sys.stderr)
            return
        meet(f"checkpoint {step} is damaged")
        if leads():
            damaged.rename(aside)
        meet(f"checkpoint {step} is put aside")
        self._manager.reload()
        print(
            f'warning: the checkpoint "{damaged}" is damaged and now "{aside.name}": {reason}',
            file=sys.stderr,
        )

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, UserError):
                raise
            if not disk_is_full(error):
                if isinstance(error, OSError) or not self._folder.exists():
                    raise UserError(
                        f'no checkpoint can be written to "{self._folder}" any more: '
                        f"{reason(error).splitlines()[0]}. Continue with --resume "
                        f"{self._folder.parent} when that folder is there again"
                    ) from None
                raise
            whole = sorted(int(p.name) for p in self._folder.glob("*") if p.name.isdigit())
            rest = f"checkpoint {whole[-1]} is whole" if whole else "there is no checkpoint yet"
            raise UserError(
                f'the disk is full: no checkpoint can be written to "{self._folder}"; {rest}. '
                f"Free some space and continue with --resume {self._folder.parent}"
            ) from None


class _UnfitError(ValueError):
    """A checkpoint that can be read, but must not be used."""


class _OfAnotherModelError(_UnfitError):
    """One whose arrays are not those that are asked for."""


def _reason(error: Exception) -> str:
    """Why a checkpoint cannot be used, in a few words; orbax and TensorStore say it in pages."""
    if isinstance(error, _UnfitError):
        return str(error)
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    text = " ".join(" ".join(map(str, causes)).split())
    if named := re.findall(r'local file "([^"]*[^"/])"|File (\S*) not found', text):
        return f'"{"".join(named[-1])}" is damaged or missing'
    what = re.split(r"[:;(<{]", text)[0].strip() or type(error).__name__
    return f"a file in it is damaged or missing ({what[:100]})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Where one array cannot be read, orbax's reads of the others would complain on stderr."""
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _bits(state: Any) -> Mapping[str, int]:
    """A weighted sum over the bytes of every array; a change of one byte always changes it."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in _leaves(state)}
    return {name: int(total) for name, total in jax.device_get(_sums(leaves)).items()}


@jax.jit
def _sums(leaves: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    def weighted_sum(leaf: Array) -> UInt32[Array, ""]:
        data = jax.lax.bitcast_convert_type(leaf, jnp.uint8).astype(jnp.uint32)
        weights = 2 * jnp.arange(data.size, dtype=jnp.uint32) + 1  # odd: none is lost modulo 2^32
        return (data * weights.reshape(data.shape)).sum(dtype=jnp.uint32)

    return jax.tree.map(weighted_sum, leaves)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))[
        0
    ]


def _difference(like: Any, saved: Any) -> str:
    """The first array of another shape, in words; none where all are alike.

    What lies in parts over all devices may be longer or shorter: the zeros behind it are as many as
    the devices wanted that it was saved from.
    """

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {
            "/".join(
                str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
            ): tuple(leaf.shape)
            for path, leaf in _leaves(tree)
            if getattr(leaf, "shape", None) is not None
        }

    ours, theirs = shapes(like), shapes(saved)
    parted = [is_in_parts(leaf.sharding) for _, leaf in _leaves(like)]
    in_parts = {name for name, is_parted in zip(ours, parted, strict=True) if is_parted}
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name), theirs.get(name)
        if name in in_parts and here and there and here[1:] == there[1:]:
            continue
        if here != there:
            return f"{name} is {there or 'missing'} there and {here or 'missing'} here"
    return ""
