"""A run's metrics on disk: a JSON line for every epoch, and TensorBoard's event files."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.runtime.files import write_text

Row = dict[str, Any]


class Metrics:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder.

    Args:
      run_dir: the folder.
      rows: those of the epochs that the run has behind it; the file holds these and no others.
      step: where the run goes on; what TensorBoard has of later steps is hidden.
    """

    def __init__(self, run_dir: pathlib.Path, rows: Sequence[Row], step: int):
        # Here, because it imports PyTorch where that is installed.
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._path = run_dir / "metrics.jsonl"
        write_text(self._path, "".join(map(_line, rows)))
        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The last number parts two of the same second, of which one would overwrite the other.
        count = sum(1 for _ in folder.iterdir())
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{count}"
        # Not SummaryWriter, whose thread dies on a full disk and leaves this one waiting.
        self._records = RecordWriter(str(folder / name))
        self._event, self._scalar = Event, scalar
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    def epoch(self, row: Row) -> None:
        """Adds an epoch's row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        self.scalars(row["step"], row)
        self._records.flush()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds values to TensorBoard, nested ones under joined names."""
        for name, value in _flat(values):
            self._write(step=step, summary=self._scalar(name, value))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
