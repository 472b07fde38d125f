"""Devices and processes: one mesh over all of them, with the batch split over all devices."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from experiments.runtime.errors import DataLost, Preempted, UserError

AXES = ("copy", "part")
"""Of a mesh: copies of the parameters, and the devices that hold one copy among them. Batches are
parted over both."""

# Arrays smaller than this are not worth the messages that splitting them costs.
_SPLIT_FROM = 2**14


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the training runs; no part of what is trained."""

    fsdp: int = 1
    """Devices that hold one copy of the parameters among them; 1 is a copy on each."""
    coordinator: str | None = None
    """HOST:PORT of process 0 where there are several; SLURM, MPI and TPU pods say it themselves."""
    processes: int | None = None
    """How many processes there are, if --coordinator is given."""
    process_id: int | None = None
    """Which of them this is, from 0, if --coordinator is given."""

    def __post_init__(self) -> None:
        if self.fsdp < 1:
            raise UserError(f"--fsdp must be at least 1, got {self.fsdp}.")
        given = (self.coordinator, self.processes, self.process_id)
        if None in given and any(value is not None for value in given):
            raise UserError(
                "--coordinator, --processes and --process-id go together, got "
                f"{', '.join(map(str, given))}."
            )
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise UserError(f"--coordinator must be HOST:PORT, got {self.coordinator}.")
        if self.processes is not None and not 0 <= (self.process_id or 0) < self.processes:
            raise UserError(
                f"--process-id must be from 0 to {self.processes - 1} with --processes "
                f"{self.processes}, got {self.process_id}."
            )


def join_processes(cluster: Cluster) -> None:
    """Meets the other processes, if there are any; before anything is computed.

    JAX itself ends the process where the others cannot be met in five minutes.
    """
    if cluster.coordinator is not None:
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process_id)
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "should be defined" not in str(error):  # else JAX finds no cluster: it is alone
            raise


def leads() -> bool:
    """Whether this is the process that prints and writes what is written once."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until all processes have come to the point of this name."""
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ends one of several processes when it fails, without waiting for the others.

    Python's own exit would wait minutes for processes that are dead, or that wait for this one.
    """
    try:
        yield
    except BaseException as error:
        together = isinstance(error, Preempted)  # all of them leave
        if together or not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} stopped; where no "
                "cause stands above, another process was lost. Start all of them again to continue "
                "from the last checkpoint.",
                file=sys.stderr,
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """Makes what one process refuses within an error of all of them, which then end alike.

    Raises:
      UserError: on every process, if any has raised one, or DataLost, within.
    """
    own: list[str] = []
    try:
        yield
    except (UserError, DataLost) as error:
        own = [str(error)]
    if refused := strings_of_all_processes(own):
        raise UserError(" ".join(refused))


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes.

    Args:
      fsdp: devices that hold one copy of the parameters among them.
      devices: None for those of this machine and of the processes that it has met.

    Raises:
      UserError: fsdp does not divide the number of devices.
    """
    # A process's devices stand together, so that its share of a batch is one slice.
    chosen = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if len(chosen) % fsdp:
        raise UserError(f"--fsdp must divide the {len(chosen)} devices, got {fsdp}.")
    return Mesh(np.array(chosen).reshape(-1, fsdp), AXES)


def check_batch(batch_size: int, mesh: Mesh, parts: int) -> None:
    """Refuses a global batch that does not divide among the devices.

    Args:
      batch_size: images in a step, on all devices.
      mesh: the devices.
      parts: that each device computes its share in.

    Raises:
      UserError: it does not divide.
    """
    unit = mesh.size * parts
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        computed = f", computed in {parts} parts (--train.accumulate)" if parts > 1 else ""
        raise UserError(
            f"--train.batch-size is that of all devices together and must be a multiple of {unit} "
            f"for {mesh.size} devices{computed}, got {batch_size}; "
            f"{f'{below} or {above}' if below else above} would do."
        )


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def is_in_parts(sharding: Sharding) -> bool:
    """Whether it is `by_batch` of some mesh."""
    return isinstance(sharding, NamedSharding) and sharding.spec[:1] == (AXES,)


def with_sharding(shape: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape of an array of a training state, and where it lies on the mesh.

    With fsdp, a large array is split along the longest of its axes that the devices of a copy
    divide; everything else has a copy on every device.
    """
    parts = mesh.shape[AXES[1]]
    axes: list[str | None] = [None] * len(shape.shape)
    even = [axis for axis, length in enumerate(shape.shape) if length % parts == 0]
    if parts > 1 and even and shape.size >= _SPLIT_FROM:
        axes[max(even, key=lambda axis: shape.shape[axis])] = AXES[1]
    return shape.update(sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def on_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's slice of a batch, as part of the global batch."""
    sharding = by_batch(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def on_host(tree: Any, mesh: Mesh) -> Any:
    """The values of global arrays, on every process."""
    return jax.device_get(jax.jit(lambda tree: tree, out_shardings=whole(mesh))(tree))


def own_share(tree: Any) -> Any:
    """The values on this process's devices of arrays whose first axis is split over all devices."""

    def rows(array: jax.Array) -> np.ndarray:
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([shard.data for shard in shards])

    return jax.tree.map(rows, tree)


def from_all_processes(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, one behind the other."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def strings_of_all_processes(own: Sequence[str]) -> list[str]:
    """The strings that any process has, each once, in alphabetical order."""
    text = np.frombuffer(json.dumps(list(own)).encode(), np.uint8)
    lengths = from_all_processes(np.array([len(text)]))
    padded = np.zeros((1, lengths.max()), np.uint8)
    padded[0, : len(text)] = text
    rows = from_all_processes(padded)
    found = [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
    return sorted({string for strings in found for string in strings})


class Requests:
    """What any of the processes asks for, known to all of them at the same step."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._any = jax.jit(lambda requests: requests.any(axis=0), out_shardings=whole(mesh))
        self._pending: jax.Array | None = None

    def exchange(self, *requests: bool) -> list[bool]:
        """Hands in what this process asks for, and returns everyone's requests of the call before.

        Being one call behind, it never waits for a step that has only just been dispatched.
        """
        before = self._pending
        local = np.tile(np.array(requests), (len(self._mesh.local_devices), 1))
        self._pending = self._any(
            jax.make_array_from_process_local_data(by_batch(self._mesh), local)
        )
        return [False] * len(requests) if before is None else jax.device_get(before).tolist()

    def forget(self) -> None:
        """Lets go of what was handed in last; all processes do so at the same step."""
        self._pending = None
