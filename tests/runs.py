"""Looking at runs from outside."""

import json
import os
import subprocess
import sys

SMALL = ["--model.conv", "standard", "--model.blocks", "1", "1", "1", "--image-size", "8"]


def start(*arguments, env):
    """Starts the classification experiment in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.classification", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def finish(process):
    """Waits for it; its exit status, and what it has said on stdout and stderr."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def rows_of(folder):
    """The metrics of every epoch, but for the speed."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def checkpoints_of(folder):
    """The steps of the checkpoints that are whole."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())


def tensorboard(folder):
    """The curves, and the steps at which the run was begun and gone on with."""
    from tensorboardX.proto.event_pb2 import Event

    curves, begun = {}, []
    for path in sorted((folder / "tensorboard").iterdir(), key=os.path.getmtime):
        content = path.read_bytes()
        while len(content) > 12:  # length, its checksum, an event, its checksum
            length = int.from_bytes(content[:8], "little")
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            if event.HasField("session_log"):
                begun.append(event.step)
            for value in event.summary.value:
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves, begun
